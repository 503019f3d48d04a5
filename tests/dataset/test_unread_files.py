"""Files that look like captions and are not read are named once for each kind, with what to set."""

from pathlib import Path

import pytest

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset.scan import scan_entry

from dataset_folder import image


def notes_of(folder: Path, **settings) -> list[tuple[str, str]]:
    settings = {"default_caption": "a thing", **settings}
    scan = scan_entry(DataEntry.model_validate({"folder": str(folder), **settings}), "data.0")
    assert not scan.errors
    return [(note.code, note.text.replace(str(folder), "F")) for note in scan.notes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        image(tmp_path / f"{name}.png", (90 * number, 7, 200))
    return tmp_path


@pytest.mark.parametrize("extension", [".caption", ".Caption", ".tags.txt", ".prompt", ".TAGS", ".png.txt"])
def test_captions_of_other_tools(folder: Path, extension: str):
    """Captions with another extension are counted, with the setting that reads them, which then does."""
    for name in "ab":
        (folder / f"{name}{extension}").write_text(f"caption {name}")
    said = f"F: 2 files, such as a{extension}: not read, though it looks like captions; to use them, set caption_ext: "
    assert ("unread-captions", said + extension) in notes_of(folder)
    scan = scan_entry(DataEntry(folder=str(folder), caption_ext=extension), "data.0")
    assert [image.raw_captions for image in scan.images] == [("caption a",), ("caption b",), ()]


def test_txt_beside_another_extension(folder: Path):
    """With another caption_ext, .txt files beside the images are named."""
    (folder / "a.txt").write_text("a")
    said = "F/a.txt: not read, though it looks like captions; to use them, set caption_ext: .txt"
    assert notes_of(folder, caption_ext=".caption") == [("unread-captions", said)]
    assert notes_of(folder) == []


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "sub/captions.JSONL"])
def test_tables_in_a_folder(folder: Path, name: str):
    """A table of captions is named, with the setting that reads it."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    text = "a folder does not read tables of captions; if captions are in there, set metadata to it in place of folder"
    assert notes_of(folder) == [("unread-captions", f"F/{name}: {text}")]


def test_json(folder: Path):
    """JSON beside images, and JSON for all of them, are named."""
    for name in ("a.json", "b.png.json", "meta_cap.json"):
        (folder / name).write_text("{}")
    beside, alone = notes_of(folder)
    assert beside[1].startswith("F: 2 files, such as a.json: JSON beside images is not read; if captions are in there")
    assert alone[1].startswith("F/meta_cap.json: JSON is not read; if captions are in there, write a .jsonl")
    assert beside[0] == alone[0] == "unread-captions"


def test_many_captions_without_images(folder: Path):
    """Captions without an image, and captions in another case, are counted and not listed one by one."""
    for number in range(20):
        (folder / f"gone{number:02}.txt").write_text("x")
    for name in "ab":
        (folder / f"{name}.TXT").write_text("x")
    assert notes_of(folder) == [
        ("unused-caption", "F: 20 files, such as gone00.txt: captions without an image of that name"),
        ("unused-caption", "F: 2 files, such as a.TXT: not read, its extension is not exactly .txt"),
    ]


def test_other_files_are_silent(folder: Path):
    """Files that are no captions are not mentioned."""
    for name in ("readme.md", "notes.tags", "a.npz", ".caption", "thumbs.db"):
        (folder / name).write_text("x")
    assert notes_of(folder) == []


def test_trigger_in_another_case(folder: Path):
    """Captions whose case of the trigger is changed are counted, with an example."""
    for name, text in (("a", "Zorb in snow"), ("b", "a zorb, zorblike"), ("c", "[TRIGGER]")):
        (folder / f"{name}.txt").write_text(text)
    text = "1 of 3 captions write the trigger in another case ('Zorb': a.png), and are trained with 'zorb'"
    assert notes_of(folder, trigger="zorb") == [("trigger-case", f"data.0: {text}")]


def test_table_without_prompts(folder: Path):
    """A table that has no captions, beside images that have, says that only a folder reads these."""
    (folder / "t.jsonl").write_text('{"image": "a.png", "prompt": ""}\n{"image": "b.png", "prompt": "b"}\n')
    (folder / "a.txt").write_text("a")
    (note,) = scan_entry(DataEntry(metadata=str(folder / "t.jsonl")), "data.0").notes
    assert (
        note.code == "no-caption" and "; 1 have a .txt beside them, which only an entry with folder reads" in note.text
    )


@pytest.mark.parametrize("extension", [".json", ".JSONL", ".toml", ".csv"])
def test_files_whose_lines_are_no_prompts(tmp_path: Path, extension: str):
    """A file of another form is not read as a prompt per line."""
    path = tmp_path / f"p{extension}"
    path.write_text('{"prompt": "a cat"}\n')
    (error,) = scan_entry(DataEntry(prompts=str(path)), "data.0").errors
    assert f"{path}: is a {extension.lower()}, whose lines are no prompts" in str(error)


def test_flags_in_a_file_of_prompts(tmp_path: Path):
    """Flags in `data.N.prompts`, which knows none, are refused with their lines."""
    (tmp_path / "p.txt").write_text("a cat\na dog --w 512\n\na cow -s 8\n[Name]\n")
    scan = scan_entry(DataEntry(prompts=str(tmp_path / "p.txt")), "data.0")
    (problems,) = (error.problems for error in scan.errors)
    assert [str(problem).split("; ")[0].replace(str(tmp_path), "") for problem in problems] == [
        "/p.txt:2: has --w 512, which would be words of the prompt",
        "/p.txt:4: has -s 8, which would be words of the prompt",
    ]
    (tmp_path / "p.txt").write_text("a cat\na [Name]\n")
    (error,) = scan_entry(DataEntry(prompts=str(tmp_path / "p.txt")), "data.0").errors
    assert str(error).startswith(
        f"{tmp_path}/p.txt:2: its caption has [Name], but no trigger is set; set data.0.trigger"
    )
