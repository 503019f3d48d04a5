"""Run the trainer on a GPU, on a Z-Image of full size with random weights.

    PYTHONPATH=. python scripts/full_size.py --work FOLDER [-o docs/bench/full_size.json] [--seconds 540]

Writes a model of 20 GB in the hub's layout into the work folder, then runs the usual commands on it, each in its own
process. The results are written after each command; commands for which no time is left are listed as not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from zimage_train import mini
from zimage_train.lora import targets
from zimage_train.models.arch import TransformerShape

from miniature import world

IMAGES = 4
ADAPTER_RANK = 16
LARGEST_SHARD = 10**10
TEXT_ENCODER = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
    tie_word_embeddings=True,
    dtype=torch.bfloat16,
)
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}


@dataclass(frozen=True)
class Trial:
    """A run of `train`, as changes to the common config."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    first: int | None = None
    """Stop after so many steps, and continue with a second command."""


SHORT = {"sample": {"every": None}}
"""Changes that leave out the previews."""


def trials(lora: Path) -> list[Trial]:
    """Return the trials, the most important first."""
    own = {"model": {"adapter": None}, "data": [{"resolution": [512]}], **SHORT}
    imitation = {"train": {"method": "trajectory_imitation", "steps": 4}, "lora": {"init_from": str(lora)}}
    return [
        Trial("1024"),
        Trial("1024_again", {**SHORT, "train": {"steps": 6}}),
        Trial("1024_continued", {**SHORT, "train": {"steps": 6}}, first=3),
        Trial("512", {"data": [{"resolution": [512]}], **SHORT}),
        Trial("imitation_512", {**own, **imitation, "teacher": {"steps": 16}}),
        Trial("de_distill_512", {**own, "train": {"method": "de_distill", "steps": 4}}),
        Trial("int8_1024", {"model": {"quantize": "int8"}, **SHORT}),
        Trial("nf4_1024", {"model": {"quantize": "nf4"}, **SHORT}),
        Trial("12gb_768", {"memory": {"budget_gb": 12}, "data": [{"resolution": [768]}], **SHORT}),
        Trial("8gb_512", {"memory": {"budget_gb": 8}, "data": [{"resolution": [512]}], **SHORT}),
        Trial("768", {"data": [{"resolution": [768]}], **SHORT}),
    ]


def config(trial: Trial, work: Path) -> dict[str, Any]:
    """Return the config of a trial: defaults, with a single image per step at 1024 px, and the changes of the trial."""
    values: dict[str, Any] = {
        "name": f"full_{trial.name}x",  # a name may not end in digits
        "output_dir": str(work / "runs"),
        "model": {"path": str(work / "turbo"), "adapter": str(work / "adapter.safetensors")},
        "data": [{"folder": str(work / "pictures"), "resolution": [1024], "trigger": "zchar"}],
        "cache": {"folder": str(work / "cache")},
        "train": {"steps": 6},
        "sample": {"every": 6, "prompts": ["zchar in a garden", "a boat on a lake"]},
        "save": {"every": 3},
    }
    for section, changed in trial.changes.items():
        if section == "data":
            values["data"] = [old | new for old, new in zip(values["data"], changed, strict=True)]
        else:
            values[section] = values.get(section, {}) | changed
    return values


# The model --------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_model(folder: Path, device: torch.device) -> None:
    """Write a model of random weights into `folder`, in the layout of the hub."""
    partial = folder.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    draw = torch.Generator(device).manual_seed(1)

    def random(size: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randn(size, generator=draw, device=device)
        return (drawn / size[-1] ** 0.5 if len(size) > 1 else 1 + 0.02 * drawn).bfloat16().cpu()

    shape = TransformerShape()
    part = partial / "transformer"
    part.mkdir(parents=True)
    sharded(part, "diffusion_pytorch_model", {name: random(size) for name, size in shape.parameters.items()})
    described = {"_class_name": "ZImageTransformer2DModel", **shape.config()}
    (part / "config.json").write_text(json.dumps(described))
    torch.manual_seed(1)
    with torch.device(device):
        encoder = Qwen3ForCausalLM(TEXT_ENCODER).bfloat16()
    encoder.cpu().save_pretrained(partial / "text_encoder")
    AutoencoderKL(**VAE).save_pretrained(partial / "vae")
    for name in ("tokenizer", "scheduler", "model_index.json"):
        (partial / name).symlink_to(mini.TURBO / name)
    partial.rename(folder)


def sharded(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as shards of at most 10 GB, with their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > LARGEST_SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def make_lora(file: Path, modules: tuple[str, ...], seed: int) -> None:
    """Write a LoRA of random weights whose delta is about a thousandth of the model's weights."""
    shape, draw, tensors = TransformerShape(), torch.Generator().manual_seed(seed), {}
    for name in targets.select_modules(list(modules), shape.linears):
        outs, ins = shape.linears[name]
        a = torch.randn(ADAPTER_RANK, ins, generator=draw) / ins**0.5
        b = torch.randn(outs, ADAPTER_RANK, generator=draw) * 1e-3 / ADAPTER_RANK**0.5
        tensors |= {
            f"diffusion_model.{name}.lora_{side}.weight": matrix.bfloat16() for side, matrix in (("A", a), ("B", b))
        }
    save_file(tensors, file)


def make_images(folder: Path) -> None:
    """Write enlarged images of the miniature's world, with captions."""
    folder.mkdir()
    for number in range(IMAGES):
        image, text = world.drawn(world.world_scene(number), 128, 128)
        Image.fromarray(image).resize((1024, 1024)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{text}, a photo in a sunlit garden, half body, warm light")


# What is run ------------------------------------------------------------------------------------------------


def run(words: list[str], log: Path, timeout: float) -> tuple[int, float]:
    """Run a command of the trainer with its output in `log`, and return its exit code and seconds."""
    began = time.monotonic()
    with log.open("a") as told:
        told.write(f"$ zimage-train {' '.join(words)}\n")
        told.flush()
        try:
            command = [sys.executable, "-m", "zimage_train", *words]
            code = subprocess.run(command, stdout=told, stderr=subprocess.STDOUT, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return 124, round(time.monotonic() - began, 1)
    return code.returncode, round(time.monotonic() - began, 1)


def train(trial: Trial, work: Path, logs: Path, left: Callable[[], float]) -> dict[str, Any]:
    """Run a trial, and return its losses, times, peak memory, plan, events and the digest of its LoRA."""
    values = config(trial, work)
    path, log = work / f"{trial.name}.yaml", logs / f"{trial.name}.txt"
    path.write_text(yaml.safe_dump(values))
    if trial.first is not None:
        code, _ = run(["train", str(path), "--set", f"train.steps={trial.first}"], log, left())
        if code:
            return {"exit_code": code}
    code, seconds = run(["train", str(path)], log, left())
    folder = work / "runs" / values["name"]
    found: dict[str, Any] = {"exit_code": code, "seconds": seconds}
    if (folder / "metrics.jsonl").exists():
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found |= {
            "losses": [record["loss"] for record in records],
            "seconds_a_step": [record["seconds"] for record in records],
            "median_seconds": round(statistics.median([record["seconds"] for record in records][1:] or [0]), 4),
            "gb": max(record["gb"] for record in records),
        }
    if (folder / "run.json").exists():
        facts = json.loads((folder / "run.json").read_text())
        found |= {key: facts[key] for key in ("plan", "rehearsal", "adapter", "lora", "quantized") if key in facts}
    if (folder / "events.jsonl").exists():
        found["events"] = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    lora = folder / "lora" / f"{values['name']}.safetensors"
    if lora.exists():
        found["lora_sha256"] = hashlib.sha256(lora.read_bytes()).hexdigest()
    return found


def commands(work: Path) -> dict[str, list[str]]:
    """Return the commands that are run after the trials, by name."""
    turbo, lora = str(work / "turbo"), str(work / "lora.safetensors")
    return {
        "sample": ["sample", turbo, "--lora", lora, "--prompt", "zchar in a garden", "-o", str(work / "sampled")],
        "drift": ["drift", turbo, "--lora", lora, "--width", "512", "--height", "512", "-o", str(work / "drift")],
        "doctor": ["doctor"],
    }


def main() -> None:
    """Make the model, run all trials and commands, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the runs; needs 20 GB")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/bench/full_size.json"))
    parser.add_argument(
        "--logs", type=Path, help="folder for the output of the commands; default: logs in the work folder"
    )
    parser.add_argument(
        "--seconds", type=float, default=3600, help="time limit; a command that is running then is killed"
    )
    parser.add_argument("--only", nargs="*", help="names of the trials and commands to run; default: all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a model of 6 B parameters needs a GPU")
    end = time.monotonic() + options.seconds
    work, logs = options.work, options.logs or options.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if not (work / "turbo").exists():
        make_model(work / "turbo", torch.device("cuda"))
        torch.cuda.empty_cache()
        make_images(work / "pictures")
        make_lora(work / "adapter.safetensors", ("attention", "feed_forward", "adaln"), 1)
        make_lora(work / "lora.safetensors", ("attention", "feed_forward"), 2)
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    found |= {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "made_in_seconds": round(time.monotonic() - began, 1),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return max(1.0, end - time.monotonic())

    def note(name: str, do: Callable[[], dict[str, Any]]) -> None:
        if options.only and name not in options.only:
            return
        found[name] = do() if left() > 30 else {"not_run": "no time was left"}
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        shown = {key: found[name].get(key) for key in ("exit_code", "seconds", "median_seconds", "gb", "not_run")}
        print(f"{name}: {shown}", flush=True)

    for trial in trials(work / "lora.safetensors"):
        note(trial.name, lambda trial=trial: train(trial, work, logs, left))
    for name, words in commands(work).items():
        note(name, lambda name=name, words=words: _told(run(words, logs / f"{name}.txt", left())))


def _told(outcome: tuple[int, float]) -> dict[str, Any]:
    return dict(zip(("exit_code", "seconds"), outcome, strict=True))


if __name__ == "__main__":
    main()
