"""The transformers: Base with its text encoder, Turbo, what training takes out of Turbo, and what puts it back."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Tokenizer

from miniature.fitting import Fit, save_in_two_shards
from miniature.images import SIZES, batched, pick_size
from miniature.texts import features, new_text_encoder, tokens_of

Latents = dict[str, Tensor]  # by size, as "96x64"
Captions = dict[str, list[str]]  # by size too
Texts = dict[str, Tensor]  # by caption

SHIFT = 3.0
TURBO_STEPS = 8
TEACHER_STEPS = (4, 4, 4, 4, 6, 8, 12, 24)
"""The steps of the teacher within each of Turbo's; the grain is decided in the last steps."""
TEACHER_GUIDANCE = 2.0
"""The pipeline's `guidance_scale`: what is added to the output is this times the difference to no caption."""
GUIDED_FROM = 0.7
"""Below this sigma the teacher is not guided: what is drawn is decided by then, and guidance would take its grain."""

ADAPTED = r"layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
"""The modules of the real training adapter: all eight linears of every main layer, none of the refiners."""


def new_transformer() -> ZImageTransformer2DModel:
    """Z-Image with what can be kept: 16 latent channels, patches of 2, axes as long as the real axes."""
    model = ZImageTransformer2DModel(
        dim=96,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    for pad in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(pad, std=0.02)
    return model


def predict(model: ZImageTransformer2DModel, latents: Tensor, sigma: Tensor, texts: list[Tensor]) -> Tensor:
    """The raw output for a batch of a single size: an estimate of x0 - noise."""
    output = model(list(latents.unsqueeze(2)), 1 - sigma, texts, return_dict=False)[0]
    return torch.stack(output).squeeze(2)


def shifted(steps: int, shift: float) -> list[float]:
    """The sigmas of evenly spaced steps from 1 to 0 after the shift."""
    return [shift * value / (1 + (shift - 1) * value) for value in (1 - step / steps for step in range(steps + 1))]


TURBO_SIGMAS = shifted(TURBO_STEPS, SHIFT)


class Images:
    """Latents and captions of several sizes, drawn in batches of a single size."""

    def __init__(self, latents: Latents, captions: Captions, batch: int = 64) -> None:
        self.latents, self.captions, self.batch = latents, captions, batch

    def draw(self, chance: random.Random, dropout: float) -> tuple[Tensor, list[str]]:
        """A batch, of fewer images where they are larger; some lose their captions."""
        width, height = pick_size(chance)
        name = f"{width}x{height}"
        count = max(4, self.batch * 64 * 64 // (width * height))
        rows = [chance.randrange(len(self.latents[name])) for _ in range(count)]
        return self.latents[name][rows], ["" if chance.random() < dropout else self.captions[name][row] for row in rows]


def flow_matching(model: ZImageTransformer2DModel, clean: Tensor, texts: list[Tensor]) -> Tensor:
    """Plain flow matching. The shift is less than Turbo's, since grain is decided at low sigmas."""
    uniform = torch.rand(len(clean))
    sigma = 2 * uniform / (1 + uniform)
    noise = torch.randn_like(clean)
    weight = sigma.view(-1, 1, 1, 1)
    output = predict(model, (1 - weight) * clean + weight * noise, sigma, texts)
    return F.mse_loss(output, clean - noise)


def make_base(folder: Path, images: Images, tokenizer: Qwen2Tokenizer, steps: int) -> None:
    """Fits a transformer and its text encoder together: a folder with both."""
    model, encoder = new_transformer(), new_text_encoder(tokenizer)
    ids = tokens_of(["", *(text for part in images.captions.values() for text in part)], tokenizer)

    def loss(chance: random.Random) -> Tensor:
        clean, texts = images.draw(chance, dropout=0.1)
        return flow_matching(model, clean, features(encoder, [ids[text] for text in texts]))

    parameters = [*model.parameters(), *(p for name, p in encoder.named_parameters() if is_read(name))]
    Fit("base", parameters, steps, 2e-3, muon=0.03).run(loss, folder.with_name("base.state"))
    folder.mkdir()
    save_in_two_shards(model, folder / "transformer")
    save_in_two_shards(encoder, folder / "text_encoder")


def is_read(name: str) -> bool:
    """Whether Z-Image's features depend on this parameter of the text encoder: all but the last layer and norm."""
    return not name.startswith(("model.layers.3.", "model.norm."))


# Turbo ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def euler(model: ZImageTransformer2DModel, noise: Tensor, texts: list[Tensor], sigmas: list[float]) -> Tensor:
    """Where Euler steps through `sigmas` lead, without guidance."""
    latents = noise
    for now, after in pairwise(sigmas):
        latents = latents - (after - now) * predict(model, latents, torch.full((len(noise),), now), texts)
    return latents


@torch.no_grad()
def teach(model: ZImageTransformer2DModel, noise: Tensor, texts: list[Tensor], no_text: Tensor) -> Tensor:
    """A guided trajectory of many steps, seen at Turbo's sigmas: (images, steps + 1, 16, height, width).

    Turbo's sigmas are among the teacher's, so every state is a state that the teacher was in.
    """
    latents, states = noise, [noise]
    for (begin, end), count in zip(pairwise(TURBO_SIGMAS), TEACHER_STEPS, strict=True):
        for now, after in pairwise(begin + (end - begin) * step / count for step in range(count + 1)):
            sigma = torch.full((len(noise),), now)
            output = predict(model, latents, sigma, texts)
            if now >= GUIDED_FROM:
                output = output + TEACHER_GUIDANCE * (output - predict(model, latents, sigma, [no_text] * len(texts)))
            latents = latents - (after - now) * output
        states.append(latents)
    return torch.stack(states, 1)


def make_trajectories(file: Path, base: ZImageTransformer2DModel, captions: Captions, texts: Texts, count: int) -> None:
    """Base's guided trajectories for the first captions of each size, in half precision."""
    tensors, began = {}, 0
    for (width, height), share in SIZES.items():
        name = f"{width}x{height}"
        parts = []
        for part in batched(captions[name][: max(8, round(count * share))], 64):
            noise = torch.randn(len(part), 16, height // 8, width // 8)
            parts.append(teach(base, noise, [texts[text] for text in part], texts[""]).half())
            began += len(part)
            print(f"trajectories: {began}", flush=True)
        tensors[name] = torch.cat(parts)
    save_file(tensors, file)


def imitate(model: ZImageTransformer2DModel, trajectories: Images, texts: Texts, chance: random.Random) -> Tensor:
    """The error of the model's output at a random state of each trajectory against the mean velocity to the next."""
    states, shown = trajectories.draw(chance, dropout=0)
    at = torch.tensor([chance.randrange(TURBO_STEPS) for _ in shown])
    rows = torch.arange(len(shown))
    now, after = states[rows, at].float(), states[rows, at + 1].float()
    sigmas = torch.tensor(TURBO_SIGMAS)
    width = (sigmas[at] - sigmas[at + 1]).view(-1, 1, 1, 1)
    return F.mse_loss(predict(model, now, sigmas[at], [texts[text] for text in shown]), (after - now) / width)


def make_turbo(folder: Path, model: ZImageTransformer2DModel, trajectories: Images, texts: Texts, steps: int) -> None:
    """Distils Base, in place, to eight steps without guidance."""
    model.requires_grad_(True)

    def loss(chance: random.Random) -> Tensor:
        return imitate(model, trajectories, texts, chance)

    Fit("turbo", list(model.parameters()), steps, 5e-4, muon=0.01).run(loss, folder.with_name("turbo.state"))
    save_in_two_shards(model, folder)


def make_own_images(file: Path, turbo: ZImageTransformer2DModel, captions: Captions, texts: Texts, count: int) -> None:
    """Turbo's own images for the last captions of each size, as latents; nothing was distilled on these."""
    tensors = {}
    for (width, height), share in SIZES.items():
        name = f"{width}x{height}"
        parts = []
        for part in batched(captions[name][-max(8, round(count * share)) :], 64):
            noise = torch.randn(len(part), 16, height // 8, width // 8)
            parts.append(euler(turbo, noise, [texts[text] for text in part], TURBO_SIGMAS))
        tensors[name] = torch.cat(parts)
    save_file(tensors, file)


# What training takes out of Turbo, and what puts it back ---------------------------------------------------


def make_deturbo(folder: Path, model: ZImageTransformer2DModel, own: Images, texts: Texts, steps: int) -> None:
    """Fits all of Turbo, in place, to its own images by plain flow matching."""
    model.requires_grad_(True)

    def loss(chance: random.Random) -> Tensor:
        clean, shown = own.draw(chance, dropout=0.1)
        return flow_matching(model, clean, [texts[text] for text in shown])

    Fit("deturbo", list(model.parameters()), steps, 5e-4, muon=0.01).run(loss, folder.with_name("deturbo.state"))
    save_in_two_shards(model, folder)


def make_adapter(
    file: Path, model: ZImageTransformer2DModel, images: Images, texts: Texts, rank: int, steps: int
) -> None:
    """Fits a LoRA to images by plain flow matching.

    On Turbo's own images that is a training adapter: the damage of training, and nothing new.
    """
    parameters = add_lora(model, rank)

    def loss(chance: random.Random) -> Tensor:
        clean, shown = images.draw(chance, dropout=0)
        return flow_matching(model, clean, [texts[text] for text in shown])

    Fit(file.stem, parameters, steps, 2e-3).run(loss, file.with_name(file.stem + ".state"))
    save_lora(model, file)


def make_patch(
    file: Path, broken: ZImageTransformer2DModel, trajectories: Images, texts: Texts, rank: int, steps: int
) -> None:
    """Fits a LoRA that gives a model which plain training has spoilt its eight steps back."""
    parameters = add_lora(broken, rank)

    def loss(chance: random.Random) -> Tensor:
        return imitate(broken, trajectories, texts, chance)

    Fit(file.stem, parameters, steps, 2e-3).run(loss, file.with_name(file.stem + ".state"))
    save_lora(broken, file)


def add_lora(model: ZImageTransformer2DModel, rank: int) -> list[Tensor]:
    """Adds a LoRA to the main layers and returns what of it is to be fitted."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_lora(model: ZImageTransformer2DModel, file: Path) -> None:
    """Saves the LoRA in the layout of the real training adapter."""
    state = get_peft_model_state_dict(model)
    save_file({f"diffusion_model.{key}": value.to(torch.bfloat16).contiguous() for key, value in state.items()}, file)
