"""The `lora` commands that make a LoRA of others: weight, merge, resize, ema, convert."""

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zimage_train.commands import compare
from zimage_train.errors import ConfigError, Problem, WeightsError, ZImageTrainError, collect_errors, raise_all
from zimage_train.io import atomic, tensorfile
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.units import format_bytes
from zimage_train.lora import arithmetic, formats, inspect, keys, lora_file, metadata, scale_rules, targets, verify
from zimage_train.lora.lora_file import Factors, Lora
from zimage_train.lora.scale_rules import ScaleRule
from zimage_train.report.console import Console
from zimage_train.training.run_dir import RunDir


@dataclass(frozen=True)
class OutputFile:
    """Where a command writes, and in which precision; `auto` is bf16 where that loses nothing."""

    path: Path
    dtype: str
    force: bool

    def require_free(self, *inputs: Path) -> None:
        """Refuse a place that cannot be written to, or where something is.

        Raises:
            ConfigError: it is one of `inputs`, has another ending, or is there already.
            DiskError: its folder cannot be written to.
        """
        require_free(self.path, self.force, inputs)
        if self.path.suffix != ".safetensors":
            raise ConfigError(Problem(f"-o {self.path}", "does not end in .safetensors", "no tool would load it"))
        if self.dtype not in ("auto", *tensorfile.TORCH_DTYPES):
            raise ConfigError(Problem("--dtype", f"is {self.dtype!r}", "give auto, bf16 or fp32"))


def require_free(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    """As `Output.require_free`, of any file or folder."""
    if any(path.exists() and one.exists() and path.samefile(one) for one in inputs):
        raise ConfigError(Problem(f"-o {path}", "is the file that is read", "give another name"))
    if os.path.lexists(path) and (path.is_dir() or not force):
        todo = "give another name" if path.is_dir() else "give another name, or --force"
        raise ConfigError(Problem(f"-o {path}", "exists", todo))
    atomic.require_writable_folder(path.parent)


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file that was read."""

    path: Path
    lora: Lora
    metadata: Mapping[str, str]

    def facts(self, **more: Any) -> dict[str, Any]:
        """What an output says of it."""
        return facts_of(self.path, **more)


def facts_of(path: Path, **more: Any) -> dict[str, Any]:
    """The name and digest of a file, and what was done with it."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **more}


def read(*paths: Path) -> list[LoraSource]:
    """Read LoRA files.

    Raises:
        WeightsError: lists all that cannot be.
    """
    errors: list[ZImageTrainError] = []
    found: list[LoraSource] = []
    for path in paths:
        with collect_errors(errors):
            found.append(LoraSource(path, lora_file.read_lora(path), read_header(path).metadata))
    raise_all(errors)
    return found


def written(lora: Lora, output: OutputFile, made: Mapping[str, str]) -> list[str]:
    """Write `lora`, and say what the file is and what rounding has cost."""
    narrowest = lora_file.narrowest_dtype(lora)
    dtype = narrowest if output.dtype == "auto" else output.dtype
    short = lora_file.round_to_dtype(lora, "bf16")
    error = 0.0 if narrowest == "bf16" else max(verify.relative_error(lora[name], short[name]) for name in lora)
    said = "which holds it to the bit" if dtype == narrowest == "bf16" else f"rounded by up to {error:.1e} of a change"
    if dtype == "fp32":
        said = f"since bf16 would round by up to {error:.1e} of a change" if error else "though bf16 would hold it too"
    norm = math.sqrt(math.fsum(inspect.delta_norm(factors) ** 2 for factors in lora.values()))
    if norm == 0:
        raise ConfigError(Problem(str(output.path), "would change nothing: all its changes are 0", "nothing written"))
    lora_file.export_lora(output.path, lora, dtype, made)
    what = f"{len(lora)} modules, rank {rank_said(lora)}, norm {norm:.4g}"
    return [f"{output.path}: {what}, {format_bytes(output.path.stat().st_size)} in {dtype}, {said}"]


def on_cpu(factors: Factors) -> Factors:
    return Factors(factors.a.cpu(), factors.b.cpu(), factors.scale)


def weight(path: Path, texts: Sequence[str], output: OutputFile | None) -> list[str]:
    """Scale the change of each module by rules; without `output`, only show by how much.

    Raises:
        ConfigError: a rule is none, or none of them names a module of the file.
        WeightsError: the file is no plain LoRA.
    """
    scales = scale_rules.parse_rules(texts)
    if output is not None:
        output.require_free(path)
    source = read(path)[0]
    lines = unmet([(rule, [source]) for rule in scales])
    factors = scale_rules.module_weights(scales, source.lora)
    if output is None:
        return [*lines, *scale_rules.format_table(factors)]
    scaled = arithmetic.sum_loras([(source.lora, factors)])
    if not scaled:
        raise ConfigError(Problem("lora weight", "every factor is 0, so nothing is left", "keep a module"))
    made = metadata.edited_metadata(
        "weight", [source.metadata], {"from": source.facts(), "scale": list(texts)}, ranks_of(scaled)
    )
    if gone := len(source.lora) - len(scaled):
        lines.append(f"{gone} modules have factor 0 and are left out")
    return [*lines, *written(scaled, output, made)]


def resize(path: Path, rank: int | None, energy: float, output: OutputFile) -> list[str]:
    """Bring a LoRA to `rank`, or to the lowest ranks that keep `energy` of each module's squared change.

    Raises:
        WeightsError: the file is no plain LoRA.
    """
    output.require_free(path)
    source = read(path)[0]
    before = rank_said(source.lora)
    if rank is not None and rank >= max(ranks_of(source.lora)):
        todo = "no rank adds what is not there; lora convert copies it"
        raise ConfigError(Problem("--rank", f"is {rank}, and {path} has rank {before} already", todo))
    small, kept = reduced(source.lora, rank, energy, output)
    facts = {"from": source.facts(), "rank": rank, "energy": energy}
    made = metadata.edited_metadata("resize", [source.metadata], facts, ranks_of(small))
    dtype = as_is(source) if output.dtype == "auto" else output.dtype
    return [f"rank {before} -> {rank_said(small)}: {kept}", *written(small, replace(output, dtype=dtype), made)]


def as_is(source: LoraSource) -> str:
    """The precision of a file that is nothing but smaller: that of the one it was made of."""
    return "fp32" if any(one.a.dtype == torch.float32 for one in source.lora.values()) else "bf16"


def saves(given: Sequence[Path]) -> list[Path]:
    """The LoRA files that are meant: themselves, or all that a run saved.

    Raises:
        ConfigError: a folder is no run's, or a path is not there.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            _require_run(path)
            run = RunDir(path, compare.settings_of(path)["name"])
            found += [one for one in sorted(run.lora().parent.glob("*.safetensors")) if one.stem.startswith(run.name)]
        else:
            found.append(path)
    return found


def _require_run(folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        near = [one for one in (folder.parent, *sorted(folder.glob("*"))) if (one / "config.yaml").exists()]
        todo = f"did you mean {near[0]}?" if near else "give output/NAME of a run, or LoRA files"
        raise ConfigError(Problem(str(folder), "is no run folder: it has no config.yaml", todo))


def ema(paths: Sequence[Path], decay: float | None, sigma_rel: float | None, output: OutputFile) -> list[str]:
    """The average that a run would have had, from the LoRAs that it saved.

    Raises:
        WeightsError: a file says no step, or they are not of one run.
    """
    output.require_free(*paths)
    by_step: dict[int, LoraSource] = {}
    for source in read(*paths):
        first = by_step.setdefault(_step(source), source)
        if first.lora.keys() != source.lora.keys() or source.path.read_bytes() != first.path.read_bytes():
            what = f"is of step {_step(source)}, as {first.path} is"
            raise ConfigError(Problem(str(source.path), what, "give each save once"))
    names_ = {source.metadata.get("ss_output_name") for source in by_step.values()}
    if len(names_) > 1:
        what = f"these are of several runs ({', '.join(sorted(map(str, names_)))}), with factors of their own"
        raise ConfigError(Problem("lora ema", what, "lora merge takes the mean of their changes"))
    steps = sorted(by_step)
    if len(steps) < 2:
        todo = "give several, or train with a smaller save.every"
        raise ConfigError(Problem("lora ema", "there is one save, and so nothing to average", todo))
    shares = arithmetic.ema_weights(steps, decay, sigma_rel)
    sources = [by_step[step] for step in steps]
    mean = arithmetic.mean_of_factors([source.lora for source in sources], shares)
    used = [source.facts(step=step, share=share) for source, step, share in zip(sources, steps, shares, strict=True)]
    facts = {"decay": decay, "sigma_rel": sigma_rel, "from": used}
    made = metadata.edited_metadata("ema", [source.metadata for source in sources], facts, ranks_of(mean))
    lines = [f"step {step}: {share:.1%}  {by_step[step].path}" for step, share in zip(steps, shares, strict=True)]
    return [*lines, *written(mean, output, made)]


def convert(path: Path, target: str, output: OutputFile) -> list[str]:
    """Write a LoRA, DoRA, LoKr or LoHa in another layout; the way there and back changes no bit.

    Raises:
        ConfigError: there is no such layout.
        WeightsError: the file is none of them, or the layout has no place for it.
    """
    if target not in formats.LAYOUTS:
        raise ConfigError(Problem("--to", f"is {target!r}", f"give one of {', '.join(formats.LAYOUTS)}"))
    output.require_free(path)
    changes, found = lora_file.read_changes(path)
    tensors, made = formats.to_layout(path, changes, found, target)
    if output.dtype != "auto":
        kind = tensorfile.TORCH_DTYPES[output.dtype]
        tensors = {key: one if key.endswith(".alpha") else one.to(kind) for key, one in tensors.items()}
    tensorfile.save(output.path, tensors, made)
    kinds = ", ".join(sorted({str(lora_file.kind_of(change)) for change in changes.values()}))
    size = format_bytes(output.path.stat().st_size)
    return [
        f"{path}: {keys.layout_of(read_header(path).tensors)}",
        f"{output.path}: {keys.layout_of(tensors)}, {kinds}, {len(changes)} modules, {size}",
        f"read by {formats.LAYOUTS[target].reader}",
    ]


def reduced(lora: Lora, rank: int | None, energy: float, output: OutputFile) -> tuple[Lora, str]:
    return each(lora, output, lambda name: arithmetic.reduce_rank(lora[name], rank, energy, name))


def each(
    modules: Iterable[str], output: OutputFile, make: Callable[[str], tuple[Factors, float, float]]
) -> tuple[Lora, str]:
    """`make` of each module with progress, and the share of the squared change that is kept, in all and at worst."""
    console, found = Console(stream=sys.stderr), list(modules)
    lora: Lora = {}
    kept = total = 0.0
    worst, where = 1.0, ""
    with console.live_progress():
        for done, name in enumerate(found, 1):
            lora[name], one, whole = make(name)
            kept, total = kept + one, total + whole
            if whole > 0 and one / whole < worst:
                worst, where = one / whole, name
            console.progress("modules", done, len(found))
    least = f", least in {where} ({worst:.2%})" if where else ""
    return lora, f"keeps {kept / total if total > 0 else 1.0:.2%} of the squared change{least}"


def unmet(scales: Sequence[tuple[ScaleRule, Sequence[LoraSource]]]) -> list[str]:
    """What rules name nothing in any file that they are for; where none names anything, that is a mistake."""
    lost = [
        (rule, sources)
        for rule, sources in scales
        if all(scale_rules.unmatched_rules([rule], one.lora) for one in sources)
    ]
    if scales and len(lost) == len(scales):
        source = scales[0][1][0]
        what = f"no rule names any of its {len(source.lora)} modules"
        raise ConfigError(Problem(str(source.path), what, f"it has {', '.join(_components(source.lora))}"))
    return [f"note: {rule.text} names nothing in {', '.join(str(one.path) for one in of)}" for rule, of in lost]


def _components(lora: Lora) -> list[str]:
    blocks, components, _ = targets.modules_table(dict.fromkeys(lora, 1.0))
    return [f"{blocks[0]} to {blocks[-1]}", *components]


def ranks_of(lora: Lora) -> list[int]:
    return [factors.rank for factors in lora.values()]


def rank_said(lora: Lora) -> str:
    ranks = ranks_of(lora)
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _step(source: LoraSource) -> int:
    """The step at which a run saved a LoRA, by its header or else its name."""
    match = re.search(r"-(\d{6,})$", source.path.stem)
    said = source.metadata.get("ss_steps", "") or (match[1] if match else "")
    if not said.isdecimal() or len(said) > 12 or int(said) == 0:
        what = "says in neither header nor name at which step it was saved"
        raise WeightsError(Problem(str(source.path), what, "give LoRAs that a run saved"))
    return int(said)
