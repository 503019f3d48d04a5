"""The images page without a browser: captions, edits with undo, tags, uploads, folders, frames, checks, captioning."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from PIL import Image

from zimage_train.dataset import images as decoding
from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import ConfigError, DataError, DiskError
from zimage_train.io import atomic
from zimage_train.ui import caption_job
from zimage_train.ui.caption_edits import CaptionEditor, count_tags, renaming_tag, replacing, writing_where_empty
from zimage_train.ui.caption_job import CaptionJob, CaptionWish
from zimage_train.ui.folder_browser import list_roots, list_subfolders
from zimage_train.ui.folder_check import FolderCheck, list_moved, move_away, move_back
from zimage_train.ui.image_folder import CaptionConflict, ImageFolder
from zimage_train.ui.image_frames import ImageSizes, bucket_of, crop_rectangle
from zimage_train.ui.image_upload import safe_name, save_upload, upload_folder
from zimage_train.ui.mask_overlay import mask_folders, mask_router
from zimage_train.ui.workspace import Workspace

CAPTIONS = {"a": "zorb, red, large", "b": "Zorb, blue", "c": ""}
FAKE = Path(__file__).parent.parent / "support" / "fake_captioner.py"


def draw(path: Path, size: tuple[int, int] = (96, 64), seed: int = 0) -> None:
    """Draw an image that resembles no image of another seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype("uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Three images, of which the last has no caption."""
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        draw(tmp_path / f"{name}.png", seed=seed)
        if caption:
            (tmp_path / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    opened = ImageFolder(tmp_path)
    opened.read()
    return opened


def written(folder: ImageFolder) -> dict[str, str]:
    """Return image -> what its caption file holds."""
    found: dict[str, str] = {}
    for path in sorted(folder.path.glob("*.png")):
        file = path.with_suffix(".txt")
        found[path.stem] = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    return found


# Reading and saving


def test_a_folder_is_read_as_trained(folder):
    """Images come with their captions, in the order of a training, and subfolders but `_` ones are part of it."""
    draw(folder.path / "more" / "d.png")
    draw(folder.path / "_rejected" / "e.png")
    folder.read()
    assert {name: image.caption for name, image in folder.images.items()} == {
        "a.png": CAPTIONS["a"],
        "b.png": CAPTIONS["b"],
        "c.png": "",
        "more/d.png": "",
    }


def test_names_are_read_without_captions(folder):
    """The quick list has the same images in the same order."""
    quick = ImageFolder(folder.path)
    quick.read_names()
    assert list(quick.images) == list(folder.images) and not quick.has_captions
    quick.read_captions(["a.png"])
    assert quick.images["a.png"].caption == CAPTIONS["a"]


def test_caption_is_saved_beside_its_image(folder):
    saved = folder.save_caption("c.png", "  a new\r\ncaption \n", "")
    assert saved == "a new\ncaption" == folder.images["c.png"].caption
    assert (folder.path / "c.txt").read_bytes() == b"a new\ncaption\n"


def test_caption_is_whole_or_old(folder, monkeypatch):
    """A disk that is full in the middle of a caption leaves the old one, and no other file."""
    before = sorted(path.name for path in folder.path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DiskError):
        folder.save_caption("a.png", "half", CAPTIONS["a"])
    assert written(folder)["a"] == CAPTIONS["a"] == folder.images["a.png"].caption
    assert sorted(path.name for path in folder.path.iterdir()) == before


def test_changed_caption_is_not_overwritten(folder):
    """A caption that another program has changed meanwhile stays, and is told."""
    (folder.path / "a.txt").write_text("theirs", encoding="utf-8")
    with pytest.raises(CaptionConflict) as conflict:
        folder.save_caption("a.png", "mine", CAPTIONS["a"])
    assert conflict.value.current == "theirs" and written(folder)["a"] == "theirs"
    assert folder.save_caption("a.png", "mine", "theirs") == "mine"


def test_new_caption_file_is_kept(folder):
    """A caption that appeared for an image without one is a conflict too."""
    (folder.path / "c.txt").write_text("theirs", encoding="utf-8")
    with pytest.raises(CaptionConflict):
        folder.save_caption("c.png", "mine", "")


def test_unreadable_caption_is_kept(folder):
    (folder.path / "a.txt").write_bytes(b"\xff\xfe\x00z")
    with pytest.raises(DataError, match="UTF-16"):
        folder.save_caption("a.png", "mine", "")
    assert (folder.path / "a.txt").read_bytes() == b"\xff\xfe\x00z"


@pytest.mark.parametrize(
    ("name", "text"), [("../a.png", "x"), ("gone.png", "x"), ("a.png", "x" * 20_001), ("a.png", "a\0b")]
)
def test_caption_that_cannot_be_is_refused(folder, name, text):
    """Names that are no image of the folder, and texts that a training would refuse, are not written."""
    with pytest.raises(DataError):
        folder.save_caption(name, text, CAPTIONS["a"])
    assert written(folder) == CAPTIONS


def test_shared_caption_file_is_not_written(folder):
    """Two images of one name would share the caption, which a training refuses."""
    draw(folder.path / "c.jpg")
    folder.read()
    with pytest.raises(DataError, match="several images"):
        folder.save_caption("c.png", "x", "")


@pytest.mark.parametrize(
    ("query", "found"),
    [("ZORB", ["a.png", "b.png"]), ("b.p", ["b.png"]), ("", ["a.png", "b.png", "c.png"]), ("green", [])],
)
def test_search_finds_captions_and_names(folder, query, found):
    assert folder.search(query) == found


def test_search_by_tag_and_missing_caption(folder):
    assert folder.search(tag="red") == ["a.png"]
    assert folder.search(tag="ed") == []  # only whole tags
    assert folder.search(is_uncaptioned=True) == ["c.png"]


# Edits of many captions


def test_replace_is_previewed_and_undone(folder):
    """The preview changes nothing and tells what the replacement will; the undo restores every caption."""
    editor = CaptionEditor(folder)
    previewed = editor.preview(replacing("zorb", "blib"), folder.images)
    assert previewed == {"a.png": (CAPTIONS["a"], "blib, red, large"), "b.png": (CAPTIONS["b"], "blib, blue")}
    assert written(folder) == CAPTIONS
    assert editor.apply(previewed).changed == ["a.png", "b.png"]
    assert written(folder) == {"a": "blib, red, large", "b": "blib, blue", "c": ""}
    assert editor.undo_count == 2
    assert editor.undo().changed == ["a.png", "b.png"]
    assert written(folder) == CAPTIONS and editor.undo_count == 0


def test_replace_is_literal(folder):
    """Characters that mean something in patterns do not, and the case counts if asked."""
    assert replacing("a.c", r"\1")("abc a.c") == r"abc \1"
    assert replacing("Zorb", "x", matches_case=True)("zorb Zorb") == "zorb x"
    with pytest.raises(DataError):
        replacing("", "x")


def test_edit_keeps_what_changed_meanwhile(folder):
    """Files that others change after the preview, or after the edit, are kept by the edit and by its undo."""
    editor = CaptionEditor(folder)
    previewed = editor.preview(replacing("zorb", "blib"), folder.images)
    (folder.path / "a.txt").write_text("theirs", encoding="utf-8")
    result = editor.apply(previewed)
    assert result.changed == ["b.png"] and isinstance(result.errors[0], CaptionConflict)
    (folder.path / "b.txt").write_text("theirs too", encoding="utf-8")
    undone = editor.undo()
    assert undone.changed == [] and len(undone.errors) == 1
    assert written(folder) == {"a": "theirs", "b": "theirs too", "c": ""}


def test_edits_are_undone_in_turn(folder):
    editor = CaptionEditor(folder)
    editor.save("c.png", "first", "")
    editor.save("c.png", "second", "first")
    editor.undo()
    assert written(folder)["c"] == "first"
    editor.undo()
    assert written(folder)["c"] == ""
    assert editor.undo().changed == []


def test_trigger_is_written_where_none_is(folder):
    editor = CaptionEditor(folder)
    editor.apply(editor.preview(writing_where_empty("zorb"), folder.images))
    assert written(folder) == CAPTIONS | {"c": "zorb"}


def test_tags_are_counted_by_captions():
    """A tag counts once for each caption; the most frequent come first."""
    assert count_tags(["b, a", "b,  b ,c", "", "d\nb"]) == [("b", 3), ("a", 1), ("c", 1), ("d", 1)]


@pytest.mark.parametrize(
    ("caption", "new", "changed"),
    [
        ("red, cat, big", "kitten", "red, kitten, big"),
        ("red, cat, big", "red", "red, big"),
        ("red, cat", "", "red"),
        ("cat", "", ""),
        ("catty,red", "kitten", "catty,red"),
        ("one, cat\ntwo", "kitten", "one, kitten\ntwo"),
    ],
)
def test_tag_is_renamed_or_removed(caption, new, changed):
    """Only whole tags change, none is doubled, and captions without the tag keep their spaces."""
    assert renaming_tag("cat", new)(caption) == changed


def test_tag_has_no_comma():
    with pytest.raises(DataError):
        renaming_tag("cat", "a, b")


# Folders and uploads


def test_browser_stays_in_the_workspace(tmp_path):
    """Neither a parent, nor a link that leads out, nor a hidden folder can be reached."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "photos").mkdir(parents=True)
    (inside / ".secret").mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    draw(inside / "a.png")
    workspace = Workspace(inside / "runs", (inside,))
    listing = list_subfolders(workspace, inside)
    assert listing.subfolders == [inside / "photos"] and listing.num_images == 1 and listing.parent is None
    assert list_subfolders(workspace, inside / "photos").parent == inside
    assert list_roots(workspace) == [inside]
    for place in (outside, inside / "link", inside / ".."):
        with pytest.raises(ConfigError):
            list_subfolders(workspace, place)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a.PNG", "a.png"),
        ("../../etc/a.png", "a.png"),
        ("C:\\photos\\a b.jpg", "a b.jpg"),
        (".hidden.png", "hidden.png"),
        ("_x.txt", "x.txt"),
        ("a:b*?.png", "a_b.png"),
        ("con.png", "con_.png"),
        ("图片 1.webp", "图片 1.webp"),
        ("e\u0301.png", "\u00e9.png"),
    ],
)
def test_upload_names_are_safe(name, safe):
    assert safe_name(name) == safe


@pytest.mark.parametrize("name", ["a.exe", "a", "...png", ".png", "a.png.html", "a.svg", ""])
def test_other_uploads_are_refused(tmp_path, name):
    """Only images and captions are written."""
    with pytest.raises(DataError):
        save_upload(tmp_path, name, b"x")
    assert list(tmp_path.iterdir()) == []


def test_upload_overwrites_nothing(tmp_path):
    """The same file again is no error; another of its name is refused, and the first stays."""
    path = save_upload(tmp_path / "new", "a.png", b"one")
    assert save_upload(tmp_path / "new", "A.png".lower(), b"one") == path
    with pytest.raises(DataError, match="exists"):
        save_upload(tmp_path / "new", "a.png", b"two")
    assert path.read_bytes() == b"one"


def test_upload_folder_is_in_the_workspace(tmp_path):
    workspace = Workspace(tmp_path / "runs", (tmp_path,))
    assert upload_folder(workspace, "../my cat") == tmp_path / "images" / "my cat"
    with pytest.raises(DataError):
        upload_folder(workspace, "../..")


# Frames and masks


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 300), (333, 335), (512, 512)])
def test_crop_is_that_of_the_training(size):
    """The rectangle is the part that `images.fit` keeps, measured on an image whose colours are its coordinates."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, x * 0], axis=-1).round().astype("uint8"))
    bucket = bucket_of(size, 256)
    assert bucket is not None
    part = crop_rectangle(size, bucket)
    seen = np.asarray(decoding.fit(image, bucket), dtype=float) / 255
    edges = (seen[:, 0, 0].mean(), seen[0, :, 1].mean(), seen[:, -1, 0].mean(), seen[-1, :, 1].mean())
    expected = (part.left, part.top, part.left + part.width, part.top + part.height)
    assert edges == pytest.approx(expected, abs=0.015)


def test_sizes_are_upright_and_current(tmp_path):
    """A photo that the camera has turned is as wide as it is shown; a file that is no image has no size."""
    path, sizes = tmp_path / "a.jpg", ImageSizes()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert sizes.get(path) == (40, 60)
    Image.new("RGB", (80, 40)).save(path)
    assert sizes.get(path) == (80, 40)
    path.write_text("no image")
    assert sizes.get(path) is None and sizes.get(tmp_path / "none.png") is None


def test_no_bucket_for_a_tiny_image():
    assert bucket_of((12, 400), 512) is None
    assert bucket_of((512, 512), 512) == Bucket(512, 512)


def test_masks_are_found_beside_the_images(tmp_path):
    for name in ("cat/masks", "cat_masks", "dog_masks", "cat/more"):
        (tmp_path / name).mkdir(parents=True)
    workspace = Workspace(tmp_path / "runs", (tmp_path,))
    assert mask_folders(workspace, tmp_path / "cat") == [tmp_path / "cat" / "masks", tmp_path / "cat_masks"]


@pytest.fixture
def masks(tmp_path: Path) -> TestClient:
    """The route of the masks of a workspace."""
    app = FastAPI()
    app.include_router(mask_router(Workspace(tmp_path / "in" / "runs", (tmp_path / "in",))))
    return TestClient(app)


def darkness(answer: Response) -> list[int]:
    """Return how dark the left and the right of an image become, of 255."""
    with Image.open(io.BytesIO(answer.content)) as image:
        alpha = image.convert("RGBA").getchannel("A")
        return [int(alpha.getpixel((x, 20))) for x in (2, alpha.width - 3)]  # type: ignore[arg-type]


@pytest.mark.parametrize("is_alpha", [False, True])
def test_mask_darkens_what_is_not_trained(masks, tmp_path, is_alpha):
    """The left half is masked out: dark there, and clear in the right half."""
    path = tmp_path / "in" / "mask.png"
    path.parent.mkdir()
    half = Image.new("L", (80, 80), 0)
    half.paste(255, (40, 0, 80, 80))
    picture = Image.merge("LA", (Image.new("L", (80, 80), 90), half)) if is_alpha else half
    picture.save(path)
    left, right = darkness(masks.get("/media/mask", params={"path": str(path), "alpha": is_alpha}))
    assert left > 150 and right == 0


def test_mask_outside_is_refused(masks, tmp_path):
    draw(tmp_path / "out.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.png").write_text("no image")
    for place in ("out.png", "in/../out.png", "in/text.png", "in/none.png"):
        assert masks.get("/media/mask", params={"path": str(tmp_path / place), "alpha": False}).status_code == 404


# Checks


def test_check_finds_problems_and_their_fix(folder, tmp_path):
    (folder.path / "broken.png").write_bytes(b"<html>")
    draw(folder.path / "a.jpg", seed=7)
    folder.read()
    check = FolderCheck(folder, index_file=tmp_path / "index" / "looks.json")
    check.run()
    fixes = {problem.fix: problem for problem in check.problems if problem.fix}
    moves = {tuple(path.name for path in problem.files) for problem in check.problems if problem.fix == "move"}
    assert moves == {("broken.png",), ("a.jpg", "a.png")}
    assert "no caption" in fixes["write"].text and "data.0" not in fixes["write"].text
    assert check.total > 0 and check.done == check.total


def test_check_finds_another_spelling(folder, tmp_path):
    check = FolderCheck(folder, trigger="zorb", index_file=tmp_path / "index" / "looks.json")
    check.run()
    assert {problem.fix for problem in check.problems} == {"write", "spell"}


def test_duplicates_are_paired(folder, tmp_path):
    """Equal files and images that were saved again are paired with the first."""
    (folder.path / "a2.png").write_bytes((folder.path / "a.png").read_bytes())
    with Image.open(folder.path / "b.png") as image:
        image.save(folder.path / "b2.jpg", quality=95, subsampling=0)
    folder.read()
    check = FolderCheck(folder, index_file=tmp_path / "index" / "looks.json")
    check.run()
    assert [(pair.earlier.name, pair.later.name, pair.is_equal) for pair in check.pairs] == [
        ("a.png", "a2.png", True),
        ("b.png", "b2.jpg", False),
    ]


def test_moved_image_can_be_moved_back(folder):
    """Nothing is deleted: the image and its caption go to a folder that is not trained, and return."""
    content = (folder.path / "a.png").read_bytes()
    move_away(folder.path, folder.path / "a.png")
    folder.read()
    assert "a.png" not in folder.images and not (folder.path / "a.txt").exists()
    moved = list_moved(folder.path)
    assert [image.name for image in moved] == ["a.png"]
    move_back(folder.path, moved[0].path)
    folder.read()
    assert folder.images["a.png"].caption == CAPTIONS["a"]
    assert (folder.path / "a.png").read_bytes() == content and list_moved(folder.path) == []


def test_shared_caption_stays_behind(folder):
    """Moving one of two images of a name leaves the caption to the other."""
    draw(folder.path / "a.jpg")
    move_away(folder.path, folder.path / "a.jpg")
    assert written(folder)["a"] == CAPTIONS["a"]


# Captioning


@pytest.fixture
def fake(monkeypatch):
    """The captioner is a program that prints the same events."""
    root = FAKE.parent.parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr(caption_job, "PROGRAM", [caption_job.sys.executable, str(FAKE)])


def finished(job: CaptionJob, seconds: float = 60) -> CaptionJob:
    job.start()
    return ended(job, seconds)


def ended(job: CaptionJob, seconds: float = 60) -> CaptionJob:
    end = time.monotonic() + seconds
    while job.is_running and time.monotonic() < end:
        time.sleep(0.02)
    assert not job.is_running
    return job


@pytest.mark.slow
def test_captioning_writes_what_is_missing(folder, fake):
    job = finished(CaptionJob(folder.path, CaptionWish("tiny", "tags", trigger="zorb")))
    assert (job.done, job.total, job.errors) == (1, 1, [])
    assert written(folder) == CAPTIONS | {"c": "zorb seen by tiny in tags"}
    assert job.lines[-1].startswith("1 captions written")


@pytest.mark.slow
def test_captioning_of_one_image(folder, fake):
    """A single image is captioned anew, and no other file of the folder is touched."""
    editor = CaptionEditor(folder)
    job = CaptionJob(
        folder.path,
        CaptionWish("tiny", replaces=True),
        folder.path / "a.png",
        lambda caption: editor.save("a.png", caption, CAPTIONS["a"]),
    )
    assert finished(job).errors == []
    assert written(folder) == CAPTIONS | {"a": "something seen by tiny in sentences"}
    assert editor.undo().changed == ["a.png"]


@pytest.mark.slow
def test_failed_captioning_says_why(folder, fake):
    job = finished(CaptionJob(folder.path, CaptionWish("missing")))
    assert job.errors == ["--model: missing: is no model; give another"]
    assert written(folder) == CAPTIONS


@pytest.mark.slow
def test_captioning_can_be_stopped(folder, fake):
    """A stop ends the process between two images, and keeps what it has written."""
    job = CaptionJob(folder.path, CaptionWish("slow", replaces=True))
    job.start()
    end = time.monotonic() + 60
    while job.done == 0 and time.monotonic() < end:
        time.sleep(0.02)
    job.stop()
    ended(job, 10)
    assert job.is_stopped and job.errors == [] and 0 < job.done < job.total
    assert written(folder)["c"] == ""


def test_wish_becomes_options():
    wish = CaptionWish("m", "tags", "style", "zorb", True)
    assert wish.arguments() == ["--model", "m", "--style", "tags", "--kind", "style", "--trigger", "zorb", "--force"]
    assert CaptionWish().arguments()[2:] == ["--style", "sentences"]
