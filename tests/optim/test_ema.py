"""Averaged weights equal a hand computation, survive a stop, and change nothing that is trained."""

import json

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from zimage_train.commands.train import run_training
from zimage_train.errors import Stopped, WeightsError
from zimage_train.lora import lora_file
from zimage_train.optim import ema
from zimage_train.training import checkpoint, exports

from helpers import PREVIEWED, final, folder, stop_after


def test_the_decay_rises_to_its_value():
    assert [ema.decay_at(0.9, step) for step in (1, 2, 10)] == pytest.approx([2 / 11, 3 / 12, 11 / 20])
    assert ema.decay_at(0.9, 80) == pytest.approx(0.9) == ema.decay_at(0.9, 10**6)
    assert ema.decay_at(0.1, 1) == 0.1


def test_it_is_what_a_hand_computes(make_config, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    update = ema.Ema.update

    def spy(self, trained, step):
        seen.append({name: tensor.double().clone() for name, tensor in named(trained).items()})
        update(self, trained, step)

    begin, names = ema.init_ema, []
    monkeypatch.setattr(ema.Ema, "update", spy)
    first: dict[str, torch.Tensor] = {}

    def started(decay, trained, name_views):
        first.update({name: tensor.double().clone() for name, tensor in name_views(trained.detach()).items()})
        names.append(name_views)
        return begin(decay, trained, name_views)

    def named(buffer):
        return names[0](buffer.detach())

    monkeypatch.setattr(ema, "init_ema", started)
    config = make_config(ema={"decay": 0.3}, train={"steps": 6})
    run_training(config, fresh=False)
    assert len(seen) == 6
    average = first
    for step, weights in enumerate(seen, 1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    kept = checkpoint.load(folder(config) / "checkpoints" / "step-000006.safetensors").part("ema.lora.")
    assert kept.keys() == {f"ema.{name}" for name in average}
    for name, value in average.items():
        assert kept[f"ema.{name}"].dtype == torch.float32
        assert torch.allclose(kept[f"ema.{name}"].double(), value, rtol=1e-5, atol=1e-8)
    exported = lora_file.read_lora(folder(config) / "lora" / "ema" / "tiny.safetensors")
    for module, factors in exported.items():
        whole = average[f"lora.{module}.B"] @ average[f"lora.{module}.A"]
        assert torch.allclose(factors.b.double() @ factors.a.double() * factors.scale, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_stopped_run_has_the_same_averages(make_config, monkeypatch):
    """A run that is stopped and continued ends with the same averages."""
    whole = make_config(name="whole", ema={"decay": 0.5}, train={"steps": 6})
    run_training(whole, fresh=False)
    stopped = make_config(ema={"decay": 0.5}, train={"steps": 6})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            run_training(stopped, fresh=False)
    run_training(stopped, fresh=False)
    ends = [load_file(folder(config) / "lora" / "ema" / f"{config.name}.safetensors") for config in (whole, stopped)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    raw = load_file(folder(whole) / "lora" / "whole.safetensors")
    assert any(not torch.equal(raw[name], ends[0][name]) for name in raw)


def test_a_skipped_step_is_not_averaged(make_config, monkeypatch):
    from helpers import poison

    steps: list[int] = []
    update = ema.Ema.update
    monkeypatch.setattr(
        ema.Ema, "update", lambda self, trained, step: (steps.append(step), update(self, trained, step))
    )
    poison(monkeypatch, {3})
    monkeypatch.setattr("zimage_train.commands.train.dry_run", lambda run: run)
    run_training(make_config(ema={"decay": 0.5}, train={"steps": 4, "batch_size": 2}), fresh=False)
    assert steps == [1, 2, 4]


@pytest.mark.slow
def test_previews_of_averaged_weights(make_config):
    """Previews are drawn with raw or averaged weights, and the training is the same."""
    settings = {"ema": {"decay": 0.9}, "train": {"steps": 2}, "optimizer": {"lr": 0.02}}
    plain = make_config(name="plain", sample=PREVIEWED, **settings)
    averaged = make_config(name="averaged", sample=PREVIEWED | {"weights": "ema"}, **settings)
    run_training(plain, fresh=False)
    run_training(averaged, fresh=False)
    assert load(plain) == load(averaged)

    def image(config, step: int) -> Image.Image:
        return Image.open(folder(config) / "samples" / f"{step:06d}-00.png").convert("RGB")

    assert ImageChops.difference(image(plain, 0), image(averaged, 0)).getbbox() is None
    assert ImageChops.difference(image(plain, 2), image(averaged, 2)).getbbox() is not None


def load(config) -> bytes:
    content = final(config)
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.slow
def test_old_averages_are_pruned(make_config):
    """Old averages are pruned as the raw exports are."""
    config = make_config(ema={"decay": 0.9}, train={"steps": 6}, save={"every": 1, "keep": 2})
    run_training(config, fresh=False)
    kept = [sorted(path.name for path in place.glob("*.safetensors")) for place in lora_folders(config)]
    assert kept[0] == kept[1] == ["tiny-000004.safetensors", "tiny-000005.safetensors", "tiny.safetensors"]


def lora_folders(config):
    return (folder(config) / "lora", folder(config) / "lora" / "ema")


def test_lost_average_is_made_again(make_config, monkeypatch):
    """A finished run whose average is lost exports it again."""
    config = make_config(ema={"decay": 0.9}, train={"steps": 2})
    run_training(config, fresh=False)
    path = folder(config) / "lora" / "ema" / "tiny.safetensors"
    before = path.read_bytes()
    path.unlink()
    exported: list[int] = []
    export = exports.export_step
    monkeypatch.setattr(exports, "export_step", lambda run, step: (exported.append(step), export(run, step)))
    run_training(config, fresh=False)
    assert path.read_bytes() == before and exported == [2]
    run_training(config, fresh=False)
    assert exported == [2]


def test_averages_of_another_run():
    """Averages of something else are refused."""
    own = ema.init_ema(0.9, torch.zeros(6), lambda buffer: {"lora.x.A": buffer.view(2, 3)})
    for state in ({}, {"ema.lora.x.A": torch.zeros(3, 3)}, {"ema.lora.y.A": torch.zeros(2, 3)}):
        with pytest.raises(WeightsError, match="no averaged weights of this run"):
            own.load_state(state, "here")


def test_decay_identifies_the_run(make_config):
    """The identity of a run holds the decay."""
    config = make_config(ema={"decay": 0.9}, train={"steps": 1})
    run_training(config, fresh=False)
    kept = checkpoint.load(folder(config) / "checkpoints" / "step-000001.safetensors")
    assert json.loads(json.dumps(kept.metadata["identity"]))["settings"]["ema.decay"] == 0.9
