"""The page of images in a real browser, from a folder of the miniature's images."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from zimage_train.dataset.buckets import nearest_bucket

from images_browser import LESSON, copy_lesson, open_images, open_page, saved, served
from page_server import open_browser

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]

MANY = 10_000
FIRST_ROW_SECONDS = 8.0
"""Generous: machines of a test are shared; alone it takes a second and a half."""
MAX_RESPONSE_BYTES = 200_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)
    with open_browser() as started:
        yield started


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def address(workspace: Path) -> Iterator[str]:
    with served(workspace) as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose errors fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def folder(workspace: Path, request: pytest.FixtureRequest) -> Path:
    return copy_lesson(workspace / request.node.name)


def caption_of(page: Page, name: str):
    return page.locator(f'[data-name="{name}"] textarea')


def panel(page: Page, name: str):
    """Open a panel of the side, and return it."""
    found = page.locator(".q-expansion-item").filter(has=page.get_by_text(re.compile(f"^{name}")).first).first
    found.locator(".q-item").first.click()
    # While it opens, its buttons move away from where a click is aimed at.
    content = found.locator(".q-expansion-item__content").first.element_handle()
    page.wait_for_function("(content) => content.offsetHeight > 0 && !content.style.height", arg=content)
    return found


def test_folder_is_chosen_in_the_browser(page, address, folder):
    """From the start page a folder is reached by clicks, and no click leaves the workspace."""
    open_page(page, f"{address}/images")
    page.get_by_label("Up one folder").click()
    expect(page.get_by_label("Up one folder")).to_be_disabled()
    page.get_by_role("button", name=str(folder.parent)).click()
    page.get_by_role("button", name=folder.name).click()
    page.get_by_role("button", name="Open (12 images)").click()
    expect(page.locator(".zt-image")).to_have_count(12)
    expect(page.get_by_role("heading", name=folder.name)).to_be_visible()
    link = page.get_by_role("link", name="Train on this folder")
    assert link.get_attribute("href") == f"/new?folder={folder}"


def test_folder_outside_is_refused(page, address):
    page.goto(f"{address}/images?folder={LESSON}")
    expect(page.get_by_role("alert")).to_contain_text("outside the folders of this page")
    expect(page.locator(".zt-image")).to_have_count(0)


def test_caption_is_edited_in_place(page, address, folder):
    """What is typed is saved when the field is left, and undone by the button."""
    before = (folder / "zorb_00.txt").read_text(encoding="utf-8").strip()
    open_images(page, address, folder)
    field = caption_of(page, "zorb_00.png")
    expect(field).to_have_value(before)
    field.fill("a zorb in the rain")
    field.blur()
    assert saved(folder / "zorb_00.txt", "a zorb in the rain")
    page.get_by_role("button", name="Undo (1)").click()
    assert saved(folder / "zorb_00.txt", before)
    expect(caption_of(page, "zorb_00.png")).to_have_value(before)


def test_typing_survives_another_edit(page, address, folder):
    """Text that is being typed stays while the page shows another caption's change."""
    open_images(page, address, folder)
    caption_of(page, "zorb_00.png").fill("first")
    caption_of(page, "zorb_01.png").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("half a sen", delay=60)
    assert saved(folder / "zorb_00.txt", "first")
    expect(page.get_by_role("button", name="Undo (1)")).to_be_enabled()
    expect(caption_of(page, "zorb_01.png")).to_have_value("half a sen")
    page.keyboard.type("tence")
    caption_of(page, "zorb_01.png").blur()
    assert saved(folder / "zorb_01.txt", "half a sentence")


def test_conflict_is_shown(page, address, folder):
    """A file that changed meanwhile is not overwritten, until the user has seen what it says."""
    open_images(page, address, folder)
    (folder / "zorb_02.txt").write_text("theirs", encoding="utf-8")
    field = caption_of(page, "zorb_02.png")
    field.fill("mine")
    field.blur()
    card = page.locator('[data-name="zorb_02.png"]')
    expect(card.get_by_role("alert")).to_contain_text("theirs")
    assert (folder / "zorb_02.txt").read_text(encoding="utf-8") == "theirs"
    expect(field).to_have_value("mine")
    card.get_by_role("button", name="Keep mine").click()
    assert saved(folder / "zorb_02.txt", "mine")
    expect(card.get_by_role("alert")).to_have_count(0)


def test_slash_searches(page, address, folder):
    open_images(page, address, folder)
    page.keyboard.press("/")
    page.keyboard.type("zorb_03")
    expect(page.locator(".zt-image")).to_have_count(1)
    expect(page.get_by_label("Search names and captions (/)")).to_have_value("zorb_03")


def test_replace_with_preview_and_undo(page, address, folder):
    texts = {path.name: path.read_text(encoding="utf-8").strip() for path in folder.glob("*.txt")}
    count = sum("zorb" in text for text in texts.values())
    open_images(page, address, folder)
    replace = panel(page, "Search and replace")
    replace.get_by_label("Search for").fill("zorb")
    replace.get_by_label("Replace with").fill("blib")
    expect(replace.get_by_role("status")).to_have_text(f"Changes {count} of 12 captions")
    replace.get_by_role("button", name="Replace", exact=True).click()
    for name, text in texts.items():
        assert saved(folder / name, text.replace("zorb", "blib"))
    page.get_by_role("button", name=f"Undo ({count})").click()
    for name, text in texts.items():
        assert saved(folder / name, text)


def test_tag_filters_and_is_removed(page, address, workspace):
    folder = copy_lesson(workspace / "tags", 3)
    for number, text in enumerate(("cat, red", "cat, blue", "dog")):
        (folder / f"zorb_{number:02d}.txt").write_text(text, encoding="utf-8")
    open_images(page, address, folder)
    tags = panel(page, "Tags")
    tags.get_by_role("button", name="cat 2").click()
    expect(page.locator(".zt-image")).to_have_count(2)
    tags.get_by_role("button", name="Remove").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    assert saved(folder / "zorb_00.txt", "red") and saved(folder / "zorb_01.txt", "blue")
    expect(page.locator(".zt-image")).to_have_count(3)


def test_crop_is_drawn_over_the_image(page, address, workspace):
    """The rectangle over an image has the shape of its bucket."""
    folder = workspace / "wide"
    folder.mkdir()
    Image.new("RGB", (700, 500), "green").save(folder / "a.png")
    open_images(page, address, folder)
    page.get_by_label("Crop at").click()
    page.get_by_role("option", name="512 px").click()
    bucket = nearest_bucket(700, 500, 512)
    expect(page.get_by_text(f"700 × 500 → {bucket.width} × {bucket.height}")).to_be_visible()
    box = page.locator(".zt-image-crop").first.bounding_box()
    assert box is not None
    assert box["width"] / box["height"] == pytest.approx(bucket.width / bucket.height, rel=0.02)


def test_problem_is_moved_away_and_back(page, address, folder):
    (folder / "broken.png").write_bytes(b"<html>")
    open_images(page, address, folder)
    problems = panel(page, "Problems")
    problems.get_by_role("button", name="Check all images").click()
    expect(problems.get_by_text("not an image")).to_be_visible()
    problems.get_by_role("button", name="Move away").click()
    expect(page.locator(".zt-image")).to_have_count(12)
    assert (folder / "_rejected" / "broken.png").exists()
    moved = panel(page, "Moved away")
    moved.get_by_role("button", name="Move back").click()
    expect(page.locator(".zt-image")).to_have_count(13)
    assert (folder / "broken.png").exists()


def test_duplicate_is_moved_away(page, address, folder):
    (folder / "zorb_00_again.png").write_bytes((folder / "zorb_00.png").read_bytes())
    open_images(page, address, folder)
    panel(page, "Problems").get_by_role("button", name="Check all images").click()
    pairs = panel(page, "Near-duplicates")
    expect(pairs.locator(".zt-pair img")).to_have_count(2)
    pairs.get_by_role("button", name="Move away zorb_00_again.png").click()
    expect(pairs.get_by_text("No two images are nearly equal.")).to_be_visible()
    assert (folder / "_rejected" / "zorb_00_again.png").exists() and (folder / "zorb_00.png").exists()


def test_captioning_runs_and_stops(page, address, folder):
    """All that have none are captioned, one is captioned by its button, and a stop keeps what is written."""
    for path in folder.glob("*.txt"):
        path.unlink()
    open_images(page, address, folder)
    side = panel(page, "Caption with a model")
    side.get_by_label("Model (hub id or folder)").fill("slow")
    side.get_by_role("button", name="Caption all").click()
    expect(caption_of(page, "zorb_00.png")).to_have_value("something seen by slow in sentences")
    side.get_by_role("button", name="Stop").click()
    expect(side.get_by_role("status")).to_contain_text("Stopped after")
    assert not (folder / "zorb_11.txt").exists()
    side.get_by_label("Model (hub id or folder)").fill("fast")
    page.get_by_label("Caption with the model zorb_11.png").click()
    expect(caption_of(page, "zorb_11.png")).to_have_value("something seen by fast in sentences")
    assert not (folder / "zorb_10.txt").exists()


def test_images_are_uploaded(page, address, workspace):
    """Dropped images and captions come into a folder of their own, which the page then opens."""
    open_page(page, f"{address}/images")
    page.get_by_label("Name of the new folder").fill("my zorbs")
    files = [LESSON / name for name in ("zorb_00.png", "zorb_00.txt", "zorb_01.png")]
    page.locator("input[type=file]").set_input_files(files)
    expect(page.get_by_role("heading", name="my zorbs")).to_be_visible()
    expect(page.locator(".zt-image")).to_have_count(2)
    for file in files:
        assert (workspace / "images" / "my zorbs" / file.name).read_bytes() == file.read_bytes()


def test_arrows_turn_to_the_next_image(page, address, folder):
    open_images(page, address, folder)
    page.locator('[data-name="zorb_00.png"] .zt-image-box').click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text("zorb_00.png")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_text("zorb_01.png")).to_be_visible()
    dialog.get_by_label("Caption").fill("seen large")
    page.keyboard.press("Escape")
    assert saved(folder / "zorb_01.txt", "seen large")


def test_ten_thousand_images(page, address, workspace):
    """The first row of 10,000 images stands soon, and no response of the page is large."""
    folder = workspace / "many"
    folder.mkdir()
    Image.effect_noise((64, 64), 40).convert("RGB").save(folder / "i00000.png")
    (folder / "i00000.txt").write_text("cat, red", encoding="utf-8")
    for number in range(1, MANY):
        os.link(folder / "i00000.png", folder / f"i{number:05d}.png")
        os.link(folder / "i00000.txt", folder / f"i{number:05d}.txt")
    sizes: dict[str, int] = {}
    frames: list[int] = []
    page.on("response", lambda response: sizes.update({response.url: int(response.headers.get("content-length", 0))}))
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(len(frame))))
    began = time.monotonic()
    page.goto(f"{address}/images?folder={folder}")
    page.wait_for_function(
        "(() => { const row = [...document.querySelectorAll('.zt-image img')].slice(0, 4);"
        " return row.length === 4 && row.every((image) => image.complete && image.naturalWidth > 0) })()"
    )
    seconds = time.monotonic() - began
    expect(page.get_by_text("10000 of 10000 images, 0 without a caption")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator('[data-name="i00048.png"]')).to_be_visible()
    assert seconds < FIRST_ROW_SECONDS
    own = {url: size for url, size in sizes.items() if "_nicegui" not in url}
    assert max(own.values()) < MAX_RESPONSE_BYTES and max(frames) < MAX_RESPONSE_BYTES
    assert len([url for url in own if "/media/small" in url]) < 200  # only what is near the screen
