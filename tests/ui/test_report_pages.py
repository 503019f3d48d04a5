"""The pages that `train`, `compare` and `sweep` leave, in Chromium: the report, the divider, zoom and steps."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config

from mini_config import mini_values
from page_server import console_errors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with previews at two steps."""
    folder = tmp_path_factory.mktemp("pages")
    sample = {"every": 2, "width": 64, "height": 64, "prompts": ["a red zorb", "a red circle"]}
    found: list[Path] = []
    for name, lr in (("one", 1e-3), ("two", 4e-3)):
        values = mini_values(folder, folder / "cache", name=name, sample=sample, optimizer={"lr": lr})
        run_training(Config.model_validate(values), fresh=False)
        found.append(folder / name)
    return found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(offline=True)
    opened = context.new_page()
    errors = console_errors(opened)
    yield opened
    context.close()
    assert not errors


def zoom_of(page: Page) -> str:
    return page.locator("#left img").evaluate("image => getComputedStyle(image).transform")


def test_the_report_shows_all(page: Page, runs: list[Path]):
    """Curves, every preview, nothing from elsewhere."""
    page.goto((runs[0] / "report.html").as_uri())
    assert page.locator("svg polyline").count() >= 2
    sizes = page.locator("img").evaluate_all("images => images.map(one => one.naturalWidth)")
    assert len(sizes) >= 6 and min(sizes) > 0


def test_the_comparison_is_worked(page: Page, runs: list[Path], tmp_path: Path):
    """The divider moves by keys and by dragging, both images zoom together, and a step shows its images."""
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page.goto((tmp_path / "out" / "compare.html").as_uri())
    stage = page.locator("#stage")
    before = stage.get_attribute("aria-valuenow")
    stage.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    after = stage.get_attribute("aria-valuenow")
    assert before == "50" and after == "60"
    box = stage.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 20)
    page.mouse.up()
    assert abs(int(stage.get_attribute("aria-valuenow") or 0) - 20) <= 2
    still = zoom_of(page)
    page.keyboard.press("+")
    left, right = (page.locator(f"#{side} img") for side in ("left", "right"))
    assert zoom_of(page) != still
    matrices = [one.evaluate("image => getComputedStyle(image).transform") for one in (left, right)]
    assert matrices[0] == matrices[1]
    page.keyboard.press("0")
    sources: list[list[str | None]] = []
    for step in range(3):
        page.locator("#step").fill(str(step))
        assert page.locator("#step-shown").inner_text() == str(2 * step)
        sources.append([one.get_attribute("src") for one in (left, right)])
    assert len(set(map(str, sources))) == 3
    shown = page.locator(".sheet:not([hidden]) .pick")
    shown.nth(2).click()
    assert page.locator("#right img").get_attribute("src") == shown.nth(2).locator("img").get_attribute("src")
    loaded = shown.locator("img").evaluate_all("images => images.map(one => one.naturalWidth)")
    assert loaded and min(loaded) > 0


def test_a_sweep_leaves_such_a_page(page: Page, runs: list[Path], tmp_path: Path):
    """Its columns are the values that were tried."""
    sample = {"every": 2, "width": 64, "height": 64, "prompts": ["a red zorb"]}
    values = mini_values(tmp_path / "sweep", runs[0].parent / "cache", name="swept", sample=sample, train={"steps": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    words = ["sweep", str(tmp_path / "c.yaml"), "--vary", "lora.rank=2,4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (found,) = list((tmp_path / "sweep").rglob("compare.html"))
    page.goto(found.as_uri())
    headers = page.locator(".sheet:not([hidden]) th").all_inner_texts()
    assert any("2" in text for text in headers) and any("4" in text for text in headers)
    pairs = itertools.pairwise(page.locator(".pick img").evaluate_all("images => images.map(one => one.src)"))
    assert all(one != other for one, other in pairs)
