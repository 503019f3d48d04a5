"""Faults in the numbers: what is not finite changes nothing, is never saved, and ends a run that it keeps coming to."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, DivergedError, Stopped
from zimage_train.planning import devices
from zimage_train.report.metrics import read_records
from zimage_train.training import checkpoint, outputs
from zimage_train.training.loss import Loss

from helpers import PREVIEWED, facts, final, folder, losses, poison, spoil_losses, stop_after


def checkpoint_of(config: Config, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(folder(config) / "checkpoints" / f"step-{step:06d}.safetensors")


def is_same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> bool:
    """Whether LoRA and optimizer are the same, bit for bit."""
    same_numbers = one.metadata["optimizer"] == other.metadata["optimizer"]
    same_names = one.tensors.keys() == other.tensors.keys()
    return same_numbers and same_names and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[nn.Module, Loss], Loss]) -> list[int]:
    """Let `spoil` change the loss of a step, or the model; returns the steps at which it did."""
    fired: list[int] = []

    def spoil_one(now: int, model: nn.Module, loss: Loss) -> Loss:
        if now != step or fired:
            return loss
        fired.append(step)
        return spoil(model, loss)

    spoil_losses(monkeypatch, spoil_one)
    return fired


def no_number(model: nn.Module, loss: Loss) -> Loss:
    return Loss(loss.objective * float("nan"), loss.plain * float("nan"))


def infinite_gradient(model: nn.Module, loss: Loss) -> Loss:
    """An element of a gradient becomes infinite; the loss stays what it was."""
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert first.grad is not None
    first.grad.view(-1)[0] = float("inf")  # the backward adds to it
    return loss


def skipping(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Leave out the update of a step, by other means than the program's own."""
    original, seen, fired = torch.optim.AdamW.step, itertools.count(1), []

    def update(self, *args):
        if next(seen) == step:
            return fired.append(step)
        return original(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    return fired


def check_that_a_step_was_skipped(make_config, monkeypatch, capsys, spoil) -> None:
    options = {"train": {"steps": 4}, "save": {"every": 1}}
    config, whole = make_config(**options), make_config(name="masked", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        fired = at_step(patch, 3, spoil)
        with pytest.raises(Stopped):
            run_training(config, fresh=False)
    assert fired == [3]
    assert is_same(checkpoint_of(config, 3), checkpoint_of(config, 2))
    skipped = read_records(folder(config) / "metrics.jsonl")[2]
    assert skipped["loss"] is None and skipped["grad_norm"] is None
    line = next(line for line in capsys.readouterr().out.splitlines() if "step 3 skipped" in line)
    assert f"not finite ({skipped['not_finite']}) with {', '.join(skipped['samples'])} at sigma " in line
    assert re.fullmatch(r"loss (nan, gradient norm nan|0\.\d+, gradient norm (inf|nan))", skipped["not_finite"])
    assert all(f"{sigma:.3f}" in line for sigma in skipped["sigma"])
    run_training(config, fresh=False)
    with monkeypatch.context() as patch:
        left_out = skipping(patch, 3)
        run_training(whole, fresh=False)
    assert left_out == [3]
    assert is_same(checkpoint_of(config, 4), checkpoint_of(whole, 4))
    one, other = losses(config), losses(whole)
    assert one[:2] + one[3:] == other[:2] + other[3:]


@pytest.mark.slow
def test_loss_not_a_number(make_config, monkeypatch, capsys):
    """49. A loss that is not a number changes no bit: its step is skipped and named, and the others are as ever."""
    check_that_a_step_was_skipped(make_config, monkeypatch, capsys, no_number)


@pytest.mark.slow
def test_gradient_infinite(make_config, monkeypatch, capsys):
    """50. An infinite element of a gradient, under a finite loss, changes no bit: its step is skipped and named."""
    check_that_a_step_was_skipped(make_config, monkeypatch, capsys, infinite_gradient)


@pytest.mark.slow
def test_five_in_a_row_end_the_run(make_config, monkeypatch):
    """51. After five such steps in a row the run ends with exit code 5, and its last checkpoint is finite."""
    config = make_config(train={"steps": 9}, save={"every": 1})
    fired = poison(monkeypatch, {3, 4, 5, 6, 7})
    with pytest.raises(DivergedError, match="5 times in a row") as error:
        run_training(config, fresh=False)
    assert fired == [3, 4, 5, 6, 7]
    assert error.value.exit_code == 5
    assert "step 7: loss or gradient not finite 5 times in a row, last loss nan, gradient norm nan with zorb_" in str(
        error.value
    )
    newest = checkpoint_of(config, checkpoint.steps_in(folder(config) / "checkpoints")[0][0])
    assert newest.step == 6 and all(tensor.isfinite().all() for tensor in newest.tensors.values())


@pytest.mark.slow
def test_skips_count_across_starts(make_config, monkeypatch):
    """51. A new start is no new chance: steps that were skipped before it count."""
    fired = poison(monkeypatch, {2, 3, 4, 5, 6})
    run_training(make_config(train={"steps": 4}), fresh=False)
    with pytest.raises(DivergedError, match=r"step 6: .* 5 times in a row"):
        run_training(make_config(train={"steps": 9}), fresh=False)
    assert fired == [2, 3, 4, 5, 6]


def test_skips_in_every_step(make_config, monkeypatch):
    """51. A run shorter than that, without any finite step, is no success either."""
    fired = poison(monkeypatch, {1, 2})
    with pytest.raises(DivergedError, match="2 times in a row"):
        run_training(make_config(train={"steps": 2}), fresh=False)
    assert fired == [1, 2]


def test_what_is_not_finite_is_not_saved(tmp_path: Path):
    """52. What is not finite is never saved."""
    with pytest.raises(DivergedError) as error:
        checkpoint.save(tmp_path, 5, {"lora.x.A": torch.tensor([float("inf")])}, {})
    assert error.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_lora_not_finite_is_not_saved(make_config, monkeypatch):
    """52. A LoRA that is not finite when it is to be saved ends the run with exit code 5; the save before is intact."""
    config = make_config(train={"steps": 4}, save={"every": 1})
    original, seen, fired = torch.optim.AdamW.step, itertools.count(1), []

    def update(self, *args):
        original(self, *args)
        if next(seen) == 3:
            fired.append(3)
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    with pytest.raises(
        DivergedError, match=r"step 3: lora\..* is not finite; lower optimizer.lr; nothing was saved"
    ) as error:
        run_training(config, fresh=False)
    assert fired == [3] and error.value.exit_code == 5
    steps = [step for step, _ in checkpoint.steps_in(folder(config) / "checkpoints")]
    assert steps == [2, 1]
    assert all(tensor.isfinite().all() for tensor in checkpoint_of(config, 2).tensors.values())
    assert sorted(path.name for path in (folder(config) / "lora").iterdir()) == [
        "tiny-000001.safetensors",
        "tiny-000002.safetensors",
    ]


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


@pytest.mark.slow
def test_gpu_out_of_memory(make_config, monkeypatch):
    """53. A GPU without enough memory: one line with exit code 2 names the plan that would fit; the run can go on."""
    options = {"train": {"steps": 4, "batch_size": 8}, "save": {"every": 1}}
    config = make_config(**options)
    with monkeypatch.context() as patch:
        fired = at_step(patch, 3, out_of_memory)
        patch.setattr(devices, "retry_limit_bytes", lambda device: int(15e6))
        with pytest.raises(ConfigError) as error:
            run_training(config, fresh=False)
    assert fired == [3] and error.value.exit_code == 2
    assert re.fullmatch(
        r"memory: CUDA out of memory; \d+\.\d GB were in use at most; "
        r"set memory.budget_gb: 0.015 \(predicted: \d+\.\d MB\); the last checkpoint is good",
        str(error.value),
    )
    run_training(make_config(**options, memory={"budget_gb": 0.015}), fresh=False)
    assert facts(config)["starts"] == [0, 2] and len(losses(config)) == 4


def test_preview_out_of_memory(make_config, monkeypatch, capsys):
    """53. A preview that runs out of memory is said, and training goes on."""
    monkeypatch.setattr(outputs, "sample_all", out_of_memory)
    config = make_config(train={"steps": 2}, sample=PREVIEWED | {"first": False})
    run_training(config, fresh=False)
    said = "preview at step 2 failed (OutOfMemoryError: CUDA out of memory."
    assert said in capsys.readouterr().out
    assert len(losses(config)) == 2 and final(config)


@pytest.mark.slow
def test_accumulation_changes_sums_only(make_config, tmp_path: Path):
    """54. A batch of 4, 2 passes of 2 and 4 of 1 train alike, and an image's noise is the same in all of them."""
    for path in mini.IMAGES.glob("zorb_0[1-4].*"):
        if path.suffix != ".txt":
            with Image.open(path) as image:
                image.resize((64, 64)).save(tmp_path / f"{path.stem}.png")
    assert len(list(tmp_path.glob("*.png"))) == 4
    data = [{"folder": str(tmp_path), "resolution": [64], "default_caption": "zorb"}]
    found = {}
    for accumulate in (1, 2, 4):
        portions = {"batch_size": 4 // accumulate, "grad_accumulation": accumulate}
        config = make_config(name=f"by{accumulate}", data=data, train={"steps": 4, **portions})
        run_training(config, fresh=False)
        found[accumulate] = read_records(folder(config) / "metrics.jsonl")
    for other in (found[2], found[4]):
        for one, another in zip(found[1], other, strict=True):
            assert another["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert another["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
            sigmas = [dict(zip(record["samples"], record["sigma"], strict=True)) for record in (one, another)]
            assert sigmas[0] == sigmas[1] and len(sigmas[0]) == 4
    orders = {accumulate: [record["samples"] for record in records] for accumulate, records in found.items()}
    assert orders[1] != orders[4], "the order within a step is really another"
