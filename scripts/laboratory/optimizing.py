"""How fast each optimizer learns the concept of the miniature: the loss on images that it has not seen, by step.

Each is tried at three learning rates with one seed, and at the best of them with further seeds. A seed has its own
noise in the validation, so optimizers are compared seed by seed with the first of them. bitsandbytes keeps the state of
tensors as small as these in fp32, so its optimizers cannot be told apart here.
"""

import contextlib
import io
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.optimizers import OptimizerSettings
from zimage_train.config.schema import Config
from zimage_train.optim import optimizers
from zimage_train.optim.flat import FlatParameters
from zimage_train.report import metrics

STEPS, EVERY = 100, 25
SEEDS = (1, 2, 3)
NUM_HELD_OUT = 4
RANK = 8
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "adamw_schedulefree": (3e-3, 1e-2, 3e-2),
    "stable_adamw": (1e-3, 3e-3, 1e-2),
    "adopt": (3e-4, 1e-3, 3e-3),
    "came": (1e-4, 3e-4, 1e-3),
    "muon": (1e-3, 3e-3, 1e-2),
    "prodigy": (0.1, 0.25, 0.5),
}


def compare_optimizers(place: Path) -> dict[str, Any]:
    """Return for each optimizer its best learning rate, the curves of its seeds and the time of its update."""
    _split_images(place)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    first: list[Run] = []
    for name, rates in RATES.items():
        tried = {rate: _run(place, name, rate, SEEDS[0]) for rate in rates}
        best = min(tried, key=lambda rate: tried[rate].curve[STEPS])
        runs = [tried[best], *(_run(place, name, best, seed) for seed in SEEDS[1:])]
        first = first or runs
        seconds = median(run.step_seconds for run in runs)
        steps = min(STEPS, STEPS * median(run.step_seconds for run in first) / seconds)
        apart = [run.curve[STEPS] - other.curve[STEPS] for run, other in zip(runs, first, strict=True)]
        in_time = [_loss_at(run.curve, steps) - other.curve[STEPS] for run, other in zip(runs, first, strict=True)]
        found[name] = {
            "lr": best,
            "is_at_the_edge": best in (rates[0], rates[-1]),
            "loss_by_lr": {str(rate): round(run.curve[STEPS], 5) for rate, run in tried.items()},
            "learnt": round(fmean(run.curve[0] - run.curve[STEPS] for run in runs), 5),
            "behind_first": _mean_and_spread(apart),
            "behind_first_in_equal_time": _mean_and_spread(in_time),
            "step_ms": round(1000 * seconds, 1),
            "update_ms": round(1000 * _update_seconds(name, best), 2),
            "curves": [{step: round(loss, 5) for step, loss in run.curve.items()} for run in runs],
        }
        print(name, {key: value for key, value in found[name].items() if key != "curves"}, flush=True)
    return {"steps": STEPS, "rank": RANK, "seeds": len(SEEDS), "optimizers": found}


def _mean_and_spread(values: list[float]) -> list[float]:
    return [round(fmean(values), 5), round(stdev(values), 5)]


def _loss_at(curve: dict[int, float], step: float) -> float:
    """Return the loss at `step`, on a line between the validations before and after it."""
    before = int(step // EVERY * EVERY)
    if before == STEPS:
        return curve[STEPS]
    share = (step - before) / EVERY
    return (1 - share) * curve[before] + share * curve[before + EVERY]


def _split_images(place: Path) -> None:
    files = sorted(mini.IMAGES.iterdir())
    stems = sorted({path.stem for path in files})
    for path in files:
        folder = place / ("held_out" if path.stem in stems[-NUM_HELD_OUT:] else "trained")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True)
class Run:
    """A training with an optimizer."""

    curve: dict[int, float]
    """Step -> loss on the images that were held out."""
    step_seconds: float
    """Median time of a step."""


def _run(place: Path, name: str, lr: float, seed: int) -> Run:
    config = Config.model_validate(
        {
            "name": f"{name}_{lr:g}_{seed}x",
            "output_dir": str(place / "runs"),
            "seed": seed,
            "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"},
            "data": [{"folder": str(place / "trained"), "resolution": [64], "trigger": "zorb"}],
            "cache": {"folder": str(place / "cache")},
            "lora": {"rank": RANK},
            "train": {"steps": STEPS, "batch_size": 2},
            "optimizer": {"name": name, "lr": lr},
            "sample": {"every": None},
            "validation": {"folder": str(place / "held_out"), "every": EVERY, "resolution": 64},
            "save": {"every": None, "dtype": "fp32"},
            "log": {"tensorboard": False},
        }
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_training(config, fresh=False)
    folder = Path(config.output_dir) / config.name
    events = metrics.read_records(folder / "events.jsonl")
    curve = {event["step"]: event["loss"] for event in events if event.get("event") == "validation"}
    return Run(curve, median(record["seconds"] for record in metrics.read_records(folder / "metrics.jsonl")))


def _update_seconds(name: str, lr: float) -> float:
    """Return the least time of an update of a LoRA of rank 16 on 28 modules 768 wide, on one core."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(28):
        shapes |= {f"{index}.A": (16, 768), f"{index}.B": (768, 16)}
    flat = FlatParameters(shapes, list(shapes), torch.device("cpu"))
    flat.allocate_grads()
    settings = OptimizerSettings.model_validate({"name": name, "lr": lr})
    optimizer = optimizers.build_optimizer(settings, optimizers.parameters_for(settings.name, flat))
    times = []
    for index in range(12):
        flat.grads.normal_(generator=torch.Generator().manual_seed(index))
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return min(times[2:])
