"""Dataset files of sd-scripts and musubi-tuner: every key is mapped, noted or refused, with its line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_train.cli.app import app
from zimage_train.compat import dataset_toml
from zimage_train.compat.dataset_toml import KOHYA_DATASET, KOHYA_SUBSET, MUSUBI_KEYS
from zimage_train.compat.formats import read_job_as_config
from zimage_train.config.dataset import DataEntry
from zimage_train.config.load import read_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError

MUSUBI = """\
[general]
resolution = [960, 544]
caption_extension = ".txt"
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
image_directory = "photos"
num_repeats = 3
batch_size = 2

[[datasets]]
image_jsonl_file = "more.jsonl"
resolution = 768
"""
KOHYA = """\
[general]
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.1

[[datasets]]
resolution = 512
batch_size = 4
enable_bucket = true
bucket_no_upscale = true

  [[datasets.subsets]]
  image_dir = 'a/10_zorb'
  class_tokens = "zorb"
  num_repeats = 10
  flip_aug = true

  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  caption_extension = ".txt"
  keep_tokens = 2

[[datasets]]
resolution = [1024, 1024]
enable_bucket = true
bucket_no_upscale = true
[[datasets.subsets]]
image_dir = "a"
shuffle_caption = false
alpha_mask = true
caption_tag_dropout_rate = 0.2
"""


def converted(tmp_path: Path, text: str, name: str = "data.toml") -> tuple[Config, list[str]]:
    path = tmp_path / name
    path.write_text(text)
    found = read_job_as_config(path)
    assert read_config(path) == found.config, "train reads the file as import does"
    return found.config, found.notes


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "data.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_job_as_config(path)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_musubi_file(tmp_path: Path):
    """A dataset's own values come before the general ones; a pair becomes the side of equal area."""
    config, notes = converted(tmp_path, MUSUBI)
    assert config.name == "data"
    assert config.data == [
        DataEntry(folder="photos", resolution=[720], repeats=3, batch_size=2, caption_dropout=0.0),
        DataEntry(metadata="more.jsonl", resolution=[768], caption_dropout=0.0),
    ]
    assert any("[960, 544] became 720" in note for note in notes) and not any("bucket" in note for note in notes)


def test_kohya_file(tmp_path: Path):
    """Subset before dataset before general, and the defaults of sd-scripts where nothing is set."""
    config, notes = converted(tmp_path, KOHYA)
    common = {"caption_dropout": 0.1, "keep_tags": 1}
    assert config.data == [
        DataEntry(
            folder="a/10_zorb", resolution=[512], batch_size=4, repeats=10, default_caption="zorb", flip=True,
            shuffle_tags=True, caption_ext=".caption", **common,
        ),
        DataEntry(
            folder="reg", resolution=[512], batch_size=4, regularization=True, shuffle_tags=True, caption_ext=".txt",
            caption_dropout=0.1, keep_tags=2,
        ),
        DataEntry(folder="a", resolution=[1024], mask="alpha", tag_dropout=0.2, caption_ext=".caption", **common),
    ]  # fmt: skip
    assert any("flip_aug" in note for note in notes) and any("is_reg" in note for note in notes)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"photos"', '"photos', r"data.toml:8: is not valid TOML"),
        ("num_repeats = 3", "num_repeats = 3\nnum_repeats = 4", "data.toml:10: sets a key that is set above already"),
        ("num_repeats = 3", "num_repeat = 3", "data.toml:9: datasets.0.num_repeat: is no key of this section"),
        ("num_repeats = 3", 'num_repeats = "3"', "data.toml:9: datasets.0.num_repeats: is '3'; give a whole number"),
        ("num_repeats = 3", "num_repeats = true", "data.toml:9: datasets.0.num_repeats: is True"),
        ("num_repeats = 3", "num_repeats = 0", "data.toml:9: datasets.0.num_repeats: "),
        ("image_directory", "video_directory", "data.toml:8: datasets.0.video_directory: is for videos"),
        ("image_directory", "control_directory", "is for editing models"),
        ('image_directory = "photos"', "", "data.toml:7: datasets.0: names no images"),
        ("resolution = 768", "resolution = [1, 2, 3]", "data.toml:14: datasets.1.resolution: is [1, 2, 3]"),
        ("resolution = 768", "resolution = 8", "data.toml:14: datasets.1.resolution"),
        ("[960, 544]", "-1", "data.toml:2: general.resolution: is -1"),
        ("[general]", "[globals]", "data.toml:1: globals: is no part of a dataset file"),
        ("resolution = [960, 544]", "", "has no resolution"),
    ],
)
def test_fault_in_musubi_file(tmp_path: Path, old: str, new: str, said: str):
    """Each fault is refused with its line, what was found and what to do."""
    assert old in MUSUBI
    assert said in refused(tmp_path, MUSUBI.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("flip_aug = true", "color_aug = true", "data.toml:16: datasets.0.subsets.0.color_aug: changes colours"),
        ("flip_aug = true", "flip_ug = true", "data.toml:16: datasets.0.subsets.0.flip_ug: is no key"),
        ("keep_tokens = 2", "metadata_file = 'a.json'", "datasets.0.subsets.1.metadata_file: is a .json of captions"),
        ('image_dir = "reg"', "", "data.toml:18: datasets.0.subsets.1: names no images; give image_dir"),
        ("resolution = 512", "validation_split = 0.1", "datasets.0.validation_split: holds out a share"),
        ("keep_tokens = 1", "keep_tokens = 9999", "data.toml:3: general.keep_tokens"),
    ],
)
def test_fault_in_kohya_file(tmp_path: Path, old: str, new: str, said: str):
    assert old in KOHYA
    assert said in refused(tmp_path, KOHYA.replace(old, new, 1))


def test_empty_file_is_refused(tmp_path: Path):
    for text in ("", "[general]\nresolution = 512\n", "datasets = []\n", "datasets = 3\n"):
        assert "datasets: is missing or empty; write a [[datasets]]" in refused(tmp_path, text)
    assert "has no subsets" in refused(tmp_path, "[[datasets]]\nresolution=512\nsubsets = []\n")


def test_all_problems_at_once(tmp_path: Path):
    text = MUSUBI.replace("num_repeats", "repeats").replace("resolution = 768", 'resolution = "x"')
    said = refused(tmp_path, text)
    assert "datasets.0.repeats" in said and "datasets.1.resolution" in said


def test_every_key_has_a_fate():
    """Every key that the two programs know becomes a setting, or has a reason for which it does not."""
    settings = DataEntry.model_fields
    for key, rule in (KOHYA_DATASET | KOHYA_SUBSET | MUSUBI_KEYS).items():
        handled = key in ("resolution", "enable_bucket", "bucket_no_upscale")
        assert rule.setting in settings or rule.why or handled, key


def test_neutral_value_is_silent(tmp_path: Path):
    """A key with the value of its absence is neither noted nor refused."""
    text = KOHYA.replace("flip_aug = true", 'color_aug = false\ncaption_separator = ","\ntoken_warmup_step = 0')
    _, notes = converted(tmp_path, text)
    assert not any("color_aug" in note or "separator" in note or "warmup" in note for note in notes)


def test_import_writes_config(tmp_path: Path):
    """The command writes a config that reads as the file does, with the notes as comments."""
    (tmp_path / "data.toml").write_text(MUSUBI)
    done = CliRunner().invoke(app, ["import", str(tmp_path / "data.toml"), "-o", str(tmp_path / "a.yaml")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "a.yaml").read_text()
    assert text.startswith("# Imported from data.toml, a dataset file.\n") and "# data.toml holds the images" in text
    assert read_config(tmp_path / "a.yaml") == read_config(tmp_path / "data.toml")


def test_missing_folder_has_its_key(tmp_path: Path):
    """A folder that does not exist is named by the key and line of the dataset file."""
    (tmp_path / "data.toml").write_text(MUSUBI)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "data.toml")])
    assert done.exit_code != 0
    assert "photos" in str(done.exception) and "does not exist" in str(done.exception)


def test_lines_of_keys():
    lines = dataset_toml._key_lines(KOHYA)
    assert lines["datasets", 1, "subsets", 0, "alpha_mask"] == 31 and lines["datasets", 0, "subsets", 1] == 18
