"""The drift of kinds and starts of adapters: trained on Turbo with the training adapter, used on it without.

Each at three learning rates, with the same images, steps and seeds. The concept is the loss on images that no run has
seen, at fixed noise; the drift is what the run's own meter says on prompts without the concept. Whoever learns more
drifts more, so each is also compared with a LoRA at the rate at which that has the same loss.
"""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.diffusion import drift, flow
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import bake, headers, lora_file, swap
from zimage_train.models import text_encoder, vae
from zimage_train.models.components import ExtrasPaths
from zimage_train.models.transformer import velocity

from laboratory.metering import NOISE, PROMPTS, silent
from laboratory.running import lora_of
from miniature import world
from miniature.measuring import scenes

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "lokr": {"type": "lokr", "factor": 4},
    "loha": {"type": "loha", "rank": 8},
    "dora": {"type": "dora", "rank": 8},
    "oft": {"type": "oft", "rank": 8},
    "orthogonal": {"rank": 8, "start": "orthogonal"},
    "pissa": {"rank": 8, "start": "pissa"},
}
RATES, SEEDS, STEPS = (3e-4, 1e-3, 3e-3), (1, 2, 3), 130
OTHER_RATES = {"lokr": (3e-3, 1e-2, 3e-2), "loha": (3e-3, 1e-2, 3e-2), "oft": (3e-4, 1e-3, 2e-3)}
"""Rates of those that hardly learn at the rates of a LoRA, or no longer learn at the highest."""
IMAGES, HELD_OUT, SIZE = 96, 24, 64
SIGMAS = [0.3, 0.5, 0.6429, 0.75, 0.9, 0.9545]
CPU = torch.device("cpu")
Points = list[tuple[float, float]]
"""Loss and drift of the same seed at each rate."""


class Meter:
    """Measures files on Turbo."""

    def __init__(self) -> None:
        self._model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model
        encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
        prompts = [world.caption(shown, SIZE, SIZE) for shown in scenes()[-PROMPTS:]]
        self._embeds = {prompt: encoder.encode(prompt) for prompt in prompts}
        requests = [
            SamplingRequest(
                prompt=prompt, negative="", seed=NOISE + i, width=SIZE, height=SIZE, steps=8, guidance=0.0, shift=3.0
            )
            for i, prompt in enumerate(prompts)
        ]
        self._walked = drift.record_trajectories(self._model, requests, self._embeds, silent)
        autoencoder = vae.load_vae(mini.TURBO / "vae", CPU, torch.float32)
        self._held_out: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index in range(HELD_OUT):
            image, caption = world.draw_zorb(10_000 + index, SIZE, SIZE)
            latents = vae.encode_images(autoencoder, vae.to_pixels(Image.fromarray(image))[None])
            self._held_out.append((latents, encoder.encode(caption)))

    def measure(self, path: Path | None) -> tuple[float, float]:
        """Return concept loss and drift with the file, or without any."""
        deltas = {} if path is None else lora_file.read_deltas(path, headers.READ)
        with swap.with_lora(self._model, deltas):
            found = drift.overall_deviation(drift.deviations(self._model, self._walked, self._embeds, silent))
            return self._loss(), found

    def _loss(self) -> float:
        losses: list[float] = []
        for index, (latents, embeds) in enumerate(self._held_out):
            x0, sigma = latents.expand(len(SIGMAS), -1, -1, -1), torch.tensor(SIGMAS)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(index))
            with torch.no_grad():
                noisy = flow.interpolate(x0, noise, sigma)
                predicted = velocity(self._model, noisy, sigma, [embeds] * len(SIGMAS))
            losses.append(float((predicted - flow.target_velocity(x0, noise)).square().mean()))
        return fmean(losses)


def compare_adapters(place: Path) -> dict[str, Any]:
    """Return loss and drift of each adapter at each rate, as mean and spread over the seeds.

    `over_lora` is how much more it drifts than a LoRA of the same seed that has the same loss, where there is one.
    """
    images = place / "zorbs"
    images.mkdir(parents=True, exist_ok=True)
    for index in range(IMAGES):
        image, caption = world.draw_zorb(index, SIZE, SIZE)
        Image.fromarray(image).save(images / f"{index:03d}.png")
        (images / f"{index:03d}.txt").write_text(caption)
    torch.set_num_threads(1)
    meter = Meter()
    points: dict[str, dict[int, Points]] = {}
    found: dict[str, Any] = {}
    for name in ADAPTERS:
        rates = OTHER_RATES.get(name, RATES)
        by_seed = points.setdefault(name, {})
        for seed in SEEDS:
            by_seed[seed] = [meter.measure(_trained(place, images, name, seed, rate)) for rate in rates]
        found[name] = {}
        for number, rate in enumerate(rates):
            measured = [by_seed[seed][number] for seed in SEEDS]
            over = [_over(point, points["lora"][seed]) for seed, point in zip(SEEDS, measured, strict=True)]
            found[name][f"{rate:g}"] = {
                "loss": _mean_and_spread([loss for loss, _ in measured]),
                "drift": _mean_and_spread([one for _, one in measured]),
                "over_lora": None if None in over else _mean_and_spread([one for one in over if one is not None]),
            }
            print(name, rate, found[name][f"{rate:g}"], flush=True)
    loss, _ = meter.measure(None)
    return {"steps": STEPS, "loss_without": round(loss, 4), "settings": ADAPTERS, "adapters": found}


def _over(point: tuple[float, float], plain: Points) -> float | None:
    """Return the drift beyond that of a LoRA of the same loss, on lines between its rates; None beyond all of them."""
    loss, found = point
    for (loss0, drift0), (loss1, drift1) in pairwise(sorted(plain)):
        if loss0 <= loss <= loss1:
            share = 0.0 if loss1 == loss0 else (loss - loss0) / (loss1 - loss0)
            return found - (drift0 + share * (drift1 - drift0))
    return None


def _mean_and_spread(values: list[float]) -> list[float]:
    return [round(fmean(values), 4), round(stdev(values), 4)]


def _with_adapter(place: Path) -> Path:
    """Return Turbo with the training adapter in its weights."""
    folder = place / "turbo_with_adapter"
    if not folder.exists():
        deltas = lora_file.read_deltas(mini.ADAPTER_V1)
        bake.bake_checkpoint(mini.TURBO / "transformer", deltas, False, "fp32", folder, {"format": "pt"}, silent)
    return folder


def _trained(place: Path, images: Path, name: str, seed: int, rate: float) -> Path:
    model: dict[str, Any] = {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1)}
    if ADAPTERS[name].get("type") == "oft":
        # Refused beside an adapter because of what is measured here; on a model with the adapter in it the same is
        # trained.
        model = {"path": str(_with_adapter(place)), "extras": str(mini.TURBO), "adapter": None}
    values = {
        "name": f"{name}_{rate:g}_seed{seed}x",
        "seed": seed,
        "output_dir": str(place / "runs"),
        "cache": {"folder": str(place / "cache")},
        "model": model | {"dtype": "fp32"},
        "data": [{"folder": str(images), "resolution": [SIZE], "trigger": "zorb"}],
        "lora": ADAPTERS[name],
        "train": {"steps": STEPS, "batch_size": 4},
        "optimizer": {"name": "adamw", "lr": rate},
        "sample": {"every": None},
        "save": {"every": None, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    config = Config.model_validate(values)
    if not lora_of(values).exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run_training(config, fresh=True)
    return lora_of(values)
