"""Token ids, embeddings and latents, against transformers and diffusers run whole."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from zimage_train import mini
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.measure.proofs.claims import Claim, largest, not_tried
from zimage_train.measure.proofs.subject import PROMPTS, Subject
from zimage_train.models import vae
from zimage_train.models.arch import MAX_PROMPT_TOKENS
from zimage_train.models.text_encoder import load_text_encoder

IDS, EMBEDDINGS = "prompts become the token ids of diffusers' pipeline", "embeddings are those of transformers"
LATENTS = "latents are those of diffusers' VAE"
FINER = {"bf16": torch.float32, "fp32": torch.float64}
"""Precision of the reference, by that of the encoder."""
ROUNDING = 2.0
"""How far a result may be from the finer reference, as a multiple of the reference's own rounding."""
SHARE_OF_DEVICE = 0.8
"""Share of the device that weights may take where the reference runs beside nothing else."""
NUM_IMAGES = 10


def text_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on token ids and embeddings of `PROMPTS`, against transformers' own model run whole."""
    extras = subject.paths.extras
    if not (extras.text_encoder.is_dir() and extras.tokenizer.is_dir()):
        for promise in (IDS, EMBEDDINGS):
            yield not_tried(promise, "transformers loads a folder, and this is a single file")
        return
    dtype, finer = TORCH_DTYPES[subject.dtype], FINER[subject.dtype]
    encoder = load_text_encoder(extras, subject.device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(extras.tokenizer, local_files_only=True)
    theirs = {prompt: reference_ids(tokenizer, prompt) for prompt in PROMPTS}
    differ = sum(encoder.tokens(prompt) != theirs[prompt] for prompt in PROMPTS)
    yield Claim(IDS, differ, "prompts that differ", 0, "equality", f"{len(PROMPTS)} prompts")
    encoder_config = encoder.config
    all_layers = encoder_config.num_hidden_layers
    fitting = (number for number in range(all_layers, 0, -1) if fits_in(encoder_config, number, finer, subject))
    layers = next(fitting, 0)
    if layers == 0:
        yield not_tried(EMBEDDINGS, "not even one layer of the reference fits main memory")
        return
    encoder_config.num_hidden_layers = layers
    ours = dict(encoder.encode_all(PROMPTS))
    del encoder
    exact = hidden_states(extras.text_encoder, theirs, layers, finer, torch.device("cpu"))
    fits = dtype.itemsize * num_parameters(encoder_config, layers + 1) < SHARE_OF_DEVICE * subject.device_bytes
    device = subject.device if fits else torch.device("cpu")
    rounded = hidden_states(extras.text_encoder, theirs, layers, dtype, device)
    part = "" if layers == all_layers else f", the first {layers} of {all_layers} layers, as all of them do not fit"
    yield _within_rounding(EMBEDDINGS, ours, rounded, exact, f"{len(PROMPTS)} prompts in {subject.dtype}{part}")


def fits_in(config: Qwen3Config, layers: int, finer: torch.dtype, subject: Subject) -> bool:
    """Return whether the reference of `layers` layers, which has one more, fits main memory."""
    return finer.itemsize * num_parameters(config, layers + 1) <= subject.host_bytes


def num_parameters(config: Qwen3Config, layers: int) -> int:
    """Return the weights of the first `layers` layers and of the table of embeddings."""
    key_value_heads = config.num_key_value_heads or config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * key_value_heads
    layer = config.hidden_size * (config.head_dim * heads + 3 * config.intermediate_size)
    return layers * layer + config.vocab_size * config.hidden_size


def reference_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return token ids as `ZImagePipeline` makes them: the chat template, cut to the length that the model reads."""
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    padded = tokenizer([text], padding="max_length", max_length=MAX_PROMPT_TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids[0][padded.attention_mask[0].bool()].tolist()


@torch.no_grad()
def hidden_states(
    folder: Path, ids: dict[str, list[int]], layers: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return the states after `layers` layers of transformers' own model for each prompt, on the CPU.

    With all layers but the last these are `hidden_states[-2]`, of which the pipeline makes its embeddings.
    """
    config = Qwen3Config.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = layers + 1
    config.layer_types = config.layer_types[: layers + 1] if config.layer_types else None
    model: Any = Qwen3Model.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
    model = model.to(device).eval()
    found = {}
    for prompt, tokens in ids.items():
        output = model(torch.tensor([tokens], device=device), output_hidden_states=True)
        found[prompt] = output.hidden_states[-2][0].cpu()
    del model
    gc.collect()
    return found


@torch.no_grad()
def latent_claims(subject: Subject) -> Iterator[Claim]:
    """Yield a claim on the latents of ten images, against diffusers' VAE run whole."""
    path = subject.paths.extras.vae
    if not path.is_dir():
        yield not_tried(LATENTS, "diffusers loads a folder, and this is a single file")
        return
    side = subject.side
    images = []
    for file in sorted(mini.IMAGES.glob("*.png"))[:NUM_IMAGES]:
        images.append(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
    own = vae.load_vae(path, subject.device, torch.float32)
    ours: dict[str, Tensor] = {}
    for number, image in enumerate(images):
        ours[str(number)] = vae.encode_images(own, vae.to_pixels(image)[None])[0].cpu()
    del own
    # As cuDNN has it in a run, too.
    precision = "fp32, with convolutions in TF32" if subject.device.type == "cuda" else "fp32"
    exact = reference_latents(path, images, torch.float64, subject.device)
    rounded = reference_latents(path, images, torch.float32, subject.device)
    yield _within_rounding(LATENTS, ours, rounded, exact, f"{len(images)} images of {side} px in {precision}")


def reference_latents(
    path: Path, images: list[Image.Image], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return the latents of diffusers' own VAE and image processor, on the CPU."""
    model: Any = AutoencoderKL.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    model = model.to(device).eval()
    processor = VaeImageProcessor()
    found = {}
    for number, image in enumerate(images):
        pixels = processor.preprocess(image).to(device, dtype)
        mode = model.encode(pixels).latent_dist.mode()[0]
        found[str(number)] = ((mode - model.config.shift_factor) * model.config.scaling_factor).cpu()
    return found


def _within_rounding(
    promise: str, ours: dict[str, Tensor], rounded: dict[str, Tensor], exact: dict[str, Tensor], note: str
) -> Claim:
    """Return the claim that `ours` is as near to `exact` as the reference's own run in the same precision."""
    error = largest(relative(ours[name], exact[name]) for name in exact)
    own_rounding = largest(relative(rounded[name], exact[name]) for name in exact)
    return Claim(promise, error, "of the norm", ROUNDING * own_rounding, "own rounding", note)


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the distance relative to the norm; infinite where sizes differ."""
    if found.shape != exact.shape:
        return float("inf")
    return float((found.double() - exact.double()).norm() / exact.double().norm())
