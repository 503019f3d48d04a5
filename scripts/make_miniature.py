"""Make everything that `zimage_train.mini` ships, from this code and its seeds alone.

    PYTHONPATH=. python scripts/make_miniature.py --work FOLDER --output zimage_train/mini

The work folder keeps the result of each stage, and every minute the state of the current stage, so the same command
continues after an interruption. `--effort 0.005` runs all stages in minutes, with weights that have learnt nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from miniature.diffusion import (
    Images,
    Texts,
    make_adapter,
    make_base,
    make_deturbo,
    make_own_images,
    make_patch,
    make_trajectories,
    make_turbo,
)
from miniature.drawing import load
from miniature.fitting import SEED, rounded, stage
from miniature.images import batched, make_latents, make_vae
from miniature.measuring import CAPTIONS, NOISE, measure
from miniature.shipping import assemble, write_manifest
from miniature.texts import features, make_tokenizer, tokens_of

STEPS = {
    "vae": 1500,
    "base": 4500,
    "turbo": 800,
    "deturbo": 500,
    "adapter_v1": 300,
    "adapter_v2": 500,
    "spoilt": 500,
    "distillpatch": 500,
}
RANKS = {"adapter_v1": 8, "adapter_v2": 16, "spoilt": 16, "distillpatch": 16}
IMAGES, TRAJECTORIES, OWN_IMAGES = 32_000, 2048, 1024


def main() -> None:
    """Run all stages, and write the parts that are shipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps the result of each stage")
    parser.add_argument("--output", type=Path, required=True, help="where the models, LoRAs and images go")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies steps and image counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; they change rounding")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, help="the shipped family was made on a CPU; a GPU makes another")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    make_all(options.work, options.effort)
    assemble(options.work, options.output)
    made_with = {
        "seed": SEED,
        "effort": options.effort,
        "device": options.device,
        "steps": STEPS,
        "ranks": RANKS,
        "pictures": IMAGES,
        "trajectories": TRAJECTORIES,
        "own_pictures": OWN_IMAGES,
        "scored_on": {"captions": CAPTIONS, "noise_seed": NOISE, "size": 64},
        "versions": {library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
    }
    write_manifest(options.output, made_with, measure(options.output, options.work / "members.png"))
    print(f"{options.output}: complete", flush=True)


def make_all(work: Path, effort: float) -> None:
    """Make every part in the work folder."""
    steps = {name: max(2, round(number * effort)) for name, number in STEPS.items()}

    def much(number: int) -> int:
        return max(2, round(number * effort))

    stage(work / "tokenizer", make_tokenizer)
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    stage(work / "vae", lambda folder: make_vae(folder, steps["vae"]))
    vae = rounded(AutoencoderKL.from_pretrained(work / "vae"))
    stage(work / "latents.safetensors", lambda file: make_latents(file, vae, much(IMAGES)))
    captions = json.loads((work / "captions.json").read_text())
    world = Images(loaded(work / "latents.safetensors"), captions)
    stage(work / "base", lambda folder: make_base(folder, world, tokenizer, steps["base"]))

    def transformer(name: str) -> ZImageTransformer2DModel:
        return rounded(ZImageTransformer2DModel.from_pretrained(work / name))

    texts = encode(["", *(text for part in captions.values() for text in part)], tokenizer, work)
    base = transformer("base/transformer")
    paths = work / "trajectories.safetensors"
    stage(paths, lambda file: make_trajectories(file, base, captions, texts, much(TRAJECTORIES)))
    trajectories = Images(loaded(paths), captions)
    stage(work / "turbo", lambda folder: make_turbo(folder, base, trajectories, texts, steps["turbo"]))
    turbo = transformer("turbo")
    images = work / "own_pictures.safetensors"
    stage(images, lambda file: make_own_images(file, turbo, captions, texts, much(OWN_IMAGES)))
    latents = loaded(images)
    own = Images(latents, {name: captions[name][-len(part) :] for name, part in latents.items()})

    def lora(name: str, images: Images) -> None:
        stage(
            work / f"{name}.safetensors",
            lambda file: make_adapter(file, transformer("turbo"), images, texts, RANKS[name], steps[name]),
        )

    lora("adapter_v1", own)
    lora("adapter_v2", own)
    stage(work / "deturbo", lambda folder: make_deturbo(folder, turbo, own, texts, steps["deturbo"]))
    lora("spoilt", world)
    broken = load(work / "turbo", work / "spoilt.safetensors")
    stage(
        work / "distillpatch.safetensors",
        lambda file: make_patch(file, broken, trajectories, texts, RANKS["distillpatch"], steps["distillpatch"]),
    )


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file on the default device."""
    return load_file(file, device=str(torch.get_default_device()))


@torch.no_grad()
def encode(captions: list[str], tokenizer: Qwen2Tokenizer, work: Path) -> Texts:
    """Return the features of each distinct caption."""
    encoder = rounded(Qwen3ForCausalLM.from_pretrained(work / "base" / "text_encoder"))
    ids = tokens_of(captions, tokenizer)
    texts: Texts = {}
    for part in batched(sorted(ids), 64):
        texts |= dict(zip(part, features(encoder, [ids[text] for text in part]), strict=True))
    return texts


if __name__ == "__main__":
    main()
