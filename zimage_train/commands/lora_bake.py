"""The `lora` commands that read whole checkpoints: bake a LoRA into one, extract one from the difference of two."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from zimage_train.commands import lora_args, lora_edit
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.commands.lora_edit import OutputFile
from zimage_train.errors import Argument, ConfigError, Location, Problem, WeightsError
from zimage_train.io import atomic, tensorfile
from zimage_train.io.safetensors_format import ITEM_BYTES
from zimage_train.io.units import format_bytes
from zimage_train.lora import arithmetic, bake, metadata
from zimage_train.lora.targets import count_by_group
from zimage_train.models import locate
from zimage_train.report.console import Console

TARGETS = ("comfyui", "diffusers")
MUCH_LOST = 0.02


def bake_command(
    model: str, loras: Sequence[WeightedLora], target: str, dtype: str | None, path: Path, force: bool
) -> list[str]:
    """Write a model with LoRAs added to its weights, for tools that load no LoRA.

    Raises:
        ConfigError: there is no such layout, or something is at `path`.
        WeightsError: the model or a LoRA cannot be used, in whole.
        DiskError: there is no room for it.
    """
    if target not in TARGETS:
        raise ConfigError(Problem("--to", f"is {target!r}", f"give one of {', '.join(TARGETS)}"))
    if target == "comfyui" and path.suffix != ".safetensors":
        raise ConfigError(Problem(f"-o {path}", "does not end in .safetensors", "ComfyUI takes one file"))
    if target == "diffusers" and path.suffix == ".safetensors":
        raise ConfigError(Problem(f"-o {path}", "is a file name", "diffusers takes a folder"))
    if dtype not in (None, *tensorfile.TORCH_DTYPES):
        raise ConfigError(Problem("--dtype", f"is {dtype!r}", "give bf16 or fp32"))
    lora_edit.require_free(path, force, [one.path for one in loras])
    console = Console()
    source = locate.transformer_at(model, Location(argument=Argument("MODEL")))
    lora_edit.require_free(path, force, [source])
    shape, tensors = locate.transformer_tensors(source)
    read = [(lora_args.read_weighted_lora(one.path, shape), one.weight) for one in loras]
    for one, (lora, _) in zip(loras, read, strict=True):
        console.info(lora_args.matched(one, lora))
    kind = tensorfile.DTYPE_NAMES[tensorfile.TORCH_DTYPES[dtype]] if dtype else None
    size = sum(math.prod(info.shape) * ITEM_BYTES[kind or info.dtype] for info in tensors.values())
    atomic.require_free_space(
        path.parent, size, f"{source.name} with a LoRA", "free some space, or choose another disk"
    )
    facts = [lora_edit.facts_of(one.path, weight=one.weight) for one in loras]
    with console.live_progress():
        baked = bake.bake_checkpoint(
            source,
            arithmetic.stack_loras(read),
            target == "comfyui",
            dtype,
            path,
            {"zimage_train.bake": json.dumps(facts, sort_keys=True)},
            partial(console.progress, "baking"),
        )
    kinds = ", ".join(sorted({info.dtype for info in tensors.values()})) if dtype is None else dtype
    lines = [f"{path}: {baked.changed} weights changed, {format_bytes(size)} in {kinds}"]
    lines.append(f"rounding to {kinds} cost {baked.rounding_error:.2%} of the change")
    if baked.rounding_error > MUCH_LOST:
        lines[-1] += ": loaded as a LoRA none is lost; --dtype fp32 keeps it too"
    what = "the transformer alone" if target == "diffusers" else "the diffusion model alone"
    return [*lines, f"it is {what}: text encoder and VAE stay where they are (sample takes them by --extras)"]


def extract_command(tuned: str, base: str, rank: int | None, energy: float, output: OutputFile) -> list[str]:
    """Write the LoRA that leads from one checkpoint to another.

    Raises:
        ConfigError: something is at the output.
        WeightsError: one is no Z-Image transformer, they differ in shape, or in nothing.
    """
    output.require_free()
    new = locate.transformer_at(tuned, Location(argument=Argument("TUNED")))
    old = locate.transformer_at(base, Location(argument=Argument("BASE")))
    output.require_free(new, old)
    console, device = Console(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.live_progress():
        found = bake.extract_lora(new, old, rank, energy, device, partial(console.progress, "comparing"))
    if not found.lora:
        raise WeightsError(Problem(tuned, f"has the linear weights of {base}", "there is nothing to extract"))
    lora = {name: lora_edit.on_cpu(factors) for name, factors in found.lora.items()}
    facts = {"rank": rank, "energy": energy, "tuned": Path(tuned).name, "base": Path(base).name}
    made = metadata.edited_metadata(
        "extract", [{"ss_base_model_version": "zimage"}], facts, [one.rank for one in lora.values()]
    )
    groups = ", ".join(f"{name} {count}" for name, count in count_by_group(lora).items())
    lines = [f"{groups}: keeps {found.kept_energy / found.total_energy:.2%} of the squared change"]
    if found.other_tensors:
        what = f"{len(found.other_tensors)} other tensors differ too, such as {found.other_tensors[0]}"
        lines.append(f"note: {what}, which no LoRA can hold")
    return [*lines, *lora_edit.written(lora, output, made)]
