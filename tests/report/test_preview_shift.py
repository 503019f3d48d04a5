"""How far previews are from those before training, and what is said of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_train.commands.train import run_training
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.planning.verdicts import NOT_LEARNING_BELOW
from zimage_train.report import preview_images, preview_shift
from zimage_train.report.metrics import read_records
from zimage_train.report.preview_shift import PreviewShift

from helpers import PREVIEWED, folder

KEYS = {"negative": "", "width": 64, "height": 64, "steps": 8, "guidance": 0.0, "shift": 3.0}
PROMPTS = ["a red zorb", "a dog"]


def draw(samples: Path, step: int, *shades: int) -> None:
    """A flat grey preview of each prompt."""
    samples.mkdir(exist_ok=True)
    for index, shade in enumerate(shades):
        recipe = SamplingRequest(prompt=PROMPTS[index], seed=index, **KEYS)
        preview_images.save_preview(
            preview_images.preview_path(samples, step, index),
            Image.new("RGB", (16, 16), (shade,) * 3),
            recipe,
            "a test",
        )


def test_image_distance(tmp_path: Path):
    """The distance is the root mean square of the differences."""
    draw_from = np.random.default_rng(3)
    one, other = draw_from.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    Image.fromarray(one).save(tmp_path / "one.png")
    Image.fromarray(other).save(tmp_path / "other.png")
    expected = sum(((int(a) - int(b)) / 255) ** 2 for a, b in zip(one.flat, other.flat, strict=True)) / one.size
    assert preview_shift.image_distance(tmp_path / "one.png", tmp_path / "other.png") == pytest.approx(expected**0.5)
    Image.new("RGB", (16, 32)).save(tmp_path / "tall.png")
    assert preview_shift.image_distance(tmp_path / "one.png", tmp_path / "tall.png") is None


def test_shifts_with_and_without_trigger(tmp_path: Path):
    """Shifts are reported separately for prompts with and without the trigger."""
    draw(tmp_path / "s", 0, 100, 100)
    draw(tmp_path / "s", 5, 151, 100)
    draw(tmp_path / "s", 10, 202, 151)
    found = preview_shift.preview_shifts(preview_images.preview_table(tmp_path / "s"), {"zorb"})
    assert found == [PreviewShift(5, pytest.approx(0.2), 0.0), PreviewShift(10, pytest.approx(0.4), pytest.approx(0.2))]
    assert preview_shift.preview_shifts(preview_images.preview_table(tmp_path / "s"), set())[0].with_trigger is None


def test_shift_without_a_first_image(tmp_path: Path):
    """Without the image before training, no shift is reported."""
    draw(tmp_path / "s", 5, 151, 100)
    assert preview_shift.preview_shifts(preview_images.preview_table(tmp_path / "s"), {"zorb"}) == [
        PreviewShift(5, None, None)
    ]


@pytest.mark.slow
def test_no_learning_is_reported(make_config):
    """A run that learns nothing says so in its log, report and events."""
    config = make_config(sample=PREVIEWED, optimizer={"lr": 1e-12})
    run_training(config, fresh=False)
    assert "warning: not learning: at step 4 previews with the trigger differ by 0.000" in (
        (folder(config) / "log.txt").read_text()
    )
    report = (folder(config) / "report.html").read_text()
    assert "not learning" in report and report.count("from step 0") == 4
    last = [record for record in read_records(folder(config) / "events.jsonl") if record["event"] == "preview"][-1]
    assert last["change_with_trigger"] < 0.001 and last["change_without_trigger"] < 0.001


@pytest.mark.slow
def test_a_run_that_learns_says_neither(make_config):
    config = make_config(sample=PREVIEWED | {"prompts": [PREVIEWED["prompts"][0]]}, optimizer={"lr": 0.1})
    run_training(config, fresh=False)
    assert "not learning" not in (folder(config) / "log.txt").read_text()
    last = [record for record in read_records(folder(config) / "events.jsonl") if record["event"] == "preview"][-1]
    assert last["change_with_trigger"] > NOT_LEARNING_BELOW
