"""The pages for trying LoRAs and for work on LoRA files, in Chromium."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from try_browser import chromium_page, copy_of_runs, pixels, serving, trained_runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module")
def runs(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_runs(trained_runs(shared_cache), tmp_path_factory.mktemp("try") / "runs")


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with serving(runs) as address:
        yield address


@pytest.fixture
def page() -> Iterator[Page]:
    with chromium_page() as page:
        page.context.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield page


def choose(page: Page, label: str, option: str | re.Pattern[str]) -> None:
    page.get_by_role("combobox", name=label, exact=True).first.click()
    page.get_by_role("option", name=option).first.click()


def test_image_with_the_lora_of_a_run(page, address, runs):
    """A run is chosen with one of its previews, drawn beside the model without LoRA, and equals the preview."""
    page.goto(f"{address}/try")
    expect(page.get_by_text("Needs about")).to_be_visible()
    choose(page, "As a preview of the run", re.compile("a yellow zorb"))
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("7")
    expect(page.get_by_role("spinbutton", name="Width, px")).to_have_value("96")
    page.get_by_role("button", name="Draw", exact=True).click()
    images = page.locator("article img")
    expect(images).to_have_count(2)
    for index, preview in ((0, "000000-01.png"), (1, "000004-01.png")):
        source = str(images.nth(index).get_attribute("src")).partition("?")[0]
        (runs / "seen.png").write_bytes(page.request.get(address + source).body())
        assert pixels(runs / "seen.png") == pixels(runs / "tiny" / "samples" / preview)
    expect(page.get_by_text("tiny · tiny 1 · 96x64 · 8 steps · g 0 · seed 7")).to_be_visible()

    # Larger, and back.
    page.get_by_role("button", name=re.compile("Show larger: a yellow zorb")).click()
    expect(page.get_by_role("dialog").get_by_role("img")).to_have_count(2)
    page.keyboard.press("Escape")

    # Another seed and strength, and then the settings of the first again.
    page.get_by_role("button", name="Another seed").click()
    page.get_by_role("spinbutton", name="Strength").fill("0.5")
    page.get_by_role("textbox", name="Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_text(re.compile(r"tiny · tiny 0\.5 · 96x64"))).to_be_visible()
    page.get_by_role("button", name="Use these settings again").last.click()
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("7")
    expect(page.get_by_role("spinbutton", name="Strength")).to_have_value("1")
    page.get_by_role("button", name="Delete this image").first.click()
    expect(page.locator("article")).to_have_count(1)


def test_queue_and_problems_are_shown(page, address):
    """Images that wait show their place and can be cancelled; what cannot be drawn says why."""
    page.goto(f"{address}/try")
    page.get_by_role("spinbutton", name="Steps").fill("900")
    draw = page.get_by_role("button", name="Draw", exact=True)
    draw.click()
    draw.click()
    expect(page.get_by_text("1 before it")).to_be_visible()
    expect(page.get_by_text(re.compile(r"step \d+ of 1800"))).to_be_visible()
    for left in (1, 0):
        page.get_by_role("button", name="Cancel this image").last.click()
        expect(page.get_by_role("button", name="Cancel this image")).to_have_count(left)
    expect(page.get_by_text("In the queue")).to_be_hidden()

    page.get_by_role("spinbutton", name="Width, px").fill("65")
    draw.click()
    expect(page.get_by_text(re.compile("width: is 65"))).to_be_visible()
    page.get_by_role("button", name="OK").click()

    choose(page, "Model", "Path or hub id")
    page.get_by_role("textbox", name="Folder, .safetensors or hub id").fill("/nowhere")
    page.get_by_role("spinbutton", name="Width, px").fill("64")
    page.get_by_role("button", name="Remove this LoRA").click()
    draw.click()
    expect(page.get_by_text("could not be drawn")).to_be_visible()
    expect(page.locator("article").first).to_contain_text("/nowhere")
    page.get_by_role("button", name="Delete this image").first.click()
    expect(page.get_by_text("could not be drawn")).to_be_hidden()


def test_preview_leads_to_its_settings(page, address):
    """The link of a preview opens the form with its request and the LoRA of its step."""
    page.goto(f"{address}/try?run=tiny&preview=000002-01.png")
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("7")
    expect(page.get_by_role("spinbutton", name="Steps")).to_have_value("8")
    expect(page.get_by_role("combobox", name="LoRA file")).to_have_value(re.compile("tiny-000002"))


def test_lora_bench_in_the_page(page, address, runs):
    """A file is chosen and inspected, merged with sliders, and a file that is no LoRA is uploaded and refused."""
    page.goto(f"{address}/loras")
    choose(page, "LoRA file", "tiny: tiny.safetensors")
    expect(page.get_by_role("img", name="Heat map of the modules")).to_be_visible()
    expect(page.get_by_text(re.compile("rank     16"))).to_be_visible()

    page.get_by_role("tab", name="Merge").click()
    page.get_by_role("button", name="Add a LoRA").click()
    page.get_by_role("spinbutton", name="Strength").last.fill("-0.25")
    page.get_by_role("button", name="Merge").click()
    link = page.get_by_role("link", name="merged.safetensors")
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    assert download.value.path().read_bytes() == (runs / "lora-files" / "merged.safetensors").read_bytes()

    page.get_by_role("tab", name="Inspect").click()
    page.locator("input[type=file]").set_input_files(
        {"name": "odd.safetensors", "mimeType": "application/octet-stream", "buffer": b"no LoRA"}
    )
    expect(page.get_by_text("refused", exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile("odd.safetensors"))).not_to_have_count(0)
    assert (runs / "lora-files" / "odd.safetensors").read_bytes() == b"no LoRA"
