"""The whole job in Chromium, on the miniature, through the page alone."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from zimage_train import mini
from zimage_train.ui import run_state

from mini_config import mini_text
from page_server import PageServer, console_errors, page_server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]

LONG, RUN_SECONDS = 30_000, 120_000
"""Milliseconds."""
SHOTS = Path(os.environ.get("PAGE_SHOTS", "")) if os.environ.get("PAGE_SHOTS") else None
"""A folder for screenshots, if they are asked for."""
STEPS, PREVIEW_EVERY = (300, 50) if SHOTS else (12, 6)
PROMPTS = ["a red zorb on a blue background"]
if SHOTS:
    PROMPTS += [
        "a green zorb on a white background",
        "a yellow zorb on a purple background",
        "a blue circle on a red background",
    ]
IN_DOCS = ("run", "run-zh", "new", "zoom", "images")
"""Screenshots that docs/ui.md and the READMEs show; `run-zh` needs a Chinese font."""
SIZES = {"wide": (1280, 900), "tablet": (820, 1100), "phone": (390, 800)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with page_server(tmp_path_factory.mktemp("page"), "--folder", str(mini.TURBO.parent)) as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose console must stay free of errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")
    opened = context.new_page()
    errors = console_errors(opened)
    opened.set_default_timeout(LONG)
    yield opened
    context.close()
    assert not errors


def field_of(page: Page, key: str) -> Locator:
    """The form's field of a setting, whose label ends with its key."""
    return page.get_by_label(re.compile(rf"(^| · ){re.escape(key)}$")).first


def fill(page: Page, label: str, text: str) -> None:
    field = field_of(page, label)
    field.fill(text)
    field.press("Tab")


def editor_text(page: Page) -> str:
    return page.locator(".cm-content").inner_text()


def write_text(page: Page, text: str) -> None:
    """Replace the text of the editor."""
    page.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)


def status_of(address: str, method: str = "GET", headers: dict[str, str] | None = None) -> int:
    return httpx.request(method, address, headers=headers).status_code


def shoot(page: Page, name: str) -> None:
    """Save screenshots at three sizes in light and dark, if they are asked for."""
    if SHOTS is None:
        return
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(400)
            page.screenshot(path=SHOTS / f"{name}-{size}-{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    if name in IN_DOCS:
        page.wait_for_timeout(800)
        picture = Image.open(BytesIO(page.screenshot()))
        picture.convert("RGB").quantize(256).save(SHOTS / f"page-{name}.png", optimize=True)


def test_from_a_folder_to_a_lora(page: Page, server: PageServer):
    """A folder becomes a config, the form changes it, it is planned, trained and shown, and the LoRA comes down."""
    page.goto(f"{server.address}/new")
    fill(page, "Folder", str(mini.IMAGES))
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="miniature").click()
    page.get_by_role("button", name="Write a config").click()
    expect(field_of(page, "name")).to_have_value("pictures_lora")
    fill(page, "train.steps", str(STEPS))
    fill(page, "lora.rank", "4")
    fill(page, "sample.every", str(PREVIEW_EVERY))
    fill(page, "sample.prompts", "\n".join(PROMPTS))
    assert re.search(rf"steps: {STEPS} +# a minute on a CPU", editor_text(page)), "comments stay"
    expect(page.get_by_text("fits").first).to_be_visible()
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/run/pictures_lora")
    expect(page.get_by_text("done", exact=True)).to_be_visible(timeout=RUN_SECONDS)
    expect(page.get_by_text(f"{STEPS} / {STEPS}")).to_be_visible()
    expect(page.locator("canvas").first).to_be_visible()
    expect(page.get_by_text(f"step {STEPS}", exact=True)).to_be_visible()
    shoot(page, "run")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text(f"step {STEPS - PREVIEW_EVERY}", exact=True)).to_be_visible()
    page.locator(".zt-pictures img").first.click()
    expect(page.get_by_text("before training")).to_be_visible()
    assert page.locator("[role=dialog] img").count() == 2
    page.get_by_role("button", name="Close").click()
    with page.expect_download() as started:
        page.get_by_role("link", name="lora/pictures_lora.safetensors").click()
    file = Path(started.value.path())
    assert file.read_bytes() == (server.runs / "pictures_lora" / "lora" / "pictures_lora.safetensors").read_bytes()
    page.goto(server.address)
    expect(page.get_by_role("link", name="pictures_lora")).to_be_visible()
    shoot(page, "runs")


def test_the_zoom_moves_both(page: Page, server: PageServer):
    """The wheel enlarges a preview and that before training alike; the arrow keys change the step meanwhile."""
    page.goto(f"{server.address}/run/pictures_lora")
    page.locator(".zt-pictures img").first.click()
    images = page.locator(".zt-zoom-pane img")
    expect(images).to_have_count(2)
    expect(page.locator("figcaption", has_text="before training")).to_be_visible()
    page.wait_for_timeout(600)  # until the dialog has opened to its full size
    box = images.last.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -400)
    expect(images.first).to_have_attribute("style", re.compile(r"scale\(2\.718"))
    styles = [images.nth(index).get_attribute("style") for index in range(2)]
    moved = re.search(r"translate\((-[\d.]+)%, (-[\d.]+)%\)", str(styles[0]))
    # What is under the pointer stays there: at a quarter of the width, a quarter of the growth is to its left.
    assert styles[0] == styles[1] and moved and float(moved[1]) == pytest.approx(-25 * 1.71828, abs=0.5)
    page.keyboard.press("-")
    expect(images.last).to_have_attribute("style", re.compile(r"scale\(2\.17"))
    before = images.last.get_attribute("src")
    page.keyboard.press("ArrowLeft")
    expect(images.last).not_to_have_attribute("src", str(before))
    expect(page.locator("figcaption", has_text=f"step {STEPS - PREVIEW_EVERY}")).to_be_visible()
    shoot(page, "zoom")
    page.get_by_role("button", name="One over the other").click()
    expect(page.locator(".zt-zoom-line")).to_be_visible()


def test_the_report_opens_in_a_sandbox(browser: Browser, server: PageServer):
    """The report of a run is shown, and can reach nothing of this page, whatever stands in it."""
    page = browser.new_context(locale="en-US").new_page()  # what is refused is an error on its console
    page.goto(f"{server.address}/run/pictures_lora")
    report = server.runs / "pictures_lora" / "report.html"
    report.write_text(report.read_text() + "<script>document.title = 'ran ' + self.origin</script>")
    page.get_by_role("link", name="report.html").click()
    expect(page.get_by_role("heading", name="pictures_lora")).to_be_visible()
    expect(page).to_have_title("ran null")
    found = page.evaluate("fetch('/api/runs').then(() => 'reached', () => 'refused')")
    assert found == "refused"
    page.context.close()


def test_verdicts_have_remedies(browser: Browser, server: PageServer):
    """A run that learns nothing says so, and leads to its captions and to a new run with another setting."""
    page = browser.new_context(locale="en-US").new_page()
    page.goto(f"{server.address}/new")
    prompts = {"prompts": ["a red zorb", "a dog"], "width": 64, "height": 64, "every": 2}
    changes = {"optimizer": {"lr": 1e-12}, "sample": prompts, "model": {"adapter_strength": 0.5}}
    write_text(page, mini_text(server.folder, "still", steps=4, **changes))
    expect(field_of(page, "name")).to_have_value("still", timeout=LONG)
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/run/still")
    expect(page.get_by_text("done", exact=True)).to_be_visible(timeout=RUN_SECONDS)
    expect(page.get_by_text("Not learning", exact=True)).to_have_count(1)
    expect(page.locator(".zt-finding", has_text="not learning: at step 4")).to_have_count(1)
    # A warning of the config comes with its remedy, and is not said twice.
    expect(page.locator(".zt-finding", has_text="model.adapter_strength is 0.5")).to_have_count(1)
    shoot(page, "verdict")
    page.get_by_role("link", name="Edit the captions").click()
    expect(page.locator(".zt-image").first).to_be_visible(timeout=LONG)
    page.go_back()
    page.get_by_role("link", name="New run with model.adapter_strength: 1").click()
    expect(field_of(page, "name")).to_have_value("still_2", timeout=LONG)
    assert "adapter_strength: 1" in editor_text(page) and "adapter_strength: 0.5" not in editor_text(page)
    page.context.close()


CHANGES = (("lora.rank=[1", "value"), ("data.7.folder=x", "has no place"), ("nonsense", "is no setting"))


def test_a_clone_and_a_changed_setting(page: Page, server: PageServer):
    """A change that cannot be made is said, and the clone is shown as it is; a name that is taken is refused."""
    for change, words in CHANGES:
        page.goto(f"{server.address}/new?clone=pictures_lora&change={change}")
        expect(field_of(page, "name")).to_have_value("pictures_lora_2")
        expect(page.locator(".q-notification").first).to_contain_text(words)
    page.goto(f"{server.address}/new?clone=pictures_lora&change=lora.rank=2")
    expect(field_of(page, "lora.rank")).to_have_value("2")
    expect(page.get_by_text("fits").first).to_be_visible()  # what is typed before the page is connected is lost
    fill(page, "name", "pictures_lora")
    expect(page.locator(".cm-content")).to_contain_text(re.compile(r"name: pictures_lora(?!_)"))
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("There is a run pictures_lora already")).to_be_visible()


def test_a_run_that_is_gone(page: Page, server: PageServer):
    """A run whose folder is removed under its page is said to be gone."""
    (server.runs / "gone").mkdir(parents=True)
    (server.runs / "gone" / "config.yaml").write_text("name: gone\n")
    page.goto(f"{server.address}/run/gone")
    expect(page.get_by_role("button", name="Clone")).to_be_visible()
    shutil.rmtree(server.runs / "gone")
    expect(page.get_by_text("There is no run gone.")).to_be_visible()
    expect(page.get_by_role("button", name="Clone")).to_have_count(0)


def make_photos(folder: Path) -> None:
    """The pictures of the miniature with their captions, as large as photographs."""
    folder.mkdir()
    for path in [*mini.IMAGES.glob("*.png"), *mini.IMAGES.glob("*.jpg")]:
        with Image.open(path) as image:
            size = (image.width * 10, image.height * 10)
            image.resize(size, Image.Resampling.NEAREST).save(folder / f"{path.stem}.png", compress_level=1)
        (folder / f"{path.stem}.txt").write_text(path.with_suffix(".txt").read_text())


def test_a_card_is_chosen(page: Page, server: PageServer):
    """The plan is made for the card, and offers resolutions at which the run is shorter there."""
    make_photos(server.folder / "photos")
    page.goto(f"{server.address}/images?folder=photos")
    expect(page.locator(".zt-image")).to_have_count(len(list((server.folder / "photos").glob("*.png"))))
    shoot(page, "images")
    page.goto(f"{server.address}/new")
    fill(page, "Folder", "photos")
    page.get_by_role("button", name="Write a config").click()
    expect(field_of(page, "name")).to_have_value("photos_lora")
    expect(field_of(page, "data.0.folder")).to_have_value("photos")  # as it was written, not as a path of this machine
    page.get_by_label("Card", exact=True).fill("RTX 4060")
    page.get_by_role("option", name="RTX 4060, 8 GB", exact=True).click()
    expect(page.get_by_text(re.compile("one 4060: .*, fits"))).to_be_visible(timeout=LONG)
    shoot(page, "new")
    page.get_by_role("button", name=re.compile(r"^data\.\*\.resolution: 512, \d+ h \d\d min$")).click()
    expect(page.locator(".cm-content")).to_contain_text("resolution: 512")
    expect(page.get_by_text("Shorter on this card")).to_have_count(0, timeout=LONG)


def test_a_job_of_ai_toolkit(page: Page, server: PageServer, tmp_path: Path):
    job = {
        "job": "extension",
        "config": {
            "name": "from_there",
            "process": [
                {
                    "type": "sd_trainer",
                    "training_folder": "output",
                    "model": {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"},
                    "network": {"type": "lora", "linear": 8},
                    "datasets": [{"folder_path": str(mini.IMAGES), "resolution": [512]}],
                    "train": {"steps": 10, "lr": 1e-4, "batch_size": 1, "optimizer": "adamw8bit"},
                }
            ],
        },
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    page.goto(f"{server.address}/new")
    page.locator("input[type=file]").set_input_files(path)
    expect(field_of(page, "name")).to_have_value("from_there")
    expect(field_of(page, "lora.rank")).to_have_value("8")
    assert "Imported from job.json" in editor_text(page)


def test_a_bad_yaml_marks_its_line(page: Page, server: PageServer):
    """The line is marked, the form keeps what it has and comes back."""
    page.goto(f"{server.address}/new")
    name = field_of(page, "name")
    expect(name).to_have_value("my_character")
    good = "name: mine\ndata:\n  - folder: photos\nlora:\n  rank: 4\n"
    write_text(page, good)
    expect(name).to_have_value("mine")
    write_text(page, good.replace("rank: 4", "rank: [4"))
    expect(page.get_by_text("The YAML has an error")).to_be_visible()
    expect(page.locator(".zt-bad-line")).to_be_visible()
    expect(name).to_have_value("mine")
    expect(name).to_be_disabled()
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_disabled()
    write_text(page, good.replace("rank: 4", "runk: 4"))
    expect(page.get_by_text("config.yaml:5").first).to_be_visible()
    expect(name).to_be_enabled()
    write_text(page, good)
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    expect(page.locator(".zt-bad-line")).to_have_count(0)


def test_remedies_are_buttons(page: Page, server: PageServer):
    """A warning's button sets what it says; a plan is made for the card that is chosen."""
    page.goto(f"{server.address}/new")
    folder = f"name: mine\ndata:\n  - folder: {mini.IMAGES}\n    resolution: 1024\n    trigger: zorb\n"
    prompts = "sample:\n  prompts: [a zorb, a tree]\n"
    write_text(page, f"{folder}{prompts}optimizer:\n  lr: 1e-3  # too high\n")
    warning = page.get_by_text("Turbo usually becomes noisy")
    expect(warning).to_be_visible(timeout=LONG)
    page.get_by_role("button", name="optimizer.lr: 0.0001").click()
    expect(warning).to_have_count(0, timeout=LONG)
    assert re.search(r"lr: 0.0001 +# too high", editor_text(page))
    page.get_by_label("Card", exact=True).fill("RTX 4060")
    page.get_by_role("option", name="RTX 4060, 8 GB", exact=True).click()
    expect(page.get_by_text(re.compile("one 4060: .*fits"))).to_be_visible(timeout=LONG)


def test_stop_continue_and_a_kill(page: Page, server: PageServer):
    """A run is stopped and continued, survives a restart of the page, and a killed one is shown as failed."""
    page.goto(f"{server.address}/new")
    write_text(page, mini_text(server.folder, "long", steps=3000))
    expect(field_of(page, "name")).to_have_value("long")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/run/long")
    expect(page.get_by_text("running", exact=True)).to_be_visible(timeout=RUN_SECONDS)
    page.get_by_role("button", name="Save now").click()
    saved = page.get_by_role("link", name=re.compile(r"long-0\d+\.safetensors$"))
    expect(saved.first).to_be_visible(timeout=LONG)
    page.get_by_role("button", name="Stop and save").click()
    expect(page.get_by_text("stopped", exact=True)).to_be_visible(timeout=RUN_SECONDS)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_text("running", exact=True)).to_be_visible(timeout=RUN_SECONDS)
    page.goto("about:blank")
    server.restart()
    page.goto(f"{server.address}/run/long")
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    worker = json.loads((server.runs / "long" / run_state.WORKER).read_text())["pid"]
    os.kill(worker, signal.SIGKILL)
    expect(page.get_by_text("failed", exact=True)).to_be_visible(timeout=10_000)
    assert "matched 42/42" in page.get_by_role("log").inner_text()


def test_two_tabs_show_the_same(browser: Browser, server: PageServer):
    """What one tab does, the other shows without being touched."""
    tabs = [browser.new_context(locale="en-US").new_page() for _ in range(2)]
    (server.runs / "old").mkdir(parents=True, exist_ok=True)
    (server.runs / "old" / "config.yaml").write_text("name: old\n")
    for tab in tabs:
        tab.goto(server.address)
        expect(tab.get_by_role("link", name="old", exact=True)).to_be_visible(timeout=LONG)
    tabs[0].get_by_role("button", name="Move to trash old").click()
    tabs[0].get_by_role("button", name="Move to trash", exact=True).click()
    for tab in tabs:
        expect(tab.get_by_role("link", name="old", exact=True)).to_have_count(0, timeout=LONG)
    expect(tabs[0].get_by_role("button", name="Empty the trash")).to_be_visible()
    assert not (server.runs / "old").exists() and (server.runs / ".trash" / "old").exists()
    for tab in tabs:
        tab.context.close()


def test_other_sites_and_folders(page: Page, server: PageServer, tmp_path: Path):
    """A form that another site posts is refused, and so is a file outside the folders."""
    assert status_of(f"{server.address}/", "POST", {"Origin": "http://evil.example"}) == 403
    outside = tmp_path / "secret.png"
    outside.write_bytes(next(mini.IMAGES.glob("*.png")).read_bytes())
    (server.folder / "link.png").unlink(missing_ok=True)
    (server.folder / "link.png").symlink_to(outside)
    hidden = server.runs / ".secret" / "x.png"
    hidden.parent.mkdir(parents=True, exist_ok=True)
    hidden.write_bytes(outside.read_bytes())
    for path, code in ((outside, 403), (f"{server.folder}/../{tmp_path.name}/secret.png", 403), (hidden, 404)):
        assert status_of(f"{server.address}/media/whole?path={path}") == code
    assert status_of(f"{server.address}/media/whole?path={server.folder / 'link.png'}") == 403


def test_languages(page: Page, server: PageServer):
    page.goto(server.address)
    page.get_by_label("Language").click()
    page.get_by_role("option", name="简体中文").click()
    expect(page.get_by_role("heading", name="训练列表")).to_be_visible()
    page.goto(f"{server.address}/new")
    expect(page.get_by_role("heading", name="新建训练")).to_be_visible()
    page.goto(f"{server.address}/run/pictures_lora")
    expect(page.get_by_text("已完成")).to_be_visible()
    shoot(page, "run-zh")
