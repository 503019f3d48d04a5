"""How fast each optimizer learns the concept of the miniature: the loss on images that it has not seen, by step.

Each is tried at three learning rates with one seed, and at the best of them with further seeds.
"""

import contextlib
import io
import shutil
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config, OptimizerSettings
from zimage_train.optim import optimizers
from zimage_train.optim.flat import FlatParameters
from zimage_train.report import metrics

STEPS, EVERY = 100, 50
SEEDS = (1, 2, 3)
NUM_HELD_OUT = 4
RANK = 8
AS_ADAMW = (1e-3, 3e-3, 1e-2)
RATES: dict[str, tuple[float, ...]] = {
    "adamw": AS_ADAMW,
    "adamw8bit": AS_ADAMW,
    "adamw_schedulefree": AS_ADAMW,
    "stable_adamw": AS_ADAMW,
    "adopt": AS_ADAMW,
    "came": AS_ADAMW,
    "muon": AS_ADAMW,
    "prodigy": (0.5, 1.0, 2.0),
}


def compare_optimizers(place: Path) -> dict[str, Any]:
    """Return for each optimizer its best learning rate, the curves of its seeds and the time of its update."""
    _split_images(place)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, rates in RATES.items():
        tried = {rate: _curve(place, name, rate, SEEDS[0]) for rate in rates}
        best = min(tried, key=lambda rate: tried[rate][STEPS])
        curves = [tried[best], *(_curve(place, name, best, seed) for seed in SEEDS[1:])]
        ends = [curve[STEPS] for curve in curves]
        found[name] = {
            "lr": best,
            "is_at_the_edge": best in (rates[0], rates[-1]),
            "loss_by_lr": {str(rate): round(curve[STEPS], 5) for rate, curve in tried.items()},
            "loss": round(fmean(ends), 5),
            "spread": round(stdev(ends), 5),
            "curves": [{step: round(loss, 5) for step, loss in curve.items()} for curve in curves],
            "update_ms": round(1000 * _update_seconds(name, best), 3),
        }
        print(name, {key: found[name][key] for key in ("lr", "loss", "spread", "update_ms")}, flush=True)
    return {"steps": STEPS, "rank": RANK, "seeds": len(SEEDS), "optimizers": found}


def _split_images(place: Path) -> None:
    files = sorted(mini.IMAGES.iterdir())
    stems = sorted({path.stem for path in files})
    for path in files:
        folder = place / ("held_out" if path.stem in stems[-NUM_HELD_OUT:] else "trained")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def _curve(place: Path, name: str, lr: float, seed: int) -> dict[int, float]:
    """Return step -> loss on the images that were held out."""
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
    events = metrics.read_records(Path(config.output_dir) / config.name / "events.jsonl")
    return {event["step"]: event["loss"] for event in events if event.get("event") == "validation"}


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
