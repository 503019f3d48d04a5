"""Makes everything that `zimage_train.mini` ships, from nothing but this code and its seeds.

    python scripts/make_miniature.py --work FOLDER --output zimage_train/mini

The work folder keeps one result a stage; a stage whose result is there is skipped, so a stopped run goes on
where it was. `--effort 0.02` goes through all stages in a minute, with weights that have learnt nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from zimage_train.mini import world

Size = tuple[int, int]
Latents = dict[str, Tensor]  # by size, as "96x64"
Captions = dict[str, list[str]]  # by size too
Texts = dict[str, Tensor]  # by caption

SEED = 20260
SIZES: dict[Size, float] = {(64, 64): 0.5, (96, 64): 0.12, (64, 96): 0.12, (96, 96): 0.16, (128, 128): 0.1}
"""The picture sizes (width, height) that the models see, and how often."""

VAE_STEPS, TRANSFORMER_STEPS, ADAPTER_STEPS = 1300, 2000, 500
CACHED_PICTURES = 8000
OWN_SAMPLES = 768
SHIFT = 3.0
TURBO_STEPS = 8

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""What Qwen3's template does with plain messages."""

ADAPTED = r"layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
"""The modules of the real training adapter: all eight linears of every main layer, none of the refiners."""

PICTURE_SIZES: list[Size] = [
    (96, 96), (128, 96), (96, 144), (160, 128), (112, 112), (144, 96), (96, 128), (128, 160),
    (128, 128), (192, 128), (80, 112), (64, 96), (176, 112), (96, 176), (160, 160), (120, 72),
]  # fmt: skip


# Stages ---------------------------------------------------------------------------------------------------


def stage(result: Path, make: Callable[[Path], None]) -> None:
    """Makes `result` unless it is there. It appears under its name only when it is whole."""
    if result.exists():
        print(f"{result.name}: there already", flush=True)
        return
    print(f"{result.name}: making it", flush=True)
    partial = result.with_name("partial." + result.name)
    if partial.is_dir():
        shutil.rmtree(partial)
    began = time.monotonic()
    torch.manual_seed(SEED)
    make(partial)
    partial.rename(result)
    print(f"{result.name}: made in {time.monotonic() - began:.0f} s", flush=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Fifty steps of warmup, then a cosine down to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Muon:
    """Momentum whose matrices are orthogonalised (Newton-Schulz) before they are applied (Jordan, 2024).

    After a few hundred steps the error of the VAE is a quarter of what AdamW alone reaches.
    """

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95) -> None:
        self.matrices, self.momentum = matrices, momentum
        self.buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update of every matrix; a convolution counts as a matrix of (outputs, all the rest)."""
        for matrix, buffer in zip(self.matrices, self.buffers, strict=True):
            buffer.mul_(self.momentum).add_(matrix.grad)
            update = matrix.grad.add(buffer, alpha=self.momentum).flatten(1)
            tall = update.shape[0] > update.shape[1]
            update = (update.T if tall else update) / (update.norm() + 1e-7)
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update + (2.0315 * gram @ gram - 4.775 * gram) @ update
            update = update.T if tall else update
            stretch = max(1, matrix.shape[0] / matrix[0].numel()) ** 0.5
            matrix.add_(update.reshape(matrix.shape), alpha=-rate * stretch)


def fit(
    name: str, parameters: list[Tensor], steps: int, peak: float, loss: Callable[[], Tensor], muon: float
) -> Iterator[int]:
    """AdamW on `loss()`, and Muon for the matrices unless its peak rate is 0; yields each finished step."""
    matrices = [p for p in parameters if muon and p.ndim > 1 and p.shape[0] > 1]
    orthogonal = Muon(matrices)
    taken = {id(matrix) for matrix in matrices}
    optimizer = torch.optim.AdamW([p for p in parameters if id(p) not in taken], betas=(0.9, 0.98))
    began, shown = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        value = loss()
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        orthogonal.step(learning_rate(step, steps, muon))
        shown = value.item() if step == 0 else 0.98 * shown + 0.02 * value.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (time.monotonic() - began) / (step + 1)
            print(f"{name}: step {step + 1}/{steps} loss {shown:.4f} {rate:.2f} s/step", flush=True)
        yield step


def pick_size(chance: random.Random) -> Size:
    """A size for one batch."""
    return chance.choices(list(SIZES), list(SIZES.values()))[0]


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float32 with the values that its bf16 files will hold."""
    return model.to(torch.bfloat16).float().eval().requires_grad_(False)


# Text -----------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> None:
    """Trains byte-level BPE with Qwen's splitting on captions of the world: its words become tokens."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    captions = [world.draw_world(seed, 16, 16)[1] for seed in range(4000)]
    raw.train_from_iterator(captions + ["user\n", "assistant\n"] * 100, trainer)
    merges = json.loads(raw.to_str())["model"]["merges"]
    tokenizer = Qwen2Tokenizer(
        vocab=raw.get_vocab(),
        merges=[tuple(merge) for merge in merges],
        model_max_length=131072,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)


def make_text_encoder(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """A random Qwen3. Its embeddings outweigh what the layers add, so hidden states tell words apart."""
    config = Qwen3Config(
        vocab_size=8 * math.ceil(len(tokenizer) / 8),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    save_in_two_shards(model, folder)


def encode_captions(captions: list[str], tokenizer: Qwen2Tokenizer, encoder: Qwen3ForCausalLM) -> Texts:
    """Caption features: the last hidden state but one of the templated prompt, at true length."""
    features = {}
    for text in sorted(set(captions)):
        message = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        with torch.no_grad():
            output = encoder.model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True)
        features[text] = output.hidden_states[-2][0]
    return features


# Pictures and the VAE -------------------------------------------------------------------------------------


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures of one size as a batch in [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    chance = random.Random(SEED)

    def loss() -> Tensor:
        width, height = pick_size(chance)
        seeds = [chance.randrange(2**32) for _ in range(max(3, 8 * 64 * 64 // (width * height)))]
        drawn = [
            world.draw_clutter(seed, width, height) if seed % 2 else world.draw_world(seed, width, height)[0]
            for seed in seeds
        ]
        pictures = to_tensor(drawn)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(decoded, pictures) + 0.2 * F.l1_loss(decoded, pictures) + 3e-4 * divergence

    for _ in fit("vae", list(vae.parameters()), steps, 3e-3, loss, muon=0.02):
        pass
    rounded(vae)
    with torch.no_grad():
        seen = [world.draw_world(seed, 64, 64)[0] for seed in range(512)]
        latents = torch.cat([vae.encode(to_tensor(part)).latent_dist.mean for part in batched(seen, 32)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )
    vae.to(torch.bfloat16).save_pretrained(folder)


def batched(items: list, size: int) -> Iterator[list]:
    """Consecutive parts of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def make_latents(file: Path, vae: AutoencoderKL, pictures: int) -> None:
    """Encodes pictures of the world once: a tensor a size, and the captions in the header."""
    tensors, captions, seed = {}, {}, 0
    for (width, height), share in SIZES.items():
        drawn = []
        for _ in range(max(32, round(pictures * share))):
            drawn.append(world.draw_world(seed, width, height))
            seed += 1
        means = []
        with torch.no_grad():
            for part in batched([image for image, _ in drawn], 32):
                means.append(vae.encode(to_tensor(part)).latent_dist.mean)
        name = f"{width}x{height}"
        standard = (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor
        tensors[name] = standard.contiguous()
        captions[name] = [text for _, text in drawn]
    save_file(tensors, file)
    file.with_name("captions.json").write_text(json.dumps(captions))


# The transformer ------------------------------------------------------------------------------------------


def new_transformer() -> ZImageTransformer2DModel:
    """Z-Image with what can be kept: 16 latent channels, patches of 2, axes as long as the real ones."""
    return ZImageTransformer2DModel(
        dim=96,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )


def predict(model: ZImageTransformer2DModel, latents: Tensor, sigma: Tensor, texts: list[Tensor]) -> Tensor:
    """The raw output for a batch of one size: an estimate of x0 - noise."""
    output = model(list(latents.unsqueeze(2)), 1 - sigma, texts, return_dict=False)[0]
    return torch.stack(output).squeeze(2)


class Batches:
    """Draws batches of one size from cached latents, with their caption features; a tenth has no caption."""

    def __init__(self, latents: Latents, captions: Captions, texts: Texts) -> None:
        self.latents, self.captions, self.texts = latents, captions, texts
        self.chance = random.Random(SEED)

    def draw(self) -> tuple[Tensor, list[Tensor]]:
        """One batch; larger pictures come in fewer numbers, so that all batches cost about the same."""
        width, height = pick_size(self.chance)
        name = f"{width}x{height}"
        count = 32 if width * height < 96 * 96 else 16
        rows = [self.chance.randrange(len(self.captions[name])) for _ in range(count)]
        shown = ["" if self.chance.random() < 0.1 else self.captions[name][row] for row in rows]
        return self.latents[name][rows], [self.texts[text] for text in shown]

    def flow_matching_loss(self, model: ZImageTransformer2DModel) -> Tensor:
        """Plain flow matching, with sigma uniform before the shift of Turbo."""
        clean, texts = self.draw()
        uniform = torch.rand(len(clean))
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        weight = sigma.view(-1, 1, 1, 1)
        output = predict(model, (1 - weight) * clean + weight * noise, sigma, texts)
        return F.mse_loss(output, clean - noise)


def make_transformer(folder: Path, batches: Batches, steps: int) -> None:
    """Fits the transformer and keeps the running average of its weights."""
    model = new_transformer()
    for pad in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(pad, std=0.02)
    parameters = list(model.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]

    def loss() -> Tensor:
        return batches.flow_matching_loss(model)

    for step in fit("transformer", parameters, steps, 2e-3, loss, muon=0.03):
        decay = min(0.995, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    save_in_two_shards(model, folder)


@torch.no_grad()
def turbo_latents(model: ZImageTransformer2DModel, noise: Tensor, texts: list[Tensor]) -> Tensor:
    """Eight Euler steps at the shifted sigmas."""
    grid = [1 - step / TURBO_STEPS for step in range(TURBO_STEPS + 1)]
    sigmas = [SHIFT * value / (1 + (SHIFT - 1) * value) for value in grid]
    latents = noise
    for now, after in pairwise(sigmas):
        latents = latents - (after - now) * predict(model, latents, torch.full((len(noise),), now), texts)
    return latents


# The training adapter -------------------------------------------------------------------------------------


def make_own_samples(file: Path, model: ZImageTransformer2DModel, captions: Captions, texts: Texts, count: int) -> None:
    """Turbo's own pictures for the first captions of each size, as latents."""
    tensors = {}
    for (width, height), share in SIZES.items():
        name = f"{width}x{height}"
        shown = captions[name][: max(16, round(count * share))]
        parts = []
        for part in batched(shown, 32):
            noise = torch.randn(len(part), 16, height // 8, width // 8)
            parts.append(turbo_latents(model, noise, [texts[text] for text in part]))
        tensors[name] = torch.cat(parts)
    save_file(tensors, file)


def make_adapter(file: Path, model: ZImageTransformer2DModel, batches: Batches, steps: int) -> None:
    """Fits a LoRA to Turbo's own pictures by plain flow matching: the damage of training, and nothing new."""
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ADAPTED))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        return batches.flow_matching_loss(model)

    for _ in fit("adapter", parameters, steps, 2e-3, loss, muon=0.0):
        pass
    state = get_peft_model_state_dict(model)
    save_file({f"diffusion_model.{key}": value.to(torch.bfloat16) for key, value in state.items()}, file)


# What ships -----------------------------------------------------------------------------------------------


def save_in_two_shards(model: torch.nn.Module, folder: Path) -> None:
    """Saves in bf16 as two files and an index, as the hub folders have them."""
    model.to(torch.bfloat16)
    total = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=round(total * 0.6))


def make_pictures(folder: Path) -> None:
    """The pictures to learn from: no pair of colours comes twice."""
    folder.mkdir(parents=True)
    seen: set[str] = set()
    seed = 0
    for number, (width, height) in enumerate(PICTURE_SIZES, start=1):
        while True:
            image, text = world.draw_zorb(seed, width, height)
            seed += 1
            pair = " ".join(word for word in text.replace(",", "").split() if word in world.COLOURS)
            if pair not in seen:
                break
        seen.add(pair)
        stem = folder / f"zorb_{number:02d}"
        if number % 3:
            image.save(stem.with_suffix(".png"), optimize=True)
        else:
            image.save(stem.with_suffix(".jpg"), quality=95)
        stem.with_suffix(".txt").write_text(text + "\n")


def assemble(work: Path, output: Path) -> None:
    """Puts the parts together in the output folder, replacing what was there."""
    turbo = output / "turbo"
    for old in (turbo, output / "pictures"):
        shutil.rmtree(old, ignore_errors=True)
    for part in ("tokenizer", "text_encoder", "vae", "transformer"):
        shutil.copytree(work / part, turbo / part, copy_function=shutil.copyfile)
        for config in (turbo / part).glob("*config.json"):
            forget_paths(config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)
    scheduler.save_pretrained(turbo / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (turbo / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(work / "adapter.safetensors", output / "adapter.safetensors")
    make_pictures(output / "pictures")


def forget_paths(config: Path) -> None:
    """Removes what the libraries note about where a model was loaded from."""
    content = json.loads(config.read_text())
    for key in ("_name_or_path", "name_or_path"):
        content.pop(key, None)
    config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Goes through the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps the result of each stage")
    parser.add_argument("--output", type=Path, required=True, help="where turbo, adapter and pictures go")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies steps and picture counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; they change rounding")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    def much(number: int) -> int:
        return max(2, round(number * options.effort))

    stage(work / "tokenizer", make_tokenizer)
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    stage(work / "text_encoder", lambda folder: make_text_encoder(folder, tokenizer))
    encoder = rounded(Qwen3ForCausalLM.from_pretrained(work / "text_encoder"))

    stage(work / "vae", lambda folder: make_vae(folder, much(VAE_STEPS)))
    vae = rounded(AutoencoderKL.from_pretrained(work / "vae"))
    stage(work / "latents.safetensors", lambda file: make_latents(file, vae, much(CACHED_PICTURES)))
    latents = load_file(work / "latents.safetensors")
    captions: Captions = json.loads((work / "captions.json").read_text())
    texts = encode_captions([""] + [text for part in captions.values() for text in part], tokenizer, encoder)

    data = Batches(latents, captions, texts)
    stage(work / "transformer", lambda folder: make_transformer(folder, data, much(TRANSFORMER_STEPS)))
    model = rounded(ZImageTransformer2DModel.from_pretrained(work / "transformer"))
    samples = work / "own_samples.safetensors"
    stage(samples, lambda file: make_own_samples(file, model, captions, texts, much(OWN_SAMPLES)))
    own = load_file(samples)
    own_data = Batches(own, {name: captions[name][: len(own[name])] for name in own}, texts)
    stage(work / "adapter.safetensors", lambda file: make_adapter(file, model, own_data, much(ADAPTER_STEPS)))

    assemble(work, options.output)
    print(f"{options.output}: complete", flush=True)


if __name__ == "__main__":
    main()
