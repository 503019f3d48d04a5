"""A run with schedule-free AdamW exports, previews and validates its averages, and continues from what it trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.report.metrics import read_records

from helpers import PREVIEWED, final, folder, losses, run_in_two_starts

RUN = {"optimizer": {"name": "adamw_schedulefree", "lr": 3e-3}, "train": {"steps": 4}, "save": {"every": 2}}


def exported(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(folder(config)) / "lora" / f"{config.name}.safetensors")


def trained(config: Config) -> dict[str, torch.Tensor]:
    (newest,) = sorted((folder(config) / "checkpoints").glob("*.safetensors"))[-1:]
    return load_file(newest)


@pytest.mark.slow
def test_averages_are_exported(make_config):
    """The LoRA is x; the checkpoint holds y, which is nearer to z."""
    config = make_config(**RUN)
    run_training(config, fresh=False)
    tensors, lora = trained(config), exported(config)
    names = [name.removeprefix("lora.") for name in tensors if name.startswith("lora.")]
    differing = 0
    for name in names:
        y = tensors[f"lora.{name}"]
        candidates = [key for key in tensors if key.endswith(".z") and tensors[key].shape == y.shape]
        x = lora[f"diffusion_model.{name.removesuffix('.A').removesuffix('.B')}.lora_{name[-1]}.weight"]
        # x is where y = 0.9 x + 0.1 z for the z of this parameter.
        assert any(torch.allclose(0.9 * x + 0.1 * tensors[key], y, atol=1e-6) for key in candidates), name
        differing += not torch.equal(x, y)
    assert differing > len(names) / 2


@pytest.mark.slow
def test_looking_and_stopping_are_free(make_config, photos: Path, monkeypatch):
    """Previews, validations and a stop in between change neither the LoRA nor the losses."""
    looking = {"validation": {"folder": str(photos), "every": 1, "resolution": 64}, "sample": PREVIEWED}
    plain, looked_at = make_config(name="plain", **RUN), make_config(**RUN, **looking)
    run_training(plain, fresh=False)
    run_in_two_starts(looked_at, monkeypatch, step=3)
    assert losses(looked_at) == losses(plain)
    one, other = exported(plain), exported(looked_at)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert final(plain)
    validations = [event for event in read_records(folder(looked_at) / "events.jsonl") if "loss_turbo" in event]
    assert [event["step"] for event in validations] == [0, 1, 2, 3, 4]
