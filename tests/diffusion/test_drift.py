"""The drift meter: against a calculation with diffusers alone, as a command, and beside a training."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.diffusion import drift
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import lora_file, swap
from zimage_train.models import text_encoder
from zimage_train.models.components import ExtrasPaths
from zimage_train.report.metrics import read_records

from helpers import PREVIEWED, final, folder, losses

CPU = torch.device("cpu")
PROMPTS = ["a large red circle at the centre on a blue background", "small green star, top left, white background"]


def recipe(prompt: str, seed: int) -> SamplingRequest:
    return SamplingRequest(prompt=prompt, negative="", seed=seed, width=64, height=96, steps=8, guidance=0.0, shift=3.0)


RECIPES = [recipe(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def turbo():
    """The trainer's model in float32, and the features of the prompts."""
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    return load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model, {
        one: encoder.encode(one) for one in PROMPTS
    }


def quiet(done: int, total: int) -> None:
    pass


def stock(lora: Path | None) -> ZImageTransformer2DModel:
    """Diffusers' transformer in float64, with a LoRA merged by hand."""
    model = ZImageTransformer2DModel.from_pretrained(mini.TURBO / "transformer").double().eval()
    state = {key: value.double() for key, value in load_file(lora).items()} if lora else {}
    for key, down in state.items():
        if ".lora_A." in key:
            name = key.removeprefix("diffusion_model.").replace(".lora_A.weight", "")
            model.get_submodule(name).weight.data += state[key.replace("lora_A", "lora_B")] @ down
    return model


@torch.no_grad()
def by_hand(embeds: dict[str, torch.Tensor], lora: Path) -> list[float]:
    """The deviations in float64: velocities of two models at the states of the model without the LoRA."""
    own, changed = stock(None), stock(lora)
    sigmas = [3 * u / (1 + 2 * u) for u in (1 - step / 8 for step in range(9))]
    shares: list[list[float]] = [[] for _ in range(8)]
    for one in RECIPES:
        shape, generator = (1, 16, one.height // 8, one.width // 8), torch.Generator().manual_seed(one.seed)
        latents = torch.randn(shape, generator=generator).double()
        condition = [embeds[one.prompt].double()]
        for step, (now, after) in enumerate(pairwise(sigmas)):
            when = torch.tensor([1 - now], dtype=torch.float64)
            v, w = (
                -torch.stack(model(list(latents.unsqueeze(2)), when, condition, return_dict=False)[0]).squeeze(2)
                for model in (own, changed)
            )
            shares[step].append(float((v - w).square().sum() / v.square().sum()))
            latents = latents + (after - now) * v
    return [math.sqrt(sum(row) / len(row)) for row in shares]


@pytest.mark.slow
def test_deviations_equal_stock_models(turbo):
    """Deviations are those of two stock models of diffusers."""
    model, embeds = turbo
    walked = drift.record_trajectories(model, RECIPES, embeds, quiet)
    with swap.with_lora(model, lora_file.read_lora(mini.ADAPTER_V1)):
        found = drift.deviations(model, walked, embeds, quiet)
    wanted = by_hand(embeds, mini.ADAPTER_V1)
    assert max(wanted) > 0.05
    assert found == pytest.approx(wanted, rel=1e-3)


def test_turbo_itself_has_not_drifted(turbo):
    model, embeds = turbo
    walked = drift.record_trajectories(model, RECIPES, embeds, quiet)
    assert max(drift.deviations(model, walked, embeds, quiet)) < 1e-5


@pytest.mark.slow
def test_meter_takes_the_lora_off_and_on(turbo):
    """The meter compares a LoRA with Turbo without it, and puts the LoRA back."""
    model, embeds = turbo
    meter, lora = drift.DriftMeter(RECIPES, embeds), lora_file.read_lora(mini.ADAPTER_V1)
    with swap.with_lora(model, lora):  # the first reading walks with what is on the model, if it is not taken off
        readings = [meter.measure(model, quiet), meter.measure(model, quiet)]
        assert any("lora" in name for name, _ in model.named_parameters())
    walked = drift.record_trajectories(model, RECIPES, embeds, quiet)
    with swap.with_lora(model, lora):
        wanted = drift.overall_deviation(drift.deviations(model, walked, embeds, quiet))
    assert readings == [wanted, wanted] and wanted > 0.03
    assert drift.overall_deviation([1.0, 2.0, 2.0, 9.0]) == pytest.approx(math.sqrt(3))


def scaled(tmp_path: Path, factor: float) -> Path:
    """The adapter as a LoRA of another strength."""
    path = tmp_path / f"times-{factor:g}.safetensors"
    state = load_file(mini.ADAPTER_V1)
    save_file({key: value * factor if "lora_B" in key else value for key, value in state.items()}, path)
    return path


def command(lora: Path, output: Path, *more: str) -> tuple[int, str]:
    words = ["drift", str(mini.TURBO), "--lora", str(lora), "--dtype", "fp32", "--width", "64", "--height", "64"]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = CliRunner().invoke(app, [*words, *prompts, "-o", str(output), *more])
    return done.exit_code, done.output


@pytest.mark.slow
def test_drift_command(tmp_path: Path):
    """The command measures, draws images and gives a verdict."""
    found = {}
    for factor in (0.0, 4.0):
        output = tmp_path / f"{factor:g}"
        code, said = command(scaled(tmp_path, factor), output)
        assert code == 0, said
        found[factor] = json.loads((output / "drift.json").read_text())
        assert len(list((output / "pictures").glob("*.png"))) == 8  # two prompts, two models, two ways of sampling
        assert (output / "grid.png").exists() and "30 steps" in (output / "compare.html").read_text()
        assert f"deviation {found[factor]['deviation']:.3f}" in said and found[factor]["verdict"] in said
    assert found[0.0]["deviation"] == pytest.approx(0, abs=1e-5)
    assert found[0.0]["kept"] == pytest.approx(1, abs=0.02) and found[0.0]["gap"] == pytest.approx(1, abs=0.02)
    assert found[0.0]["deviation"] < found[4.0]["deviation"]
    assert "keeps Turbo's 8 steps" in found[0.0]["verdict"] and "drifted" in found[4.0]["verdict"]


@pytest.mark.slow
def test_prompt_file_steps_do_not_count(tmp_path: Path):
    """Steps and guidance in a prompt file are ignored."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPTS[0]}\n{PROMPTS[1]} --s 20 --l 4 --n blurry\n")
    words = ["drift", str(mini.TURBO), "--lora", str(mini.ADAPTER_V1), "--dtype", "fp32", "--width", "64"]
    words += ["--height", "64", "--prompts", str(path), "-o", str(tmp_path / "file")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert command(mini.ADAPTER_V1, tmp_path / "plain")[0] == 0
    one, other = (json.loads((tmp_path / name / "drift.json").read_text()) for name in ("file", "plain"))
    assert len(one["sigmas"]) == 8 and one["deviations"] == other["deviations"]


@pytest.mark.slow
def test_weights_count(tmp_path: Path):
    code, _ = command(scaled(tmp_path, 2.0), tmp_path / "file")
    assert code == 0
    words = ["drift", str(mini.TURBO), "--lora", f"{mini.ADAPTER_V1}=2", "--dtype", "fp32", "--width", "64"]
    words += ["--height", "64", *(word for prompt in PROMPTS for word in ("--prompt", prompt))]
    assert CliRunner().invoke(app, [*words, "-o", str(tmp_path / "weight")]).exit_code == 0
    one, other = (json.loads((tmp_path / name / "drift.json").read_text()) for name in ("file", "weight"))
    assert one["deviations"] == pytest.approx(other["deviations"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["base", "--lora", str(mini.ADAPTER_V1)], "MODEL: is base, which needs more than 8 steps"),
        ([str(mini.TURBO)], "Missing option '--lora'"),
        ([str(mini.TURBO), "--lora", "nowhere.safetensors"], "nowhere.safetensors"),
        ([str(mini.TURBO), "--lora", str(mini.ADAPTER_V1), "--width", "65"], "--width: is 65"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], what: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["drift", *words])
    assert done.exit_code != 0
    assert what in done.output + str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def drifting(make_config) -> Config:
    config = make_config(sample=PREVIEWED, optimizer={"lr": 1e-2})
    run_training(config, fresh=False)
    return config


@pytest.mark.slow
def test_training_logs_drift(drifting: Config, make_config):
    """A training logs the drift, and its losses are the same."""
    plain = make_config(name="plain", sample={"every": None}, optimizer={"lr": 1e-2})
    run_training(plain, fresh=False)
    assert losses(drifting) == losses(plain)
    events = {one["step"]: one for one in read_records(folder(drifting) / "events.jsonl") if one["event"] == "preview"}
    assert "drift" not in events[0] and 0 < events[2]["drift"] < events[4]["drift"]
    assert f"drift {events[4]['drift']:.3f} from Turbo's own steps" in (folder(drifting) / "log.txt").read_text()
    assert "Drift from Turbo" in (folder(drifting) / "report.html").read_text()


@pytest.mark.slow
def test_logged_drift_equals_the_command(drifting: Config, tmp_path: Path):
    """The logged drift is the drift that the command measures, without the adapter."""
    lora = tmp_path / "final.safetensors"
    lora.write_bytes(final(drifting))
    words = ["drift", str(mini.TURBO), "--lora", str(lora), "--dtype", "fp32", "--width", "64", "--height", "64"]
    neutral = PREVIEWED["prompts"][1]  # the other has the trigger
    done = CliRunner().invoke(app, [*words, "--prompt", neutral, "--seed", "43", "-o", str(tmp_path / "drift")])
    assert done.exit_code == 0, done.output
    events = [one for one in read_records(folder(drifting) / "events.jsonl") if one["event"] == "preview"]
    logged = events[-1]["drift"]
    assert json.loads((tmp_path / "drift" / "drift.json").read_text())["deviation"] == pytest.approx(logged, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "also", "is_measured"),
    [
        ({"variant": "turbo"}, None, True),
        ({"variant": "base", "adapter": None, "extras": str(mini.TURBO)}, None, False),
        ({"variant": "base", "adapter": None, "extras": str(mini.TURBO)}, str(mini.TURBO), True),
    ],
)
def test_it_is_measured_where_turbo_is(make_config, model: dict, also: str | None, is_measured: bool):
    config = make_config(model=model, sample=PREVIEWED | {"compare_on": also, "steps": 3})
    run_training(config, fresh=False)
    events = [one for one in read_records(folder(config) / "events.jsonl") if one["event"] == "preview" and one["step"]]
    assert all(("drift" in one) == is_measured for one in events) and events
