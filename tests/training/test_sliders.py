"""`train.method: slider`: the LoRA learns at the weights +1 and -1, in every path of a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_inputs import LAST, batch, raw_velocity, scaled_last, with_extras
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from zimage_train.commands.train import run_training
from zimage_train.config.lora import LoraSettings
from zimage_train.config.schema import Config
from zimage_train.lora.layers import AdapterLayers, lora_weight
from zimage_train.models.transformer import velocity
from zimage_train.report import preview_images
from zimage_train.training import preview_sets
from zimage_train.training.batches import Batch
from zimage_train.training.loss import losses
from zimage_train.training.run_dir import run_dir_of

from helpers import PREVIEWED, folder, numbers, run_in_two_starts
from helpers import losses as logged
from laboratory import sliding
from miniature.measuring import scenes
from steps import trained, unfused

SLIDER = {"positive": "[prompt], large", "negative": "[prompt], small", "guidance": 2.5}
LORAS = {"lora": LoraSettings(rank=4), "lokr": LoraSettings(type="lokr", factor=4)}


def slider_config(**slider: Any) -> Config:
    values = {"name": "a", "data": [{"prompts": "x"}], "train": {"method": "slider"}}
    return Config.model_validate(values | {"slider": SLIDER | slider})


def slider_batch(num_prompts: int) -> Batch:
    draw = torch.Generator().manual_seed(3)
    prompts = []
    for length in (12, 30, 50)[:num_prompts]:
        prompts.append([torch.randn(length, 64, generator=draw) for _ in range(2)])
    return with_extras(batch(2), slider_prompts=prompts)


def expected(frozen, attached: AdapterLayers, data: Batch, guidance: float, anchor: float) -> tuple[float, Tensor]:
    """The loss, and the gradient of all parts: targets in float64, signs by another last matrix."""
    prompts = data.extras.slider_prompts
    assert prompts is not None
    with scaled_last(attached, 0.0):
        base, positive, negative = (raw_velocity(frozen, data, one) for one in (data.prompts, *prompts[:2]))
        kept = raw_velocity(frozen, data, prompts[2]) if len(prompts) == 3 else None
    sigma = data.sigma.view(-1, 1, 1, 1)
    x = (1 - sigma) * data.x0 + sigma * data.noise
    total, gradient = 0.0, torch.zeros_like(attached.flat.whole)
    for sign in (1.0, -1.0):
        target = base + sign * guidance * (positive - negative)
        with scaled_last(attached, sign):
            error = (velocity(frozen.model, x, data.sigma, data.prompts).double() - target).square()
            loss = 0.5 * (data.weight.double() * error.mean(dim=(1, 2, 3))).mean()
            total += float(loss.detach())
            if kept is not None:
                drift = velocity(frozen.model, x, data.sigma, prompts[2]).double() - kept
                loss = loss + anchor * 0.5 * drift.square().mean()
            loss.backward()
            parts = attached.flat.split(attached.flat.grads)
            for name, part in parts.items():
                part.mul_(sign if name.endswith(LAST) else 1.0)
            gradient += attached.flat.grads
            attached.flat.zero_grad()
    return total, gradient


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("num_prompts", [2, 3], ids=["no anchor", "anchor"])
def test_target_and_gradients(kind: str, num_prompts: int):
    """Both signs and the anchor, against targets in float64, in modules and fused, with and without recomputation."""
    anchor = {"anchor": "x", "anchor_weight": 2.0} if num_prompts == 3 else {}
    config, data = slider_config(**anchor), slider_batch(num_prompts)
    wanted_loss, wanted = expected(*unfused("none", lora=LORAS[kind]), data, 2.5, 2.0)
    bits = []
    for make, mode in ((unfused, "none"), (unfused, "full"), (trained, "none"), (trained, "w1w3"), (trained, "full")):
        frozen, attached = make(mode, lora=LORAS[kind])
        frozen.model.train()
        total = 0.0
        for loss in losses(frozen.model, data, config):
            loss.objective.backward()
            total += float(loss.plain) if loss.name == "loss" else 0.0
        assert total == pytest.approx(wanted_loss, rel=1e-4)
        assert float((attached.flat.grads - wanted).norm() / wanted.norm()) < 2e-4
        bits += [attached.flat.grads.clone()] if make is trained else []
    assert all(torch.equal(one, bits[0]) for one in bits)


@pytest.mark.parametrize("kind", LORAS)
def test_weight_is_put_back(kind: str):
    """A weight holds within its block alone, also if the block fails; and half a change is a change of half."""
    frozen, attached = unfused("none", lora=LORAS[kind])
    data = batch(1)
    whole = raw_velocity(frozen, data, data.prompts)
    with scaled_last(attached, -0.5):
        wanted = raw_velocity(frozen, data, data.prompts)
    with pytest.raises(ZeroDivisionError), lora_weight(frozen.model, -0.5):
        assert torch.allclose(raw_velocity(frozen, data, data.prompts), wanted, atol=1e-5)
        raise ZeroDivisionError
    assert torch.equal(raw_velocity(frozen, data, data.prompts), whole)


@pytest.fixture
def make_slider(make_config, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a blue background\na green star on a white background\n")

    def make(**changes: Any) -> Config:
        base = {
            "model": {"adapter": None},
            "train": {"method": "slider", "steps": 4},
            "slider": SLIDER | {"anchor": ""},
        }
        return make_config(**(base | {"data": [{"prompts": str(path), "resolution": [64]}]} | changes))

    return make


def test_slider_resumes_to_the_bit(make_slider, monkeypatch):
    whole, stopped = make_slider(name="whole"), make_slider(name="stopped")
    run_training(whole, fresh=False)
    run_in_two_starts(stopped, monkeypatch)
    assert logged(stopped) == logged(whole) and len(logged(whole)) == 4
    assert numbers(stopped) == numbers(whole)


@pytest.mark.slow
def test_slider_memory_changes_no_bit(make_slider):
    """Streaming and recomputation leave every loss as it is."""
    found = []
    for name, memory in {"a": {}, "b": {"checkpointing": "full", "offload": 1.0}, "c": {"offload": 0.5}}.items():
        config = make_slider(name=name, memory=memory)
        run_training(config, fresh=False)
        found.append(logged(config))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_previews_at_each_weight(make_slider):
    """A slider is drawn at -1, 0 and 1, side by side; weight 0 is the model without it, and each weight is its own."""
    sample = PREVIEWED | {"every": 6}
    config = make_slider(train={"method": "slider", "steps": 6}, optimizer={"lr": 1e-2}, sample=sample)
    run_training(config, fresh=False)
    samples = folder(config) / "samples"
    drawn = {}
    for weight, place in {-1: "weight_-1", 0: "weight_0", 1: "."}.items():
        drawn[weight] = [np.asarray(Image.open(samples / place / f"00000{step}-00.png")) for step in (0, 6)]
    assert all(np.array_equal(images[0], drawn[0][1]) for images in drawn.values())  # before training, and at 0
    assert not np.array_equal(drawn[1][1], drawn[0][1]) and not np.array_equal(drawn[-1][1], drawn[0][1])
    assert not np.array_equal(drawn[1][1], drawn[-1][1])
    own = preview_sets.make_preview_sets(config, run_dir_of(config), {}, None)
    labels = preview_sets.all_previews_table(own).labels
    prompt = PREVIEWED["prompts"][0]
    assert labels[:3] == [f"{prompt} (weight {weight})" for weight in (-1, 0, 1)]
    assert "weight -1" in preview_images.drawn_by(samples / "weight_-1" / "000006-00.png")


def test_preview_weights_have_the_whole():
    values = {"name": "a", "data": [{"folder": "x"}]}
    for weights in ([-1.0], [1.0, 1.0], []):
        with pytest.raises(ValidationError, match="lora_weights"):
            Config.model_validate(values | {"sample": {"lora_weights": weights}})
    assert Config.model_validate(values).preview_weights == [1.0]
    assert Config.model_validate(values | {"sample": {"lora_weights": [2.0, 1.0]}}).preview_weights == [1.0, 2.0]


@pytest.mark.slow
def test_slider_moves_the_size(tmp_path: Path):
    """At -1, 0, 1 and 2, shapes on the miniature's images grow, and colours stay as the captions say."""
    run = sliding.train_slider(sliding.prompts_config(tmp_path, "turbo", 1))
    asked = scenes(24)
    rows = [sliding.measure(sliding.images_at(run, weight, "turbo", asked), asked) for weight in sliding.WEIGHTS]
    areas = [row["area"] for row in rows]
    assert areas == sorted(areas) and areas[0] < 0.8 * areas[1] and areas[2] > 1.05 * areas[1]
    assert all(row["ground"] > 0.95 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slider": {}}, "is empty, as slider.negative"),
        ({"slider": {"positive": "a", "negative": " a"}}, "is the same as slider.negative"),
        ({"slider": {"positive": "a", "anchor_weight": 2.0}}, "needs slider.anchor"),
        ({"train": {"method": "sft"}}, "needs train.method: slider"),
        ({"guidance": {"differential": 2.0}}, "slider.guidance is the strength"),
        ({"preserve": {"kind": "blank"}}, "set slider.anchor"),
        ({"validation": {"folder": "x"}}, "has no effect with train.method: slider"),
        ({"data": [{"folder": "x"}, {"folder": "y", "regularization": True}]}, "has no regularization"),
        ({"model": {"adapter": "v2"}}, "set model.adapter: null"),
    ],
)
def test_slider_conflicts(changes: dict[str, Any], message: str):
    values = {"name": "a", "data": [{"folder": "x"}], "train": {"method": "slider"}, "slider": SLIDER}
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values | changes)
