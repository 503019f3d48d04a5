"""`train.method: pairs`: images at the weight +1, and their partners at -1."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_inputs import batch, raw_velocity, scaled_last, with_extras
from PIL import Image
from pydantic import ValidationError

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.dataset.tensor_cache import CachedDataset
from zimage_train.errors import ZImageTrainError
from zimage_train.planning.preflight import check_run
from zimage_train.training import batches
from zimage_train.training.loss import losses

from helpers import losses as logged
from helpers import numbers, run_in_two_starts
from steps import trained


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four images with captions, and each mirrored under the same name in another format."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    for path in sorted(mini.IMAGES.glob("*.png"))[:4]:
        shutil.copy(path, one)
        shutil.copy(path.with_suffix(".txt"), one)
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / f"{path.stem}.webp", lossless=True)
    return one, other


@pytest.fixture
def make_pairs(make_config, folders):
    one, other = folders

    def make(**changes: Any) -> Config:
        data = [{"folder": str(one), "negative": str(other), "resolution": [64]}]
        return make_config(**({"data": data, "train": {"method": "pairs", "steps": 4}} | changes))

    return make


def test_pairs_loss_and_gradient():
    """The mean of both losses, the second with another sign of the change; the same noise and prompts."""
    frozen, attached = trained("full")
    frozen.model.train()
    negative = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(8))
    data = with_extras(batch(2), negative_x0=negative)
    values = {"name": "a", "data": [{"folder": "x", "negative": "y"}], "train": {"method": "pairs"}}
    total = 0.0
    for loss in losses(frozen.model, data, Config.model_validate(values)):
        loss.objective.backward()
        total += float(loss.plain)
    wanted = 0.0
    for sign, x0 in ((1.0, data.x0), (-1.0, negative)):
        side = batches.replace(data, x0=x0)
        with scaled_last(attached, sign):
            error = raw_velocity(frozen, side, data.prompts) - (data.noise - x0).double()
        wanted += 0.5 * float((data.weight.double() * error.square().mean(dim=(1, 2, 3))).mean())
    assert total == pytest.approx(wanted, rel=1e-4)
    assert float(attached.flat.grads.norm()) > 0


def test_equal_pairs_teach_nothing_at_first(make_pairs, folders, make_config):
    """Two equal images pull at the LoRA with opposite signs, so that nothing remains of a zero LoRA."""
    data = [{"folder": str(folders[0]), "negative": str(folders[0]), "resolution": [64]}]
    equal, unequal = make_pairs(name="equal", data=data), make_pairs(name="unequal")
    norms = []
    for config in (equal, unequal):
        run_training(config, fresh=False)
        lines = (Path(config.output_dir) / config.name / "metrics.jsonl").read_text().splitlines()
        norms.append(float(lines[0].partition('"grad_norm": ')[2].partition(",")[0]))
    assert norms[0] < 1e-4 * norms[1]


def test_partner_has_the_same_crop(make_pairs, monkeypatch):
    """The batch holds the latents of the partner of each image."""
    config, seen = make_pairs(), []
    original = CachedDataset.image_latents
    monkeypatch.setattr(CachedDataset, "image_latents", lambda self, item: seen.append(item) or original(self, item))
    run_training(config, fresh=False)
    crops: dict[str, list[Any]] = {".png": [], ".webp": []}
    for item in seen:
        crops[item.image.path.suffix].append((item.image.path.stem, item.size, item.flip))
    assert crops[".png"] and sorted(crops[".png"]) == sorted(crops[".webp"])


def test_pairs_resume_to_the_bit(make_pairs, monkeypatch):
    whole, stopped = make_pairs(name="whole"), make_pairs(name="stopped")
    run_training(whole, fresh=False)
    run_in_two_starts(stopped, monkeypatch)
    assert logged(stopped) == logged(whole) and len(logged(whole)) == 4
    assert numbers(stopped) == numbers(whole)


def test_missing_partners_are_all_named(make_pairs, folders):
    """Images without a partner are named in one error, and one of another size in another."""
    files = sorted(folders[1].iterdir())
    files[0].unlink()
    files[1].unlink()
    Image.new("RGB", (80, 96)).save(files[2], lossless=True)
    with pytest.raises(ZImageTrainError) as caught:
        check_run(make_pairs())
    problems = {problem.code: str(problem) for problem in caught.value.problems}
    assert problems.keys() >= {"missing-partner", "other-size"}
    assert all(f"{path.stem}.png" in problems["missing-partner"] for path in files[:2])
    assert f"{files[3].stem}.png" not in problems["missing-partner"] and "80x96" in problems["other-size"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"folder": "x"}]}, "set data.0.negative"),
        ({"train": {"method": "sft"}}, "without train.method: pairs"),
        ({"data": [{"metadata": "x", "negative": "y"}]}, "negative needs folder"),
        ({"preserve": {"kind": "blank"}}, "has no effect with train.method: pairs"),
    ],
)
def test_pairs_conflicts(changes: dict[str, Any], message: str):
    values = {"name": "a", "data": [{"folder": "x", "negative": "y"}], "train": {"method": "pairs"}}
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values | changes)
