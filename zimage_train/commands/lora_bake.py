"""The commands `lora bake` and `lora extract`, which read whole checkpoints."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from zimage_train.commands import lora_args, lora_edit
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.commands.lora_edit import OutputFile
from zimage_train.config.variants import VARIANTS
from zimage_train.errors import Argument, ConfigError, Location, Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.io.dtypes import ITEM_BYTES, PRECISIONS
from zimage_train.io.units import format_bytes
from zimage_train.lora import arithmetic, bake, metadata
from zimage_train.lora.targets import count_by_group
from zimage_train.models import locate
from zimage_train.report.console import Console

TARGETS = ("comfyui", "diffusers")
MAX_UNREMARKED_LOSS = 0.02
"""Relative error of the baked change above which the output suggests fp32."""


def bake_command(
    model: str, loras: Sequence[WeightedLora], target: str, dtype: str | None, path: Path, force: bool
) -> list[str]:
    """Write a model with LoRAs added to its weights, for tools that cannot load LoRAs.

    Args:
        target: `comfyui` for a single file, `diffusers` for a folder.
        dtype: None keeps the dtype of each weight.

    Raises:
        ConfigError: the target or the dtype does not exist, or `path` does.
        WeightsError: the model or a LoRA is unreadable, or they do not fit together.
        DiskError: there is not enough space.
    """
    if target not in TARGETS:
        raise ConfigError(Problem("--to", f"is {target!r}", f"give one of {', '.join(TARGETS)}", "bad-argument"))
    if target == "comfyui" and path.suffix != ".safetensors":
        raise ConfigError(
            Problem(f"-o {path}", "does not end in .safetensors", "ComfyUI takes one file", "bad-argument")
        )
    if target == "diffusers" and path.suffix == ".safetensors":
        raise ConfigError(Problem(f"-o {path}", "is a file name", "diffusers takes a folder", "bad-argument"))
    if dtype not in (None, *PRECISIONS):
        raise ConfigError(Problem("--dtype", f"is {dtype!r}", "give bf16 or fp32", "bad-argument"))
    lora_edit.require_free(path, force, [weighted.path for weighted in loras])
    console = Console()
    source = locate.transformer_at(model, Location(argument=Argument("MODEL")))
    lora_edit.require_free(path, force, [source])
    shape, tensors = locate.transformer_tensors(source)
    read_loras = [lora_args.read_weighted_lora(weighted.path, shape) for weighted in loras]
    for weighted, lora in zip(loras, read_loras, strict=True):
        console.info(lora_args.match_message(weighted, lora))
    stored_dtype = PRECISIONS[dtype] if dtype else None
    size = sum(math.prod(info.shape) * ITEM_BYTES[stored_dtype or info.dtype] for info in tensors.values())
    atomic.require_free_space(
        path.parent, size, f"{source.name} with a LoRA", "free some space, or choose another disk"
    )
    facts = [lora_edit.file_facts(weighted.path, weight=weighted.weight) for weighted in loras]
    # Several LoRAs are summed first, so that each weight of the model is rounded once and not once per LoRA.
    stacked = arithmetic.sum_deltas([(lora, weighted.weight) for lora, weighted in zip(read_loras, loras, strict=True)])
    with console.live_progress():
        baked = bake.bake_checkpoint(
            source,
            stacked,
            target == "comfyui",
            dtype,
            path,
            {"zimage_train.bake": json.dumps(facts, sort_keys=True)},
            partial(console.progress, "baking"),
        )
    dtypes = ", ".join(sorted({info.dtype for info in tensors.values()})) if dtype is None else dtype
    lines = [f"{path}: {baked.changed} weights changed, {format_bytes(size)} in {dtypes}"]
    rounding = f"rounding to {dtypes} cost {baked.rounding_error:.2%} of the change"
    if baked.rounding_error > MAX_UNREMARKED_LOSS:
        rounding += ": loading the LoRA beside the model, or --dtype fp32, loses none"
    content = "transformer" if target == "diffusers" else "diffusion model"
    note = f"it holds the {content} alone, without text encoder and VAE (sample takes them by --extras)"
    return [*lines, rounding, note]


def extract_command(tuned: str, base: str, rank: int | None, energy: float, output: OutputFile) -> list[str]:
    """Write the LoRA that leads from checkpoint `base` to `tuned`.

    Args:
        rank: the rank of each module; None takes the lowest that keeps `energy` of its squared difference.

    Raises:
        ConfigError: the output exists.
        WeightsError: either is not a Z-Image transformer, their shapes differ, or their linear weights are equal.
    """
    output.require_free()
    new = locate.transformer_at(tuned, Location(argument=Argument("TUNED")))
    old = locate.transformer_at(base, Location(argument=Argument("BASE")))
    output.require_free(new, old)
    console, device = Console(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.live_progress():
        extracted = bake.extract_lora(new, old, rank, energy, device, partial(console.progress, "comparing"))
    if not extracted.lora:
        raise WeightsError(
            Problem(
                tuned, f"has the same linear weights as {base}", "there is nothing to extract", "nothing-to-extract"
            )
        )
    lora = {name: lora_edit.to_cpu(factors) for name, factors in extracted.lora.items()}
    facts = {"rank": rank, "energy": energy, "tuned": Path(tuned).name, "base": Path(base).name}
    source = {metadata.BASE_MODEL: VARIANTS[base].base_model if base in VARIANTS else metadata.ANY_BASE_MODEL}
    header = metadata.edited_metadata("extract", [source], facts, lora_edit.ranks_of(lora))
    groups = ", ".join(f"{name} {count}" for name, count in count_by_group(lora).items())
    lines = [f"{groups}: keeps {extracted.kept_energy / extracted.total_energy:.2%} of the squared change"]
    if extracted.other_tensors:
        differing = f"{len(extracted.other_tensors)} other tensors differ too, such as {extracted.other_tensors[0]}"
        lines.append(f"note: {differing}, which no LoRA can hold")
    return [*lines, *lora_edit.write_lora(lora, output, header)]
