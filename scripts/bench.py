"""Measure the numbers that the docs give, and write them as JSON.

python scripts/bench.py --speed [--size full|medium] [--against PATH] [--json docs/bench/speed.json]
    Time whole steps, in turns with those of diffusers with peft, or of another trainer whose source is at PATH. `full`
    needs a GPU; `medium` is for a CPU.
python scripts/bench.py --memory [--size full|mini] [-o docs/bench/memory.json]
    Train a model of random weights for a few steps under each memory budget at each resolution, with the allocator
    limited to the budget, and write peak memory and time of a step beside the prediction. `full` needs a GPU; `mini`
    runs anywhere, on a CPU without peaks.
python scripts/bench.py --repeat [--size full|mini] [-o docs/bench/repeat.json]
    Run the same step repeatedly, with torch's defaults and with those of a run, and compare gradients and times.
python scripts/bench.py --quantize [-o docs/bench/quantize.json]
    Measure on the miniature the error of each quantisation in the weights, in the adapter's delta, in the loss and in a
    LoRA that is trained.
python scripts/bench.py --count [-o docs/bench/count.json]
    Count on the meta device the work of a step of the full model, and of diffusers with peft: launches, bytes, memory.
python scripts/bench.py --guidance [-o docs/bench/guidance.json]
    Train the miniature with differential guidance, with clipping and with other learning rates, and compare the LoRAs.
python scripts/bench.py --optimizers [-o docs/bench/optimizers.json]
    Train the miniature with each optimizer at three learning rates and with three seeds, and compare the held-out loss.
python scripts/bench.py --adapters [-o docs/bench/adapter_kinds.json]
    Train the miniature with each kind and start of an adapter at three learning rates and with three seeds, and compare
    the held-out loss and the drift without the training adapter.
python scripts/bench.py --stacks [-o docs/bench/stacks.json]
    Train two concepts on the miniature, and measure what is drawn of both for each way to put the LoRAs together.
python scripts/bench.py --sliders [-o docs/bench/sliders.json]
    Train sliders of size on the miniature, and measure what each weight does; draws docs/images/slider.png too.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from zimage_train import mini
from zimage_train.config import schema
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.errors import ZImageTrainError
from zimage_train.lora import lora_file, training_adapter
from zimage_train.lora.training_adapter import TrainingAdapter
from zimage_train.measure import counting, peers, speed
from zimage_train.measure.budgets import BudgetCase, run_budget
from zimage_train.measure.equality import repeat_step
from zimage_train.measure.models import MEDIUM, RANK
from zimage_train.measure.records import Measurement, report
from zimage_train.measure.speed import SpeedCase
from zimage_train.models import transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import velocity
from zimage_train.planning.planner import AUTO_QUANTIZATIONS
from zimage_train.report import metrics

from laboratory.adapter_kinds import compare_adapters
from laboratory.optimizing import compare_optimizers
from laboratory.sliding import compare_sliders
from laboratory.stacking import compare_pairs

SLIDER_IMAGE = Path(__file__).parent.parent / "docs" / "images" / "slider.png"
BUDGETS_GB = (24.0, 16.0, 12.0, 8.0)
SIDES = {"full": (512, 768, 1024), "mini": (64, 96)}


def place_of(size: str) -> tuple[torch.device, TransformerShape, str]:
    """Return the device, the shape and the dtype of the model of this size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if size == "full" and device.type == "cpu":
        sys.exit("--size full needs a GPU; --size mini runs anywhere")
    return (device, TransformerShape(), "bf16") if size == "full" else (device, mini_shape(), "fp32")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory(size: str, steps: int, budgets: list[float]) -> dict[str, Any]:
    """Measure every budget at every resolution and quantisation."""
    device, shape, dtype = place_of(size)
    found = []
    for budget, side in itertools.product(budgets, SIDES[size]):
        for kind in AUTO_QUANTIZATIONS:
            case = BudgetCase(shape, dtype, side, kind, budget * 1e9, steps)
            plan = case.plan(device)
            row = {
                "budget_gb": budget,
                "side_px": side,
                "kind": plan.placement.quantization,
                "streamed": plan.placement.streamed,
                "mode": plan.mode_of(plan.workload.max_tokens),
                "fits": plan.fits,
                "predicted_gb": round(plan.peak.allocated / 1e9, 3),
            }
            if device.type == "cuda":
                torch.cuda.empty_cache()
            found.append(row | run_budget(case, device))
            gc.collect()
            print(json.dumps(found[-1]), flush=True)
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "size": size,
        "rank": RANK,
        "steps": steps,
        "runs": found,
    }


def mini_shape() -> TransformerShape:
    return transformer.read_weights(mini.TURBO / "transformer")[0]


def repeat(size: str, steps: int) -> dict[str, Any]:
    """Run the same step repeatedly, with torch's defaults and with those of a run; compare gradients and times."""
    device, shape, dtype = place_of(size)
    found: dict[str, Any] = {}
    for side in SIDES[size]:
        for name, row in repeat_step(shape, side, dtype, steps, device).items():
            found[f"{side} px, {name}"] = row
            print(side, name, row, flush=True)
    return {"device": device_name(device), "torch": torch.__version__, "size": size, "steps": found}


@torch.no_grad()
def quantize() -> dict[str, Any]:
    """Compare the miniature with its adapter in every quantisation to fp32, by losses on 16 fixed noisy latents."""
    found = {}
    losses: dict[str | None, torch.Tensor] = {}
    merged: TrainingAdapter = training_adapter.load_adapter(mini.ADAPTER_V1, 1.0, mini_shape())
    draw = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(16, 16, 12, 12, generator=draw) for _ in range(2))
    prompts = [torch.randn(24, 64, generator=draw)] * 16
    sigma = torch.linspace(0.05, 0.95, 16)
    for kind in (None, "int8", "fp8", "fp8_fast", "nf4"):
        frozen = load_frozen(mini.TURBO / "transformer", merged, "fp32", torch.device("cpu"), kind)
        mixed = (1 - sigma)[:, None, None, None] * x + sigma[:, None, None, None] * noise
        prediction = velocity(frozen.model, mixed, sigma, prompts)
        losses[kind] = F.mse_loss(prediction, noise - x, reduction="none").mean((1, 2, 3))
        if kind is not None:
            off = (losses[kind] / losses[None] - 1).abs()
            found[kind] = frozen.quantization.facts() | {
                "loss_error_mean": round(float(off.mean()), 6),
                "loss_error_worst": round(float(off.max()), 6),
            }
    return {"model": "miniature, fp32, adapter merged", "torch": torch.__version__, "kinds": found}


GUIDANCE_RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance 3": {"guidance": {"differential": 3.0}},
    "plain, clipped at 1": {"train": {"max_grad_norm": 1.0}},
    "guidance 3, clipped at 1": {"guidance": {"differential": 3.0}, "train": {"max_grad_norm": 1.0}},
    "plain, clipped at 1/3": {"train": {"max_grad_norm": 1 / 3}},
    "learning rate x 1.5": {"optimizer": {"lr": 1.5e-3}},
    "learning rate x 3": {"optimizer": {"lr": 3e-3}},
}


def guidance() -> dict[str, Any]:
    """Return the distance of each run's LoRA from that of the plain run, relative to the norm of the latter."""
    facts: dict[str, Any] = {}
    ends = _trained(GUIDANCE_RUNS, facts)
    plain = ends["plain"]
    for name, end in ends.items():
        facts[name] |= {
            "change": float(end.norm() / plain.norm()),
            "off_plain": float((end - plain).norm() / plain.norm()),
        }
    clipped = ends["guidance 3, clipped at 1"], ends["plain, clipped at 1/3"]
    return {
        "steps": GUIDANCE_STEPS,
        "runs": facts,
        "guided_and_clipped_at_1_against_clipped_at_a_third": float((clipped[0] - clipped[1]).norm() / plain.norm()),
    }


def _trained(runs: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the delta of each run's LoRA, all modules in one; add the median norm of its gradients to `facts`."""
    from zimage_train.commands.train import run_training  # here, since few benchmarks need the whole program

    ends: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as place:
        for index, (name, changes) in enumerate(runs.items()):
            config = _small_run(Path(place), f"run{index}x", changes)
            run_training(config, fresh=False)
            folder = Path(config.output_dir) / config.name
            lora = lora_file.read_lora(folder / "lora" / f"{config.name}.safetensors")
            ends[name] = torch.cat(
                [(factors.b.double() @ factors.a.double() * factors.scale).flatten() for factors in lora.values()]
            )
            records = metrics.read_records(folder / "metrics.jsonl")
            facts[name] = {"gradient_norm": median(record["grad_norm"] for record in records)}
    return ends


QUANTIZED_RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "another seed": {"seed": 1},
    "bf16": {"model": {"dtype": "bf16"}},
    **{f"bf16, {kind}": {"model": {"dtype": "bf16", "quantize": kind}} for kind in ("int8", "fp8", "fp8_fast", "nf4")},
}


def quantized_loras() -> dict[str, Any]:
    """Return the distance of the LoRA of each run from that of fp32, relative to the norm of the latter."""
    ends = _trained(QUANTIZED_RUNS, {})
    exact = ends["fp32"]
    off = {name: round(float((end - exact).norm() / exact.norm()), 4) for name, end in ends.items() if end is not exact}
    return {"steps": GUIDANCE_STEPS, "off_fp32": off}


GUIDANCE_STEPS = 200


def _small_run(place: Path, name: str, changes: dict[str, Any]) -> schema.Config:
    values: dict[str, Any] = {
        "name": name,
        "output_dir": str(place / "runs"),
        "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"},
        "data": [{"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb"}],
        "cache": {"folder": str(place / "cache")},
        "lora": {"rank": 8},
        "train": {"steps": GUIDANCE_STEPS, "max_grad_norm": None},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0},
        "sample": {"every": None},
        "save": {"every": None, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    for section, settings in changes.items():
        values[section] = values.get(section, {}) | settings if isinstance(settings, dict) else settings
    return schema.Config.model_validate(values)


SPEED_CASES = {
    "full": [
        *itertools.starmap(speed.square, itertools.product((512, 768, 1024), (1, 4))),
        SpeedCase("mixed epoch", speed.MIXED_SIZES),
    ],
    "medium": [speed.square(128, 1), speed.square(256, 1)],
    "mini": [speed.square(64, 1), SpeedCase("mixed epoch", ((96, 96), (64, 96)))],
}
LARGEST_RATIO = {"full": 0.5, "medium": 1.05, "mini": None}
"""Time of our step for that of diffusers with peft."""


def speed_of(size: str, against: Path | None) -> dict[str, Any]:
    """Time whole steps beside those of diffusers with peft, or of the trainer whose source is in `against`."""
    if size == "medium":
        device, shape, dtype = torch.device("cpu"), MEDIUM, "fp32"
        torch.set_num_threads(1)  # as a run on a CPU
    else:
        device, shape, dtype = place_of(size)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # as a run does
    make_peer = peers.diffusers_and_peft if against is None else partial(peers.load_peer, against)
    bound = LARGEST_RATIO[size] if against is None else None
    found = speed.compare_steps(shape, dtype, SPEED_CASES[size], device, make_peer, bound)
    if device.type == "cuda":
        ceiling = speed.matmul_tflops(device)
        found.append(Measurement("products of 8192 x 8192", round(ceiling, 1), "TFLOP/s"))
        for row in [row for row in found if row.claim.startswith("arithmetic of our step")]:
            found.append(Measurement(f"share of that, {row.claim}", round(row.value / ceiling, 3), "times"))
    return report(found, device) | {"size": size, "dtype": dtype, "rank": RANK}


def main(arguments: list[str]) -> int:
    """Run a benchmark, and print or write its result; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--speed", action="store_true")
    what.add_argument("--memory", action="store_true")
    what.add_argument("--repeat", action="store_true")
    what.add_argument("--quantize", action="store_true")
    what.add_argument("--guidance", action="store_true")
    what.add_argument("--optimizers", action="store_true")
    what.add_argument("--count", action="store_true")
    what.add_argument("--sliders", action="store_true")
    what.add_argument("--adapters", action="store_true")
    what.add_argument("--stacks", action="store_true")
    parser.add_argument("--size", choices=("full", "medium", "mini"), default="mini")
    parser.add_argument("--against", type=Path, help="source of musubi-tuner, SimpleTuner or AI Toolkit, for --speed")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS_GB, help="in GB")
    parser.add_argument("-o", "--output", "--json", type=Path)
    asked = parser.parse_args(arguments)
    if asked.size == "medium" and not asked.speed:
        parser.error("--size medium goes with --speed")
    if asked.against is not None and not asked.speed:
        parser.error("--against goes with --speed")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as zimage_train.__main__ does
    try:
        result = result_of(asked)
    except ZImageTrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    text = json.dumps(result, indent=1) + "\n"
    if asked.output is None:
        print(text)
    else:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(text, encoding="utf-8")
    return 0


def result_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark that is asked for."""
    if asked.speed:
        return speed_of(asked.size, asked.against)
    if asked.memory:
        return memory(asked.size, asked.steps, asked.budgets)
    if asked.repeat:
        return repeat(asked.size, asked.steps)
    if asked.optimizers:
        with tempfile.TemporaryDirectory() as place:
            return compare_optimizers(Path(place))
    if asked.adapters:
        with tempfile.TemporaryDirectory() as place:
            return compare_adapters(Path(place))
    if asked.stacks:
        with tempfile.TemporaryDirectory() as place:
            return compare_pairs(Path(place))
    if asked.sliders:
        with tempfile.TemporaryDirectory() as place:
            return compare_sliders(Path(place), SLIDER_IMAGE)
    if asked.count:
        return counting.comparison(SIDES["full"])
    return quantize() | {"loras": quantized_loras()} if asked.quantize else guidance()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
