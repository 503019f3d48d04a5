"""Pictures of a model in batches, and their scores: with diffusers alone, nothing of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from miniature import scores, world
from miniature.diffusion import TURBO_SIGMAS, predict, shifted
from miniature.fitting import rounded
from miniature.images import batched
from miniature.texts import features, tokens_of

BATCH = 64


@dataclass(frozen=True)
class Speed:
    """How an image is drawn. `guidance` is the pipeline's: it scales what is added, and 0 adds nothing."""

    steps: int
    guidance: float
    shift: float = 3.0

    @property
    def sigmas(self) -> list[float]:
        """The sigmas from 1 to 0."""
        return shifted(self.steps, self.shift)


TURBO_SPEED = Speed(8, 0)
assert TURBO_SPEED.sigmas == TURBO_SIGMAS
SLOW_SPEED = Speed(30, 1)


class Studio:
    """The parts that the whole family shares: tokenizer, text encoder and VAE of a folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = rounded(Qwen3ForCausalLM.from_pretrained(folder / "text_encoder"))
        self.vae = rounded(AutoencoderKL.from_pretrained(folder / "vae"))

    @torch.no_grad()
    def read(self, captions: list[str]) -> list[Tensor]:
        """Caption features in order."""
        ids = tokens_of(captions, self.tokenizer)
        return [
            state for part in batched(captions, BATCH) for state in features(self.encoder, [ids[text] for text in part])
        ]

    @torch.no_grad()
    def show(self, latents: Tensor) -> np.ndarray:
        """Decodes standardised latents: (images, height, width, 3) of uint8."""
        raw = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pixels = torch.cat([self.vae.decode(part).sample for part in raw.split(BATCH)])
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def draw(
        self, model: ZImageTransformer2DModel, captions: list[str], seed: int, speed: Speed, size: int = 64
    ) -> np.ndarray:
        """A square image of `size` px for each caption; the noise is a function of the seed alone."""
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(len(captions), 16, size // 8, size // 8, generator=generator, device="cpu")
        noise = noise.to(torch.get_default_device())
        texts = self.read(captions)
        blind = self.read([""])[0]
        drawn = [
            sample(model, noise[at : at + BATCH], texts[at : at + BATCH], blind, speed)
            for at in range(0, len(captions), BATCH)
        ]
        return self.show(torch.cat(drawn))


@torch.no_grad()
def sample(model: ZImageTransformer2DModel, noise: Tensor, texts: list[Tensor], blind: Tensor, speed: Speed) -> Tensor:
    """Euler steps, as the pipeline takes them: guided steps add `guidance` times the difference to no caption."""
    latents = noise
    for now, after in pairwise(speed.sigmas):
        sigma = torch.full((len(noise),), now)
        output = predict(model, latents, sigma, texts)
        if speed.guidance > 0:
            output = output + speed.guidance * (output - predict(model, latents, sigma, [blind] * len(noise)))
        latents = latents - (after - now) * output
    return latents


def load(folder: Path, *loras: Path) -> ZImageTransformer2DModel:
    """A transformer with LoRAs merged into it, as diffusers reads them."""
    model = rounded(ZImageTransformer2DModel.from_pretrained(folder))
    for file in loras:
        model.load_lora_adapter(load_file(file), prefix="diffusion_model")
        model.fuse_lora()
        model.unload_lora()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Score:
    """The means over some images, each in [0, 1]."""

    fidelity: float
    sharpness: float
    shape: float
    concept: float

    @property
    def quality(self) -> float:
        """What drift is measured by."""
        return self.fidelity * self.sharpness


def score(images: np.ndarray, scenes: list[world.Scene], concept: str = world.ZORB) -> Score:
    """Scores images against the scenes that were asked for."""
    seen = [scores.look(image) for image in images]
    return Score(
        fidelity=float(np.mean([scores.fidelity(found, asked) for found, asked in zip(seen, scenes, strict=True)])),
        sharpness=float(np.mean([found.sharpness for found in seen])),
        shape=float(np.mean([found.shape == asked.shape for found, asked in zip(seen, scenes, strict=True)])),
        concept=float(np.mean([scores.has_concept(found, concept) for found in seen])),
    )
