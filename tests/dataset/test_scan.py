"""A folder, or a metadata file, is a list of images with prompts in a fixed order; everything odd is said, at once."""

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset.scan import FolderScan, dataset_fingerprint, scan_entry
from zimage_train.dataset.sources import IMAGE_COLUMNS
from zimage_train.errors import Note

from dataset_folder import image, problems, prompts, scanned


def test_images_in_path_order(photos: Path):
    """Images come in the order of their relative paths, with their captions."""
    result = scanned(photos)
    assert [one.path.relative_to(photos).as_posix() for one in result.images] == ["a.jpg", "b.png", "sub/c.webp"]
    assert prompts(result) == {"a.jpg": "caption a", "b.png": "caption b", "c.webp": "caption c"}
    assert [(one.width, one.height) for one in result.images] == [(96, 64), (80, 64), (112, 64)]
    digests = [hashlib.sha256(one.path.read_bytes()).hexdigest() for one in result.images]
    assert [one.digest for one in result.images] == digests
    assert (problems(result), result.notes) == ([], [])


def test_size_is_that_of_upright_image(tmp_path: Path):
    """The size of an image is that of the upright image."""
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (128, 64)).save(tmp_path / "a.jpg", exif=exif)
    (one,) = scanned(tmp_path).images
    assert (one.width, one.height) == (64, 128)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.jpeg", "a.png", "a.PNG", "a.webp", "a.bmp", "a.tif", "a.tiff"])
def test_extensions_in_either_case(tmp_path: Path, name: str):
    """Every file extension is found in upper and lower case."""
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(Path(name).suffix.lower())
    Image.new("RGB", (64, 64)).save(tmp_path / name, kind)
    assert [one.path.name for one in scanned(tmp_path).images] == [name]


def test_another_caption_extension(photos: Path):
    (photos / "a.caption").write_text("other")
    assert prompts(scanned(photos, caption_ext=".caption"))["a.jpg"] == "other"
    assert prompts(scanned(photos, caption_ext=".caption"))["b.png"] == ""


def test_dot_in_a_name(tmp_path: Path):
    """A dot in a file name belongs to the name."""
    image(tmp_path / "v1.2.png")
    (tmp_path / "v1.2.txt").write_text("two")
    (tmp_path / "v1.txt").write_text("one")
    result = scanned(tmp_path)
    assert prompts(result) == {"v1.2.png": "two"}
    assert result.notes == [Note("unused-caption", f"{tmp_path / 'v1.txt'}: a caption without an image")]


# Prompts


def test_trigger_as_default_caption(tmp_path: Path):
    """Without any captions, the trigger can be the default caption."""
    for number in range(3):
        image(tmp_path / f"{number}.png", (number, 0, 0))
    result = scanned(tmp_path, trigger="zorb", default_caption="[trigger]")
    assert list(prompts(result).values()) == ["zorb"] * 3
    assert (problems(result), result.notes) == ([], [])


def test_placeholder_without_a_trigger(photos: Path):
    """A placeholder without a trigger is an error."""
    (photos / "b.txt").write_text("a [trigger]")
    assert problems(scanned(photos)) == [
        f"{photos / 'b.png'}: its caption has [trigger], but no trigger is set; set data.0.trigger"
    ]
    assert prompts(scanned(photos, trigger="zorb"))["b.png"] == "a zorb"
    assert len(problems(scanned(photos, default_caption="[trigger]"))) == 1


# What is wrong, all at once


def test_the_same_image_twice_is_said(photos: Path):
    (photos / "z.jpg").write_bytes((photos / "a.jpg").read_bytes())
    result = scanned(photos, default_caption="x")
    assert len(result.images) == 4
    assert result.notes == [Note("same-image", f"{photos / 'z.jpg'}: the same image as {photos / 'a.jpg'}")]


def test_a_folder_that_is_none_is_an_error(photos: Path):
    assert problems(scanned(photos / "none")) == [
        f"{photos / 'none'}: does not exist; check the path, which is relative to where the command runs"
    ]
    assert "is a file, not a folder" in problems(scanned(photos / "a.jpg"))[0]


def test_a_name_that_is_no_text_is_an_error(tmp_path: Path):
    image(tmp_path / "fine.png")
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb") as file:
        file.write((tmp_path / "fine.png").read_bytes())
    result = scanned(tmp_path)
    assert [one.path.name for one in result.images] == ["fine.png"]
    assert problems(result)[0].endswith("its name is not UTF-8; rename it")
    for note in scanned(tmp_path, caption_ext=".png").notes:
        note.text.encode()


# Metadata files


def metadata(root: Path, name: str, rows: list[dict[str, Any]] | str | bytes) -> FolderScan:
    path = root / name
    if isinstance(rows, list) and name.lower().endswith(".csv"):
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        rows = buffer.getvalue()
    elif isinstance(rows, list):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
    return scan_entry(DataEntry.model_validate({"metadata": str(path), "trigger": "zorb"}), "data.0")


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "M.JSONL", "M.CSV"])
@pytest.mark.parametrize(("image", "prompt"), [("image", "prompt"), ("file_name", "text"), ("image_path", "caption")])
def test_metadata_dialects(photos: Path, name: str, image: str, prompt: str):
    """Metadata names images and prompts in either dialect."""
    rows = [{image: "sub/c.webp", prompt: "a zorb\r\nhere"}, {image: "a.jpg", prompt: "[trigger], \u2028 x"}]
    result = metadata(photos, name, rows)
    assert [(one.path.name, one.prompts[0]) for one in result.images] == [
        ("c.webp", "a zorb\nhere"),
        ("a.jpg", "zorb, \u2028 x"),
    ]
    assert (problems(result), result.notes) == ([], [])


def test_images_elsewhere_are_noted(photos: Path):
    """A metadata file that names images outside of its folder is read, and check says how many there are."""
    (photos / "lists").mkdir()
    rows = [{"image": "../b.png"}, {"image": str(photos / "a.jpg")}, {"image": "../lists/../b.png"}]
    (photos / "lists" / "m.jsonl").write_text("".join(json.dumps(row | {"prompt": "x"}) + "\n" for row in rows))
    entry = DataEntry.model_validate({"metadata": str(photos / "lists" / "m.jsonl"), "trigger": "zorb"})
    notes = [note.text for note in scan_entry(entry, "data.0").notes if note.code == "images-elsewhere"]
    assert len(notes) == 1 and "names 3 images outside of its folder" in notes[0]
    inside = metadata(photos, "m.jsonl", [{"image": "b.png", "prompt": "x"}, {"image": "./a.jpg"}])
    assert "images-elsewhere" not in [note.code for note in inside.notes]


def test_metadata_keeps_row_order(photos: Path):
    """The order is that of the rows, and caption files are not read."""
    result = metadata(photos, "m.jsonl", [{"image": "b.png"}, {"image": "a.jpg", "prompt": ""}])
    assert [(one.path.name, one.prompts[0]) for one in result.images] == [("b.png", "zorb"), ("a.jpg", "zorb")]


def test_metadata_byte_order_mark(photos: Path):
    """Metadata may have a byte order mark, blank lines and Windows line ends."""
    text = '\ufeff{"image": "a.jpg", "prompt": "zorb 1"}\r\n\r\n  \r\n{"image": "b.png", "prompt": "zorb 2"}\r\n'
    assert prompts(metadata(photos, "m.jsonl", text)) == {"a.jpg": "zorb 1", "b.png": "zorb 2"}
    text = '\ufefffile_name,text\r\na.jpg,"zorb, ""one"""\r\nb.png,"zorb\ntwo"\r\n'
    assert prompts(metadata(photos, "m.csv", text)) == {"a.jpg": 'zorb, "one"', "b.png": "zorb\ntwo"}


def test_metadata_raw_separators(photos: Path):
    """Unicode line separators inside a line do not end it."""
    text = '{"image": "a.jpg", "prompt": "zorb\u2028\u0085\x0b?"}\n'.replace("\x0b", "\\u000b")
    assert prompts(metadata(photos, "m.jsonl", text)) == {"a.jpg": "zorb\u2028\u0085\x0b?"}


def test_metadata_bad_rows(photos: Path):
    """Every bad row is reported with its line, and the good rows are read."""
    rows = [
        '{"image": "a.jpg", "prompt": "zorb"}',
        '{"image": "a.jpg", "prompt": ',
        '["a.jpg"]',
        '{"picture": "a.jpg", "prompt": "x"}',
        '{"image": 5, "prompt": "x"}',
        '{"image": "a.jpg", "prompt": 5}',
        '{"image": "none.png", "prompt": "x"}',
        '{"image": "a\\u0000.png", "prompt": "x"}',
        '{"image": "a.jpg", "prompt": "\\ud800"}',
        "[" * 100_000,
        '{"image": "", "prompt": "x"}',
        '{"image": "sub", "prompt": "x"}',
        '{"image": "b.png", "prompt": "zorb", "more": 1' + "1" * 5000 + "}",
    ]
    result = metadata(photos, "m.jsonl", "\n".join(rows))
    assert [one.path.name for one in result.images] == ["a.jpg"]
    path = photos / "m.jsonl"
    by_line = {one.split(": ")[0]: one for one in problems(result)}
    assert set(by_line) == {f"{path}:{line}" for line in (2, 3, 4, 5, 6, 8, 9, 10, 11, 13)} | {
        str(photos / "none.png"),
        str(photos / "sub"),
    }
    assert "is not JSON (Expecting value" in by_line[f"{path}:2"]
    assert by_line[f"{path}:4"].endswith(
        "has no text in image or file_name or image_path; its columns are picture, prompt; give image as text"
    )
    assert by_line[f"{path}:6"].endswith(
        "has no text in prompt or text or caption; its columns are image, prompt; give prompt as text"
    )
    assert "holds a character that no text has" in by_line[f"{path}:8"]
    assert by_line[str(photos / "none.png")].endswith("does not exist; check the name")


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_metadata_without_prompts(photos: Path, name: str):
    """Metadata without any prompts is refused.

    Otherwise captions in a column of another name would be ignored, and the run would train on the trigger alone.
    """
    rows = [{"image": "a.jpg", "words": "a car"}]
    (found,) = problems(metadata(photos, name, "image,words\na.jpg,a car\n" if name == "m.csv" else rows))
    assert "has no column prompt, text, caption; its columns are image, words" in found


def test_metadata_bad_csv_rows(photos: Path):
    """Bad CSV rows are reported with their line."""
    result = metadata(photos, "m.csv", "image,prompt\na.jpg,zorb\n,x\nb.png\nsub/c.webp,zorb,and more\n")
    assert prompts(result) == {"a.jpg": "zorb", "b.png": "zorb"}
    assert [one.split(": ")[0] for one in problems(result)] == [f"{photos / 'm.csv'}:{line}" for line in (3, 5)]
    assert "has 3 columns where the header has 2; put texts that hold a comma in" in problems(result)[1]
    (found,) = problems(metadata(photos, "n.csv", "image;prompt\na.jpg;zorb\n"))
    assert "is separated by ';'; separate its columns by commas" in found
    found = problems(metadata(photos, "o.csv", "image,prompt\na.jpg,zorb\nb.png," + "x" * 200_000 + "\n"))
    assert len(found) == 1 and found[0].startswith(f"{photos / 'o.csv'}:3: is not CSV (field larger than field limit")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("m.txt", "image,prompt\n", "is neither .jsonl nor .csv; convert it"),
        ("m.json", "[]", "is neither .jsonl nor .csv; convert it"),
        ("m.csv", "é".encode("latin-1"), "is not UTF-8; save it as UTF-8"),
        ("m.jsonl", "", "holds no images"),
        ("m.csv", "image,prompt\n", "holds no images"),
    ],
)
def test_other_metadata_files_are_refused(photos: Path, name: str, content: str | bytes, what: str):
    (found,) = problems(metadata(photos, name, content))
    assert what in found and str(photos / name) in found


def test_missing_metadata_is_refused(tmp_path: Path):
    for path, what in ((tmp_path / "m.csv", "does not exist; check data.metadata"), (tmp_path, "cannot be read")):
        result = scan_entry(DataEntry.model_validate({"metadata": str(path)}), "data.0")
        assert problems(result)[0].startswith(f"{path}: {what}")


# The fingerprint


def test_fingerprint_follows_the_content(photos: Path, tmp_path: Path):
    """The fingerprint changes with every content and prompt, and not with the place."""
    before = dataset_fingerprint([scanned(photos).images])
    assert len(before) == 3
    photos.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    assert dataset_fingerprint([scanned(moved).images]) == before
    (moved / "a.txt").write_text("changed")
    changed = dataset_fingerprint([scanned(moved).images])
    assert changed.keys() == before.keys() and sum(changed[key] != before[key] for key in before) == 1
    image(moved / "b.png", (99, 0, 0))
    assert len(dataset_fingerprint([scanned(moved).images]).keys() - before.keys()) == 1
    assert dataset_fingerprint([[], scanned(moved).images]).keys().isdisjoint(changed)


def test_fingerprint_of_equal_images(photos: Path):
    """The fingerprint counts the same image in two subfolders."""
    (photos / "sub" / "a.jpg").write_bytes((photos / "a.jpg").read_bytes())
    (photos / "sub" / "a.txt").write_text("one")
    before = dataset_fingerprint([scanned(photos).images])
    assert len(before) == 4
    for name in ("a.txt", "sub/a.txt"):
        text = (photos / name).read_text()
        (photos / name).write_text("two")
        assert dataset_fingerprint([scanned(photos).images]) != before
        (photos / name).write_text(text)


def test_nothing_is_written_while_scanning(photos: Path):
    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in photos.rglob("*")}

    before = state()
    scanned(photos)
    assert state() == before
    assert IMAGE_COLUMNS == ("image", "file_name", "image_path")


# Folders of kohya's layout, several captions


def test_kohya_folder_names(tmp_path: Path):
    """The names of kohya's folders give the repeats and the caption."""
    image(tmp_path / "3_a cat" / "one.png", (1, 2, 3))
    image(tmp_path / "12_dog" / "sub" / "two.png", (4, 5, 6)).with_suffix(".txt").write_text("a dog in snow")
    result = scanned(tmp_path, repeats="by_folder", trigger="zorb")
    assert problems(result) == []
    assert [(one.path.name, one.repeats, one.prompts) for one in result.images] == [
        ("two.png", 12, ("zorb a dog in snow",)),
        ("one.png", 3, ("zorb a cat",)),
    ]


def test_kohya_image_outside_folders(tmp_path: Path):
    """An image outside kohya's folders is refused."""
    for place in ("one.png", "0_none/two.png", "2000_many/three.png", "cat_3/four.png"):
        image(tmp_path / place, (len(place), 2, 3))
    found = problems(scanned(tmp_path, repeats="by_folder"))
    assert len(found) == 4 and all("is in no folder whose name says how often" in one for one in found)


def test_kohya_folders_are_pointed_out(tmp_path: Path):
    """Kohya's folders are pointed out where their repeats are not used."""
    image(tmp_path / "3_cat" / "one.png")
    result = scanned(tmp_path)
    assert "kohya-folders" in {note.code for note in result.notes}
    assert [one.repeats for one in result.images] == [1]
    image(tmp_path / "two.png", (9, 9, 9))
    assert "kohya-folders" not in {note.code for note in scanned(tmp_path).notes}


def test_jsonl_list_of_captions(tmp_path: Path):
    """A list in a JSONL row is several captions."""
    path = image(tmp_path / "one.png")
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": path.name, "prompt": ["a cat", " a dog ", "a cat"]}))
    result = scan_entry(DataEntry(metadata=str(tmp_path / "m.jsonl"), trigger="zorb"), "data.0")
    assert [one.prompts for one in result.images] == [("zorb a cat", "zorb a dog")]
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": path.name, "prompt": ["a cat", 5]}))
    assert "give prompt as text" in problems(scan_entry(DataEntry(metadata=str(tmp_path / "m.jsonl")), "data.0"))[0]


def test_fingerprint_of_captions_and_masks(tmp_path: Path):
    """Other captions or another mask make another dataset."""
    path = image(tmp_path / "one.png")
    path.with_suffix(".txt").write_text("one\ntwo")
    prints = [dataset_fingerprint([scanned(tmp_path, **settings).images]) for settings in ({}, {"caption_lines": True})]
    assert prints[0] != prints[1]
    masked = []
    for grey in (0, 255):
        image(tmp_path / "_masks" / "one.png", (grey, 1, 1))
        masked.append(dataset_fingerprint([scanned(tmp_path, mask=str(tmp_path / "_masks")).images]))
    assert masked[0] != masked[1] and prints[0] not in masked


def test_fingerprint_of_repeats(tmp_path: Path):
    """Another number in a folder's name makes another dataset."""
    prints = []
    for number in (10, 20):
        image(tmp_path / str(number) / f"{number}_cat" / "one.png")
        prints.append(dataset_fingerprint([scanned(tmp_path / str(number), repeats="by_folder").images]))
    assert prints[0] != prints[1]


def test_masks_inside_the_folder(tmp_path: Path):
    """Masks inside the image folder are not taken for images."""
    image(tmp_path / "a.png")
    image(tmp_path / "masks" / "a.png", (5, 5, 5))
    result = scanned(tmp_path, mask=str(tmp_path / "masks"))
    assert [one.path.name for one in result.images] == ["a.png"] and result.images[0].mask is not None
    assert len(scanned(tmp_path).images) == 2


def test_placeholder_in_class_images(tmp_path: Path):
    """A placeholder in captions of class images is refused, with the remedy."""
    image(tmp_path / "a.png").with_suffix(".txt").write_text("a [trigger] in snow")
    (said,) = problems(scanned(tmp_path, regularization=True))
    assert said.endswith("take it out: these images show the class")


@pytest.mark.parametrize("image", [r"C:\new\a.png", r"x\tom.png", r"C:\Users\a.png", r"x\zorb.png"])
def test_backslashes_in_a_jsonl(tmp_path: Path, image: str):
    """A Windows path whose backslashes are not doubled is named with its line and what to write."""
    (tmp_path / "t.jsonl").write_text(f'\n{{"image": "{image}", "prompt": "x"}}\n')
    (error,) = scan_entry(DataEntry(metadata=str(tmp_path / "t.jsonl")), "data.0").errors
    assert str(error).startswith(f"{tmp_path / 't.jsonl'}:2: ")
    assert str(error).endswith("a backslash in JSON begins an escape: write / or two backslashes for each in a path")
