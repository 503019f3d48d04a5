"""`timesteps` shows the density that a config trains with, and draws those of several over each other."""

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli import app
from zimage_train.commands import timesteps, timesteps_measure
from zimage_train.config.schema import Config
from zimage_train.config.timesteps import TimestepSettings
from zimage_train.errors import ConfigError
from zimage_train.report import density_plot
from zimage_train.report.density_plot import Curves
from zimage_train.training import batches, weight_table
from zimage_train.training.weight_table import MeasuredLosses

SHIFTED = "name: a\ndata: [{folder: p, resolution: [512, 1024]}]\ntimesteps: {type: sigmoid, shift: flux}\n"
PLAIN = "name: b\ndata: [{folder: p}]\n"
NORMAL = [NormalDist().inv_cdf((index + 0.5) / 2000) for index in range(2000)]
MEAN = sum(1 / (1 + math.exp(-z - log_of_s)) for z in NORMAL for log_of_s in (0.63, 1.15)) / 4000
"""Mean of sigma with the factors of flux at 512 and 1024 px."""


def made_config(**settings: Any) -> Config:
    data = [{"folder": "p", "resolution": [512, 1024]}]
    return Config.model_validate({"name": "a", "data": data, "timesteps": settings})


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`shown(*words)`: the result of `timesteps a.yaml WORDS`, in a folder with a.yaml and b.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(SHIFTED)
    Path("b.yaml").write_text(PLAIN)
    return lambda *words: CliRunner().invoke(app.app, ["timesteps", "a.yaml", *words])


def test_shift_of_each_resolution(shown):
    """A shift by size is shown for every resolution of the images, and the chart mixes them in equal shares."""
    out = shown().output.splitlines()
    assert out[0].startswith("timesteps sigmoid, bias balanced, shift flux: mean sigma ")
    assert float(out[0].split()[-1]) == pytest.approx(MEAN, abs=0.002)
    assert out[1] == "shifted by 1.88 at 512 px, 3.16 at 1024 px, as many of each"
    sigmas = timesteps.sample_sigmas(made_config(type="sigmoid", shift="flux"))
    shares = []
    for log_of_s in (0.63, 1.15):
        shares.append(float((sigmas < 1 / (1 + math.exp(-log_of_s))).double().mean()))
    # Half of the images at the median of their size, and half below that of the other size.
    below = 0.5 * math.erfc((1.15 - 0.63) / math.sqrt(2))
    assert shares == pytest.approx([0.25 + below / 2, 0.25 + (1 - below) / 2], abs=0.006)


def test_shift_of_the_same_factor(shown):
    out = shown("--set", "timesteps.shift=2.5").output.splitlines()
    assert out[1] == "shifted by 2.5 after it is drawn"


def test_picture_of_two(shown):
    """--with draws both densities, in two colours, each with its label."""
    result = shown("--with", "b.yaml", "-o", "two.png")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "a.yaml:" and "b.yaml:" in lines and lines[-1] == "wrote two.png"
    with Image.open("two.png") as image:
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert set(density_plot.COLOURS[:2]) <= colours and density_plot.COLOURS[2] not in colours


def test_default_picture(shown):
    """A picture is written only where one is asked for."""
    shown()
    assert not Path("timesteps.png").exists()
    assert shown("--with", "b.yaml").output.splitlines()[-1] == "wrote timesteps.png"
    assert Path("timesteps.png").exists()


def test_json_draws_nothing(shown):
    result = shown("--json", "-o", "x.png")
    assert result.exit_code == 2 and not Path("x.png").exists()
    assert json.loads(shown("--json").output)["sigma_mean"] == pytest.approx(MEAN, abs=0.002)


def test_curves_are_the_density():
    """Curves are densities: the derivative of the distribution, of mean 1, and the same times the loss weight."""
    curves = timesteps.curves_of(made_config(type="cosine_bell", weight="bell"), "x")
    assert curves.label == "x: cosine_bell, balanced, weight bell"
    sigmas = [(index + 0.5) / len(curves.density) for index in range(len(curves.density))]
    assert curves.density == pytest.approx([1 - math.cos(2 * math.pi * sigma) for sigma in sigmas], abs=0.02)
    floor = math.exp(-0.5)
    for density, weighted, sigma in zip(curves.density, curves.weighted, sigmas, strict=True):
        assert weighted == pytest.approx(density * (math.exp(-2 * (sigma - 0.5) ** 2) - floor) / 0.24909, abs=0.03)
    assert sum(curves.density) / len(curves.density) == pytest.approx(1.0)


def test_heights_in_the_picture(tmp_path: Path):
    """A value twice as large is drawn twice as high, on a scale that holds all curves of a panel."""
    values = [1.0] * 50 + [2.0] * 50
    density_plot.save_density_plot(tmp_path / "x.png", [Curves("x", values, values), Curves("y", [4.0] * 100, values)])
    scale = density_plot.SCALE
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    top = (density_plot.LINE_PX * 2 + 30) * scale
    panel = pixels[top : top + density_plot.PANEL_PX * scale]

    def height(number: int, x: float) -> float:
        column = panel[
            :, round((density_plot.LEFT_PX + x * (density_plot.WIDTH_PX - density_plot.LEFT_PX - 20)) * scale)
        ]
        rows = (column == density_plot.COLOURS[number]).all(-1).nonzero()[0]
        return 1 - float(rows.mean()) / len(panel)

    low, high, other = height(0, 0.25), height(0, 0.75), height(1, 0.5)
    assert [high / low, other / low] == pytest.approx([2.0, 4.0], rel=0.03)


def test_weights_are_inverse_losses():
    """Weights times losses are the same everywhere, and their mean over sigma is 1."""
    sigmas, losses = [0.0, 0.25, 0.5, 1.0], [4.0, 2.0, 1.0, 0.5]
    table = MeasuredLosses(sigmas, losses, 0.0, 1).weights()
    products = [weight * loss for (_, weight), loss in zip(table, losses, strict=True)]
    assert products == pytest.approx([products[0]] * 4, rel=1e-3)
    area = 0.25 * (table[0][1] + table[1][1]) / 2 + 0.25 * (table[1][1] + table[2][1]) / 2
    assert area + 0.5 * (table[2][1] + table[3][1]) / 2 == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_measured_weights_by_hand(make_config, monkeypatch, tmp_path: Path):
    """The losses are those of the model with its adapter, calculated here by diffusers; a config takes the table."""
    monkeypatch.setattr(weight_table, "MAX_SAMPLES", 3)
    seen: list[Any] = []
    original = weight_table.measure_losses

    def spy(context: Any, frozen: Any, dataset: Any) -> MeasuredLosses:
        measured = original(context, frozen, dataset)
        seen.append((context, frozen, dataset, measured))
        return measured

    monkeypatch.setattr(timesteps_measure, "measure_losses", spy)
    config = make_config(lora={"dropout": 0.5}, sample={"prompts": ["a zorb"], "every": 5})
    lines = timesteps_measure.measure_weights(config)
    ((context, frozen, dataset, measured),) = seen
    assert measured.num_samples == 3 and frozen.adapter is not None
    total, index = 0.0, 18
    sigma = measured.sigmas[index]
    for sample in context.spec.order.concept.micro_batch(0) + context.spec.order.concept.micro_batch(1)[:1]:
        x0 = dataset.latents(sample.item).double()
        noise = batches.sample_noise(config, sample, x0.shape).double()
        x = (1 - sigma) * x0 + sigma * noise
        with torch.no_grad():
            given = ([x.float().unsqueeze(1)], torch.tensor([1 - sigma]), [dataset.embeds(sample.prompt)])
            raw = frozen.model(*given, return_dict=False)[0][0]
        total += float((raw.squeeze(1).double() + (noise - x0)).square().mean())
    assert measured.losses[index] == pytest.approx(total / 3, rel=1e-4)
    assert measured.losses[0] > measured.losses[index] > 0
    section = yaml.safe_load("\n".join(lines))["timesteps"]
    assert TimestepSettings.model_validate(section).weight == measured.weights()
    assert not Path(config.output_dir, config.name).exists()
    assert timesteps_measure.measure_weights(config) == lines


def test_measure_needs_images(make_config):
    """A method whose images the model draws is refused before anything is loaded."""
    config = make_config(
        model={"adapter": None}, train={"method": "de_distill"}, data=[{"folder": str(mini.IMAGES), "resolution": [64]}]
    )
    with pytest.raises(ConfigError, match=r"train\.method: is de_distill"):
        timesteps_measure.measure_weights(config)


def test_measure_draws_nothing(shown):
    assert shown("--measure", "--with", "b.yaml").exit_code == 2
