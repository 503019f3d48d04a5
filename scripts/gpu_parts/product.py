"""The commands of the product on a Z-Image of full size with random weights, each in its own process.

The first case writes a model of 20 GB in the hub's layout into a work folder, which the others use:
$ZIMAGE_WORK, or zimage-full-size in the folder for temporary files. A dry run takes the miniature instead.
"""

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from zimage_train import mini
from zimage_train.lora import targets
from zimage_train.models.arch import TransformerShape

from gpu_parts.parts import TRIALS
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
COMMAND_SECONDS = 230.0


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Run a trial or a command, and return what it gave and took."""
    name = "zimage-dry" if dry else "zimage-full-size"
    work = Path(os.environ.get("ZIMAGE_WORK") or tempfile.gettempdir()) / name
    made_seconds = prepare(work, dry)
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    if case in TRIALS:
        trial = next(trial for trial in trials(work / "lora.safetensors") if trial.name == case)
        found = train(trial, work, logs, dry)
    else:
        code, seconds = run(commands(work)[case], logs / f"{case}.txt")
        found = {"exit_code": code, "seconds": seconds}
    if found["exit_code"]:
        log = (logs / f"{case}.txt").read_text()
        raise RuntimeError(f"exit code {found['exit_code']}: {log[-600:]}")
    return found | {"made_seconds": made_seconds}


def prepare(work: Path, dry: bool) -> float | None:
    """Make the model, its LoRAs and the images unless they are there; return the seconds that it took."""
    if (work / "complete").exists():
        return None
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.monotonic()
    make_images(work / "pictures")
    if dry:
        (work / "turbo").symlink_to(mini.TURBO)
        shutil.copy(mini.ADAPTER_V1, work / "adapter.safetensors")
        shutil.copy(mini.ADAPTER_V1, work / "lora.safetensors")
    else:
        make_model(work / "turbo", torch.device("cuda"))
        torch.cuda.empty_cache()
        make_lora(work / "adapter.safetensors", ("attention", "feed_forward", "adaln"), 1)
        make_lora(work / "lora.safetensors", ("attention", "feed_forward"), 2)
    (work / "complete").touch()
    return round(time.monotonic() - began, 1)


def trials(lora: Path) -> list[Trial]:
    """Return the trials."""
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
        Trial("fp8_fast_1024", {"model": {"quantize": "fp8_fast"}, **SHORT}),
        Trial("nf4_1024", {"model": {"quantize": "nf4"}, **SHORT}),
        Trial("12gb_768", {"memory": {"budget_gb": 12}, "data": [{"resolution": [768]}], **SHORT}),
        Trial("8gb_512", {"memory": {"budget_gb": 8}, "data": [{"resolution": [512]}], **SHORT}),
        Trial("768", {"data": [{"resolution": [768]}], **SHORT}),
        # Long enough for the shares of the stages: 200 steps and three times two previews.
        Trial("whole_1024", {"train": {"steps": 200}, "sample": {"every": 100}, "save": {"every": 100}}),
    ]


def config(trial: Trial, work: Path, dry: bool = False) -> dict[str, Any]:
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
    if dry:
        values["data"] = [entry | {"resolution": [64]} for entry in values["data"]]
        values["model"] |= {"dtype": "fp32"}
        values["sample"] |= {"width": 64, "height": 64}
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


def run(words: list[str], log: Path, timeout: float = COMMAND_SECONDS) -> tuple[int, float]:
    """Run a command of the trainer with its output in `log`, and return its exit code and seconds."""
    began = time.monotonic()
    with log.open("a") as told:
        told.write(f"$ zimage-train {' '.join(words)}\n")
        told.flush()
        command = [sys.executable, "-m", "zimage_train", *words]
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started too, whose memory the next one needs
            process.wait()
            code = 124
    return code, round(time.monotonic() - began, 1)


FACTS = (*("plan", "rehearsal", "adapter", "lora", "quantized", "fused_blocks", "captured_steps"),)
"""What is kept of run.json."""


def train(trial: Trial, work: Path, logs: Path, dry: bool) -> dict[str, Any]:
    """Run a trial, and return its losses, times, peak memory, plan, events and the digest of its LoRA."""
    values = config(trial, work, dry)
    shutil.rmtree(work / "runs" / values["name"], ignore_errors=True)  # of a case that failed before
    path, log = work / f"{trial.name}.yaml", logs / f"{trial.name}.txt"
    path.write_text(yaml.safe_dump(values))
    if trial.first is not None:
        code, _ = run(["train", str(path), "--set", f"train.steps={trial.first}"], log)
        if code:
            return {"exit_code": code}
    code, seconds = run(["train", str(path)], log)
    folder = work / "runs" / values["name"]
    found: dict[str, Any] = {"exit_code": code, "command_seconds": seconds}
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
        found |= {key: facts[key] for key in FACTS if key in facts}
        found["stages"] = {"found": facts.get("seconds"), "predicted": facts.get("predicted_seconds")}
    if (folder / "events.jsonl").exists():
        found["events"] = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    lora = folder / "lora" / f"{values['name']}.safetensors"
    if lora.exists():
        found["lora_sha256"] = digest_of_tensors(lora)
    return found


def digest_of_tensors(file: Path) -> str:
    """Return a digest of the names and values in a file; its metadata name the run."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(name.encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def commands(work: Path) -> dict[str, list[str]]:
    """Return the commands that are run after the trials, by name."""
    turbo, lora = str(work / "turbo"), str(work / "lora.safetensors")
    return {
        "sample": ["sample", turbo, "--lora", lora, "--prompt", "zchar in a garden", "-o", str(work / "sampled")],
        "drift": ["drift", turbo, "--lora", lora, "--width", "512", "--height", "512", "-o", str(work / "drift")],
        "doctor": ["doctor"],
    }
