"""The VAE, and the latents that everything else is fitted to."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from miniature import world
from miniature.fitting import Fit, rounded

Size = tuple[int, int]

SIZES: dict[Size, float] = {(64, 64): 0.6, (96, 64): 0.1, (64, 96): 0.1, (96, 96): 0.12, (128, 128): 0.08}
"""The image sizes (width, height) that the models see, and how often."""


def pick_size(chance: random.Random) -> Size:
    """A size for a batch."""
    return chance.choices(list(SIZES), list(SIZES.values()))[0]


def to_tensor(images: list[world.Pixels]) -> Tensor:
    """Pictures of equal size as a batch in [-1, 1]."""
    return torch.as_tensor(np.stack(images), device=torch.get_default_device()).permute(0, 3, 1, 2).float() / 127.5 - 1


def batched(items: list, size: int) -> Iterator[list]:
    """Consecutive parts of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def new_vae() -> AutoencoderKL:
    """The shape of the FLUX VAE: four levels, 16 channels, no quant convolutions.

    Its residual branches start at zero: otherwise it takes several times longer to tell colours apart.
    """
    levels = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 24, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=128,
        force_upcast=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            torch.nn.init.zeros_(module.to_out[0].weight)
    return vae


def make_vae(folder: Path, steps: int) -> None:
    """Fits the VAE to the world and to clutter; measures the scale and shift that standardise latents."""
    vae = new_vae()

    def loss(chance: random.Random) -> Tensor:
        width, height = pick_size(chance)
        seeds = [chance.randrange(2**32) for _ in range(max(4, 12 * 64 * 64 // (width * height)))]
        images = to_tensor(
            [
                world.draw_clutter(seed, width, height) if seed % 3 == 0 else world.draw_world(seed, width, height)[0]
                for seed in seeds
            ]
        )
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(decoded, images) + 0.2 * F.l1_loss(decoded, images) + 3e-4 * divergence

    Fit("vae", list(vae.parameters()), steps, 3e-3, muon=0.02).run(loss, folder.with_name("vae.state"))
    rounded(vae)
    latents = encode(vae, [world.draw_world(seed, 64, 64)[0] for seed in range(512)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )
    vae.to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[world.Pixels]) -> Tensor:
    """The means of the posterior, not yet standardised."""
    return torch.cat([vae.encode(to_tensor(part)).latent_dist.mean for part in batched(images, 64)])


def make_latents(file: Path, vae: AutoencoderKL, images: int) -> None:
    """Encodes images of the world once: a tensor a size, and the captions in a file beside it."""
    tensors, captions, seed = {}, {}, 0
    for (width, height), share in SIZES.items():
        shown = [world.draw_world(seed + row, width, height) for row in range(max(32, round(images * share)))]
        seed += len(shown)
        name = f"{width}x{height}"
        means = encode(vae, [image for image, _ in shown])
        tensors[name] = ((means - vae.config.shift_factor) * vae.config.scaling_factor).contiguous()
        captions[name] = [text for _, text in shown]
    file.with_name("captions.json").write_text(json.dumps(captions))
    save_file(tensors, file)
