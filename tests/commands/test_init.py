"""`init`: from a folder of images to a config that holds, with its reasons."""

import os
import re
import select
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands import init
from zimage_train.config import templates
from zimage_train.config.load import read_config
from zimage_train.config.templates import MODEL_TEMPLATES, SUBJECT_KINDS, TemplateValues
from zimage_train.dataset.scan import ImageRecord

from image_files import noise

ROOT = Path(__file__).parents[2]
CTRL_C, CTRL_D = "\x03", "\x04"


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["init", *map(str, words)])
    return (getattr(done.exception, "exit_code", 1) if done.exception else 0), done.output + str(done.exception or "")


def folder_of(path: Path, sizes: list[tuple[int, int]], captions: list[str]) -> Path:
    path.mkdir()
    for index, size in enumerate(sizes):
        noise(*size, seed=index).save(path / f"{index:02d}.png")
        if index < len(captions):
            (path / f"{index:02d}.txt").write_text(captions[index], encoding="utf-8")
    return path


def test_config_from_a_folder(tmp_path: Path, monkeypatch):
    """A config is written from what the folder holds, and it is valid."""
    monkeypatch.chdir(tmp_path)
    captions = ["rex on grass", "rex in snow", "rex, asleep"]
    folder_of(tmp_path / "my dog 2", [(1100, 800)] * 3 + [(600, 900)] * 3, captions)
    code, said = run("my dog 2", "--yes", "--variant", "deturbo", "--gpu", "4090")
    assert code == 0, said
    for line in (
        "my dog 2: 6 images; 3 of 6 have captions (sentences, 3 words each)",
        "sizes: as large as squares of 735 to 938 px, half of them 938 px or more",
        "shapes: 3 landscape, 3 portrait",
        "6 images are few for a character: 12 to 30 are usual",
        "3 images have no caption and get the trigger alone; `zimage-train caption 'my dog 2'` writes captions",
        "wrote my_dog_2_lora.yaml",
        "time on one 4090, for 1800 steps",
        "  zimage-train train my_dog_2_lora.yaml",
    ):
        assert line in said, (line, said)
    config = read_config(tmp_path / "my_dog_2_lora.yaml")
    entry, texts = config.data[0], [one.prompt for one in config.sample.prompts]
    assert (entry.folder, entry.trigger, entry.resolution) == ("my dog 2", "rex", [512, 768])
    assert (config.train.steps, config.model.variant, config.sample.compare_on) == (1800, "deturbo", "turbo")
    assert len(texts) == 7 and sum("rex" not in text for text in texts) == 2 and "rex on grass" in texts


def test_what_is_there_is_not_written_over(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("mine")
    assert f"{path}: exists; give another with -o or --name" in run(mini.IMAGES, "--yes", "-o", path)[1]
    assert path.read_text() == "mine"
    assert run(mini.IMAGES, "--yes", "-o", path, "--force")[0] == 0 and path.read_text() != "mine"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--kind", "dog"], 2, "--kind: is 'dog'; give one of character, style, product, concept"),
        (["--variant", "x"], 2, "--variant: is 'x'; give one of turbo, deturbo, base"),
        (["--trigger", " "], 2, "--trigger: is ' '; give the word itself"),
        (["--trigger", "a\nb"], 2, "--trigger: is 'a\\nb'"),
        (["--trigger", "[trigger]"], 2, "--trigger: is '[trigger]'"),
        (["--name", "../x"], 2, "--name: is '../x'; begin with a letter"),
        (["--miniature", "--variant", "base"], 2, "--variant: cannot be combined with --miniature"),
        (["--miniature", "--gpu", "4090"], 2, "--gpu: cannot be combined with --miniature"),
        (["--gpu", "voodoo"], 2, "--gpu: 'voodoo' is not known"),
    ],
)
def test_invalid_flags_are_refused(tmp_path: Path, words, code, said):
    """Invalid flags are refused before anything is written."""
    found, output = run(mini.IMAGES, "--yes", "-o", tmp_path / "x.yaml", *words)
    assert found == code and said in output and not (tmp_path / "x.yaml").exists()


def test_folders_without_images(tmp_path: Path):
    """Folders without images are data errors."""
    assert run(tmp_path / "gone", "--yes")[0] == 3
    assert "holds no images" in run(tmp_path, "--yes")[1]
    (tmp_path / "a.png").write_bytes(b"no image")
    code, said = run(tmp_path, "--yes")
    assert code == 3 and "a.png" in said


def test_damaged_image_is_named(tmp_path: Path):
    """A damaged image is named, and the config is written all the same."""
    folder = folder_of(tmp_path / "p", [(600, 600)] * 3, ["a", "b", "c"])
    (folder / "bad.png").write_bytes(b"no image")
    code, said = run(folder, "--yes", "-o", tmp_path / "x.yaml")
    assert code == 0 and "to fix: " in said and "bad.png" in said and (tmp_path / "x.yaml").exists()


@pytest.mark.slow
def test_from_empty_folder_to_an_image(tmp_path: Path, monkeypatch, shared_cache: Path):
    """Every step from an empty folder to a sampled image runs without a question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in mini.IMAGES.iterdir():
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    size = ["--dtype", "fp32", "--width", "64", "--height", "64"]
    lora = "runs/photos_lora/lora/photos_lora.safetensors"
    commands = [
        ["init", "photos", "--miniature", "--yes"],
        ["check", "photos_lora.yaml"],
        ["train", "photos_lora.yaml", "--set", "train.steps=3", "--set", f"cache.folder={shared_cache}"],
        ["sample", str(mini.TURBO), "--lora", lora, "--prompt", "a zchar", *size],
    ]
    for words in commands:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    with Image.open(tmp_path / "samples" / "sample-42.png") as image:
        assert image.size == (64, 64)


def images(*sizes: tuple[int, int]) -> list[ImageRecord]:
    return [ImageRecord(Path(f"{i}.png"), str(i), *size, ("a",)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "resolution"),
    [
        ([(1024, 1024)] * 3, (512, 768, 1024)),
        ([(1000, 1000)] * 3, (512, 768, 1024)),
        ([(900, 900)] * 3, (512, 768)),
        ([(1024, 1024), (600, 600)], (512, 768, 1024)),
        ([(1024, 1024), (600, 600), (600, 600)], (512,)),
        ([(300, 300)], (512,)),
    ],
)
def test_resolutions_half_the_images_fill(sizes, resolution):
    """The resolutions are those that half of the images fill."""
    seen = init.FolderSummary("p", images(*sizes), [], [], [])
    own = init.template_values_for(seen, init.Answers("style", "turbo", "z", None), "n", False)
    assert own.resolution == resolution


@pytest.mark.parametrize(
    ("captions", "trigger"),
    [
        (["zx1 in a park", "zx1, close-up", "zx1"], "zx1"),
        (["a dog", "a cat", "a bird"], None),
        (["rex in a park", "rex", "a dog"], None),
        (["rex", "rex"], None),
        ([], None),
    ],
)
def test_trigger_from_captions(captions: list[str], trigger: str | None):
    """The word that captions begin with is taken for the trigger."""
    assert init.likely_trigger(captions) == trigger


def test_tags_are_told_from_sentences():
    assert init.are_tags(["1girl, red hair, smile, park", "1girl, solo, from behind, night sky"])
    assert not init.are_tags(["A girl with red hair, smiling, sits in a park and looks at the camera with a book."])
    assert not init.are_tags(["a red zorb", "a blue zorb"])


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=30)
words = text.filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(
    text,
    words.map(str.strip),
    st.lists(words, max_size=2),
    st.sampled_from([*SUBJECT_KINDS]),
    st.sampled_from([*MODEL_TEMPLATES]),
)
def test_any_text_reads_back(tmp_path_factory, folder, trigger, captions, kind, base):
    """Any folder, trigger and caption are read back from the config unchanged."""
    own = TemplateValues(folder=folder, name="n", trigger=trigger, captions=tuple(captions))
    path = tmp_path_factory.mktemp("init") / "x.yaml"
    path.write_text(templates.render_template(base, kind, own), encoding="utf-8")
    config = read_config(path)
    assert (config.data[0].folder, config.data[0].trigger) == (folder, trigger)
    assert [one.prompt for one in config.sample.prompts][3:-2] == captions
    assert all(trigger in one.prompt for one in config.sample.prompts[:3])


@pytest.mark.parametrize(
    ("name", "output", "expected"),
    [
        ("photos", None, "photos_lora"),
        ("My Dog (2024)", None, "My_Dog_2024_lora"),
        ("me2", None, "me2_lora"),
        ("???", None, "my_lora"),
        ("10_zchar person", None, "zchar_person_lora"),
        ("photos", Path("x/me 2.yaml"), "me_2"),
        ("photos", Path("me-2.yaml"), "me_2"),
    ],
)
def test_name_from_config_or_folder(tmp_path: Path, name: str, output: Path | None, expected: str):
    """The run's name comes from the config's file name, or from the folder."""
    assert init.name_of(tmp_path / name, output) == expected
    assert init.answer_error("--name", expected) is None


def test_unwritable_output_is_said_first(tmp_path: Path, monkeypatch):
    """An output that cannot be written is refused before any image is read."""
    monkeypatch.setattr(init, "summarize_folder", None)
    (tmp_path / "file").write_text("")
    for output, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "x.yaml", "is not a folder"),
        ("", "is a fol"),
    ):
        code, text = run(mini.IMAGES, "--yes", "-o", output)
        assert code == 2 and said in text and "Traceback" not in text, text


def test_placeholders_are_the_trigger(tmp_path: Path):
    """Placeholders in captions stand for the chosen trigger."""
    folder = folder_of(tmp_path / "p", [(600, 600)] * 3, ["a [trigger] at sea"] * 3)
    code, said = run(folder, "--yes", "-o", tmp_path / "x.yaml", "--trigger", "rex")
    assert code == 0 and "3 of 3 have captions" in said and "to fix" not in said
    assert "a rex at sea" in (tmp_path / "x.yaml").read_text()


def test_masks_in_a_subfolder_are_masks(tmp_path: Path):
    folder = folder_of(tmp_path / "p", [(600, 600)] * 3, ["a", "b", "c"])
    folder_of(folder / "Masks", [(600, 600)] * 2, [])
    code, said = run(folder, "--yes", "-o", tmp_path / "x.yaml")
    assert code == 0 and "p: 3 images" in said and f"2 have masks, in {folder / 'Masks'}" in said
    assert read_config(tmp_path / "x.yaml").data[0].mask == str(folder / "Masks")


def test_masks_are_noticed(tmp_path: Path):
    """Masks beside the images are noticed."""
    folder = folder_of(tmp_path / "p", [(600, 600)] * 2, ["a", "b"])
    noise(600, 600, seed=9).save(folder / "00_mask.png")
    said = run(folder, "--yes", "-o", tmp_path / "x.yaml")[1]
    assert "1 images look like masks and are trained as images (00_mask.png)" in said


def test_kohya_folders(tmp_path: Path):
    """Folders named the kohya way give the repeats and the trigger."""
    (tmp_path / "p").mkdir()
    folder_of(tmp_path / "p" / "10_ohwx man", [(600, 600)] * 2, [])
    folder_of(tmp_path / "p" / "2_ohwx man far", [(700, 600)] * 2, [])
    code, said = run(tmp_path / "p", "--yes", "-o", tmp_path / "x.yaml")
    entry = read_config(tmp_path / "x.yaml").data[0]
    assert code == 0 and "zimage-train caption" not in said
    assert (entry.repeats, entry.trigger) == ("by_folder", "ohwx")


def test_duplicates_are_summarized(tmp_path: Path):
    """Of a folder of duplicates only the first few are listed."""
    folder = folder_of(tmp_path / "p", [(600, 600)], ["a"])
    for index in range(9):
        (folder / f"same{index}.png").write_bytes((folder / "00.png").read_bytes())
    said = run(folder, "--yes", "-o", tmp_path / "x.yaml")[1]
    assert said.count("the same image as") == 6 and "note: and 3 more, which check lists" in said


def test_unusable_images_named_at_once(tmp_path: Path):
    """All images that cannot be used are named at once."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    code, said = run(tmp_path, "--yes")
    assert code == 3 and "a.png" in said and "b.png" in said


def terminal(words: list[str], typed: list[str], folder: Path) -> tuple[int, str]:
    """Run the command on a terminal of its own, and type the next of `typed` at each question."""
    pty = pytest.importorskip("pty")
    child, screen = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored in whatever runs in the background
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "zimage_train", *words])
    seen, left, last, silent = "", list(typed), "", 0
    while True:
        if not select.select([screen], [], [], 5)[0]:
            silent += 1
            if silent > 12:
                os.kill(child, signal.SIGKILL)
            elif last in (CTRL_C, CTRL_D):  # a key just before Python waits is heard only at the next key
                os.write(screen, last.encode())
            continue
        try:
            seen += os.read(screen, 4096).decode(errors="replace")
        except OSError:  # the child has closed it
            break
        if left and re.search(r"\]: $", seen.replace("\x1b[?25h", "")):
            last = left.pop(0)
            os.write(screen, last.encode())
            seen += "<typed>"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen


@pytest.mark.slow
def test_questions_are_repeated(tmp_path: Path):
    """Questions are asked again until they are answered."""
    words = ["init", str(mini.IMAGES), "-o", "x.yaml"]
    typed = ["dog\n", "style\n", "deturbo\n", "[trigger]\n", "rex\n", "4090\n"]
    code, seen = terminal(words, typed, tmp_path)
    assert code == 0, seen
    assert "'dog' is not one of character" in seen and "give the word itself" in seen
    config = read_config(tmp_path / "x.yaml")
    assert (config.model.variant, config.data[0].trigger, config.name) == ("deturbo", "rex", "x")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [CTRL_C, CTRL_D])
def test_question_interrupted(tmp_path: Path, sign: str):
    """Interrupting a question ends the command."""
    code, seen = terminal(["init", str(mini.IMAGES), "-o", "x.yaml", "--miniature"], ["\n", sign], tmp_path)
    assert code == 130 and "stopped" in seen and list(tmp_path.iterdir()) == []
