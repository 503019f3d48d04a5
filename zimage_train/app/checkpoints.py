"""The `lora` commands that read whole checkpoints: bake a LoRA into one, extract one from the difference of two."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from zimage_train import files
from zimage_train.app import sample, workbench
from zimage_train.app.sample import WeightedLora
from zimage_train.app.workbench import Output
from zimage_train.config.schema import Model
from zimage_train.errors import ConfigError, Problem, WeightsError
from zimage_train.lora import arithmetic, checkpoints, metadata
from zimage_train.lora.names import count_by_group
from zimage_train.model import sources
from zimage_train.model.variants import VARIANTS
from zimage_train.report.console import Console
from zimage_train.sizes import in_words

TARGETS = ("comfyui", "diffusers")


def transformer_at(name: str) -> Path:
    """The transformer of a variant, a hub id, a folder or a file; downloaded if need be.

    Raises:
        WeightsError: it is not to be had.
    """
    known = name in VARIANTS
    found = sources.search(Model(variant=name if known else "turbo", path=None if known else name, adapter=None))  # type: ignore[arg-type]
    if found.transformer is None:
        raise WeightsError(*(problem for error in found.errors for problem in error.problems))
    return found.transformer


def bake(model: str, loras: Sequence[WeightedLora], target: str, path: Path, force: bool) -> list[str]:
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
    workbench.require_free(path, force, [one.path for one in loras])
    console = Console()
    source = transformer_at(model)
    shape, tensors = sources.transformer_tensors(source)
    read = [(sample.read_lora(one.path, shape), one.weight) for one in loras]
    for one, (lora, _) in zip(loras, read, strict=True):
        console.say(f"{one.path}: matched {len(lora)}/{len(lora)} modules, weight {one.weight:g}")
    size = sum(file.stat().st_size for file in {info.file for info in tensors.values()})
    files.require_space(path.parent, size, f"{source.name} with a LoRA")
    with console.live():
        stacked = arithmetic.stack(read)
        tick = partial(console.tick, "baking")
        baked = checkpoints.bake(source, stacked, target == "comfyui", path, tick)
    lost = f"rounding the weights cost {baked.share_lost:.2%} of the change"
    return [f"{path}: {baked.changed} weights changed, {in_words(size)}; {lost}"]


def extract(tuned: str, base: str, rank: int | None, energy: float, output: Output) -> list[str]:
    """Write the LoRA that leads from one checkpoint to another.

    Raises:
        ConfigError: something is at the output.
        WeightsError: one is no Z-Image transformer, they differ in shape, or in nothing.
    """
    output.require_free()
    new, old = transformer_at(tuned), transformer_at(base)
    console, device = Console(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.live():
        found = checkpoints.extract(new, old, rank, energy, device, partial(console.tick, "comparing"))
    if not found.lora:
        raise WeightsError(Problem(tuned, f"has the linear weights of {base}", "there is nothing to extract"))
    lora = {name: workbench.on_cpu(factors) for name, factors in found.lora.items()}
    facts = {"rank": rank, "energy": energy, "tuned": Path(tuned).name, "base": Path(base).name}
    made = metadata.edited("extract", [{"ss_base_model_version": "zimage"}], facts, [one.rank for one in lora.values()])
    groups = ", ".join(f"{name} {count}" for name, count in count_by_group(lora).items())
    lines = [f"{groups}: keeps {found.energy / found.total:.2%} of the squared change"]
    if found.others:
        what = f"{len(found.others)} other tensors differ too, such as {found.others[0]}"
        lines.append(f"note: {what}, which no LoRA can hold")
    return [*lines, *workbench.written(lora, output, made)]
