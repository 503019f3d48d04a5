"""Does it learn? Held-out loss at fixed noise: below that without the LoRA, and captions matter."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.diffusion import flow
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.lora import layers, lora_file
from zimage_train.models import text_encoder, vae
from zimage_train.models.components import ExtrasPaths
from zimage_train.models.transformer import velocity

from miniature.world import draw_zorb

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
HELD_OUT, IMAGES = 24, 96
SIGMAS = [0.3, 0.5, 0.6429, 0.75, 0.9, 0.9545]


def held_out_loss(lora: Path | None) -> float:
    """Mean velocity error on new zorbs at fixed noise, on true Turbo with the exported file."""
    frozen = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    if lora is not None:
        layers.attach_fixed_lora(frozen.model, lora_file.read_lora(lora))
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    autoencoder = vae.load_vae(mini.TURBO / "vae", CPU, torch.float32)
    total = 0.0
    for index in range(HELD_OUT):
        image, caption = draw_zorb(10_000 + index, 64, 64)
        x0 = vae.encode_images(autoencoder, vae.to_pixels(Image.fromarray(image))[None]).expand(len(SIGMAS), -1, -1, -1)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(index))
        sigma = torch.tensor(SIGMAS)
        with torch.no_grad():
            predicted = velocity(
                frozen.model, flow.interpolate(x0, noise, sigma), sigma, [encoder.encode(caption)] * len(SIGMAS)
            )
        total += float((predicted - flow.target_velocity(x0, noise)).square().mean())
    return total / HELD_OUT


def images(folder: Path, shift: int = 0) -> Path:
    """Zorbs with their captions, or each with the caption of another zorb."""
    folder.mkdir()
    drawn = [draw_zorb(index, 64, 64) for index in range(IMAGES)]
    for index, (image, _) in enumerate(drawn):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(drawn[(index + shift) % IMAGES][1])
    return folder


def test_held_out_loss_falls(make_config, tmp_path: Path):
    """The held-out loss falls, and falls further with the right captions."""
    exported = {}
    for name, shift in (("right", 0), ("shuffled", 5)):
        config = make_config(
            name=name,
            data=[{"folder": str(images(tmp_path / name, shift)), "resolution": [64], "trigger": "zorb"}],
            lora={"rank": 8},
            train={"steps": 130, "batch_size": 4},
            optimizer={"lr": 3e-3},
        )
        run_training(config, fresh=False)
        exported[name] = Path(config.output_dir) / name / "lora" / f"{name}.safetensors"
    without, right, shuffled = (
        held_out_loss(None),
        held_out_loss(exported["right"]),
        held_out_loss(exported["shuffled"]),
    )
    print(f"held-out loss: without {without:.4f}, shuffled captions {shuffled:.4f}, right captions {right:.4f}")
    assert right < 0.85 * without
    assert right < 0.95 * shuffled
