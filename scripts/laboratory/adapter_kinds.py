"""What each kind of adapter costs in drift: trained on Turbo with the training adapter, and used on Turbo without it.

The same images, steps and rate for each kind and seed. The concept is the loss on images that no run has seen, at fixed
noise; the drift is what the run's own meter says on prompts without the concept. A DoRA was measured before the trainer
refused it with a training adapter, and takes a trainer without that check (`Config._method_fits`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image

from zimage_train import mini
from zimage_train.diffusion import drift, flow
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import lora_file, swap
from zimage_train.models import text_encoder, vae
from zimage_train.models.components import ExtrasPaths
from zimage_train.models.transformer import velocity

from laboratory.metering import NOISE, PROMPTS, silent
from laboratory.running import lora_of, train
from miniature import world
from miniature.measuring import scenes

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 8},
    "lokr": {"type": "lokr", "factor": 4},
    "loha": {"type": "loha", "rank": 8},
    "dora": {"type": "dora", "rank": 8},  # refused now; see above
}
STEPS, RATE, SEEDS = 300, 3e-3, (1, 2, 3)
IMAGES, HELD_OUT, SIZE = 96, 24, 64
SIGMAS = [0.3, 0.5, 0.6429, 0.75, 0.9, 0.9545]
CPU = torch.device("cpu")


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
        deltas = {} if path is None else lora_file.read_deltas(path)
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


def compare_kinds(place: Path, kinds: list[str]) -> dict[str, Any]:
    """Return concept loss and drift of each kind and seed, and how far its drift is from a LoRA's of the same seed."""
    images = place / "zorbs"
    images.mkdir(parents=True, exist_ok=True)
    for index in range(IMAGES):
        image, caption = world.draw_zorb(index, SIZE, SIZE)
        Image.fromarray(image).save(images / f"{index:03d}.png")
        (images / f"{index:03d}.txt").write_text(caption)
    meter = Meter()
    loss, _ = meter.measure(None)
    found: dict[str, Any] = {}
    for name in kinds:
        measured = [meter.measure(_trained(place, images, name, seed)) for seed in SEEDS]
        concept, drifts = [round(loss, 4) for loss, _ in measured], [round(one, 4) for _, one in measured]
        first = found.get("lora", {"drift": drifts})["drift"]
        apart = [one - other for one, other in zip(drifts, first, strict=True)]
        found[name] = {"concept_loss": concept, "drift": drifts, "drift_over_lora": [fmean(apart), stdev(apart)]}
        print(name, found[name], flush=True)
    return {"steps": STEPS, "lr": RATE, "loss_without": round(loss, 4), "settings": KINDS, "kinds": found}


def _trained(place: Path, images: Path, name: str, seed: int) -> Path:
    config = {
        "name": f"{name}-seed{seed}",
        "seed": seed,
        "output_dir": str(place / "runs"),
        "cache": {"folder": str(place / "cache")},
        "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"},
        "data": [{"folder": str(images), "resolution": [SIZE], "trigger": "zorb"}],
        "lora": KINDS[name],
        "train": {"steps": STEPS, "batch_size": 4},
        "optimizer": {"lr": RATE},
        "sample": {"every": None},
        "save": {"every": None, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    train(config)
    return lora_of(config)


if __name__ == "__main__":
    folder, output, *wanted = sys.argv[1:]
    Path(output).write_text(json.dumps(compare_kinds(Path(folder), wanted or list(KINDS)), indent=1) + "\n")
