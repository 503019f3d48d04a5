"""The commands `lora weight`, `lora resize` and `lora ema`, and what `lora merge` shares with them."""

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_train.commands import compare
from zimage_train.errors import ConfigError, Problem, WeightsError, ZImageTrainError, collect_errors, raise_all
from zimage_train.io import atomic
from zimage_train.io.dtypes import PRECISIONS
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.units import format_bytes
from zimage_train.lora import (
    arithmetic,
    lora_file,
    metadata,
    scale_rules,
    targets,
)
from zimage_train.lora.deltas import Factors, Lora, relative_error
from zimage_train.lora.scale_rules import ScaleRule
from zimage_train.models import locate
from zimage_train.report.console import Console
from zimage_train.training.run_dir import RunDir


@dataclass(frozen=True)
class OutputFile:
    """The LoRA file that a command writes, and its dtype; `auto` is bf16 if that is exact, otherwise fp32."""

    path: Path
    dtype: str
    force: bool

    def require_free(self, *inputs: Path) -> None:
        """Require that the file can be written without replacing another file.

        Raises:
            ConfigError: it is among `inputs`, exists (without --force), or has another ending.
            DiskError: its folder is not writable.
        """
        require_free(self.path, self.force, inputs)
        self._require_dtype()
        if self.path.suffix != ".safetensors":
            raise ConfigError(
                Problem(f"-o {self.path}", "does not end in .safetensors", "no tool would load it", "bad-argument")
            )

    def require_free_folder(self, *inputs: Path) -> None:
        """Require that a folder can be made at the path.

        Raises:
            ConfigError: it exists, or looks like a file.
            DiskError: the folder that it goes into is not writable.
        """
        require_free(self.path, False, inputs)
        self._require_dtype()
        if self.path.suffix == ".safetensors":
            what = "ends in .safetensors, and peft reads a folder"
            raise ConfigError(Problem(f"-o {self.path}", what, "give the name of a folder", "bad-argument"))

    def _require_dtype(self) -> None:
        if self.dtype not in ("auto", *PRECISIONS):
            raise ConfigError(Problem("--dtype", f"is {self.dtype!r}", "give auto, bf16 or fp32", "bad-argument"))


def require_free(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    """Require that the output `path`, a file or a folder, can be written without replacing anything.

    Raises:
        ConfigError: it is among `inputs`, or exists; `force` permits to replace a file, but not a folder.
        DiskError: its folder is not writable.
    """
    if any(path.exists() and source.exists() and path.samefile(source) for source in inputs):
        raise ConfigError(Problem(f"-o {path}", "is a file that is read", "give another name", "output-is-input"))
    if os.path.lexists(path) and (path.is_dir() or not force):
        hint = "give another name" if path.is_dir() else "give another name, or --force"
        raise ConfigError(Problem(f"-o {path}", "exists", hint, "file-exists"))
    atomic.require_writable_folder(path.parent)


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file that has been read."""

    path: Path
    lora: Lora
    metadata: Mapping[str, str]

    def facts(self, **more: Any) -> dict[str, Any]:
        """Return what the metadata of an output records about this file: name, digest, and `more`."""
        return file_facts(self.path, **more)


def file_facts(path: Path, **more: Any) -> dict[str, Any]:
    """Return name and digest of a file, and `more`, such as its weight in a merge."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **more}


def read_sources(*paths: Path) -> list[LoraSource]:
    """Return LoRA files with their metadata.

    Raises:
        WeightsError: lists every file that cannot be read.
    """
    errors: list[ZImageTrainError] = []
    sources: list[LoraSource] = []
    for name in paths:
        with collect_errors(errors):
            path = locate.lora_in(name)
            sources.append(LoraSource(path, lora_file.read_lora(path), read_header(path).metadata))
    raise_all(errors)
    return sources


def write_lora(lora: Lora, output: OutputFile, header: Mapping[str, str]) -> list[str]:
    """Write `lora`, and return a line that reports the file and its rounding error."""
    narrowest = lora_file.narrowest_dtype(lora)
    dtype = narrowest if output.dtype == "auto" else output.dtype
    bf16_error = 0.0
    if narrowest != "bf16":
        in_bf16 = lora_file.round_to_dtype(lora, "bf16")
        bf16_error = max(relative_error(lora[name], in_bf16[name]) for name in lora)
    if dtype == "fp32" and bf16_error > 0:
        rounding = f"since bf16 would round by up to {bf16_error:.1e} of a change"
    elif dtype == "fp32":
        rounding = "though bf16 would be exact too"
    elif narrowest == "bf16":
        rounding = "which is exact"
    else:
        rounding = f"rounded by up to {bf16_error:.1e} of a change"
    norm = math.sqrt(math.fsum(factors.norm() ** 2 for factors in lora.values()))
    if norm == 0:
        message = "would change nothing: all its changes are 0"
        raise ConfigError(Problem(str(output.path), message, "nothing was written", "no-change"))
    lora_file.export_lora(output.path, lora, dtype, header)
    content = f"{len(lora)} modules, rank {format_ranks(lora)}, norm {norm:.4g}"
    return [f"{output.path}: {content}, {format_bytes(output.path.stat().st_size)} in {dtype}, {rounding}"]


def to_cpu(factors: Factors) -> Factors:
    """Return the factors in CPU memory."""
    return Factors(factors.a.cpu(), factors.b.cpu(), factors.scale)


def weight_command(path: Path, texts: Sequence[str], output: OutputFile | None) -> list[str]:
    """Scale the delta of each module by rules; without `output`, return the table of factors.

    Raises:
        ConfigError: a rule is not valid, no rule names a module of the file, or every factor is 0.
        WeightsError: the file is not a plain LoRA.
    """
    rules = scale_rules.parse_rules(texts)
    if output is not None:
        output.require_free(path)
    source = read_sources(path)[0]
    lines = unmatched_notes([(rule, [source]) for rule in rules])
    weights = scale_rules.module_weights(rules, source.lora)
    if output is None:
        return [*lines, *scale_rules.format_table(weights)]
    scaled = arithmetic.sum_loras([(source.lora, weights)])
    if not scaled:
        raise ConfigError(
            Problem("lora weight", "every factor is 0, so nothing is left", "keep a module", "nothing-left")
        )
    facts = {"from": source.facts(), "scale": list(texts)}
    header = metadata.edited_metadata("weight", [source.metadata], facts, ranks_of(scaled))
    removed = len(source.lora) - len(scaled)
    if removed:
        lines.append(f"{removed} modules have factor 0 and are left out")
    return [*lines, *write_lora(scaled, output, header)]


def resize_command(path: Path, rank: int | None, energy: float, output: OutputFile) -> list[str]:
    """Reduce a LoRA to `rank`, or for None to the lowest ranks that keep `energy` of each module's squared delta.

    A LoKr or LoHa becomes a LoRA.

    Raises:
        ConfigError: the file has no higher rank than that.
        WeightsError: the file is not a LoRA, LoKr or LoHa.
    """
    output.require_free(path)
    deltas = lora_file.read_deltas(path)
    lora = {module: delta for module, delta in deltas.items() if isinstance(delta, Factors)}
    before = (
        f"rank {format_ranks(lora)}"
        if len(lora) == len(deltas)
        else " and ".join(sorted({delta.kind for delta in deltas.values()}))
    )
    if len(lora) == len(deltas) and rank is not None and rank >= max(ranks_of(lora)):
        hint = "a higher rank would add nothing; lora convert copies the file"
        raise ConfigError(Problem("--rank", f"is {rank}, but {path} already has {before}", hint, "bad-argument"))

    def reduce_module(name: str) -> tuple[Factors, float, float]:
        if name in lora:
            return arithmetic.reduce_rank(lora[name], rank, energy, name)
        return arithmetic.factorize(deltas[name].delta(), rank, energy, name)

    small, kept = factorize_modules(deltas, reduce_module)
    header_before = read_header(path)
    facts = {"from": file_facts(path), "rank": rank, "energy": energy}
    header = metadata.edited_metadata("resize", [header_before.metadata], facts, ranks_of(small))
    for key in ("ss_network_module", metadata.NETWORK_ARGS):  # a LoKr's
        header.pop(key, None)
    # The factors of an SVD are never exact in bf16. So `auto` keeps the dtype of the source here, rather than double
    # the size of a file that was to become smaller.
    stored = {info.dtype for key, info in header_before.tensors.items() if not key.endswith(".alpha")}
    dtype = output.dtype
    if dtype == "auto":
        dtype = "fp32" if "F32" in stored else "bf16"
    lines = write_lora(small, replace(output, dtype=dtype), header)
    return [f"{before} -> rank {format_ranks(small)}: {kept}", *lines]


def find_saves(paths: Sequence[Path]) -> list[Path]:
    """Return the LoRA files that `paths` stand for: a file for itself, a run folder for all files that it saved.

    Raises:
        ConfigError: a folder is not that of a run.
    """
    saves: list[Path] = []
    for path in paths:
        if path.is_dir():
            compare.require_run(path)
            run = RunDir(path, compare.settings_of(path)["name"])
            files = sorted(run.lora().parent.glob("*.safetensors"))
            saves += [file for file in files if file.stem.startswith(run.name)]
        else:
            saves.append(path)
    return saves


def ema_command(paths: Sequence[Path], decay: float | None, sigma_rel: float | None, output: OutputFile) -> list[str]:
    """Write the average over a run, computed afterwards from the LoRAs that it saved.

    Args:
        decay: the decay per step; None uses `sigma_rel`, the relative width of a power law (EDM2).

    Raises:
        ConfigError: two files are of the same step, they are of several runs, or there is only a single file.
        WeightsError: a file does not record its step, or their modules or ranks differ.
    """
    output.require_free(*paths)
    by_step: dict[int, LoraSource] = {}
    for source in read_sources(*paths):
        step = _step_of(source)
        first = by_step.setdefault(step, source)
        # The last save of a run may exist twice, with and without its step in the name; equal files count once.
        if first.lora.keys() != source.lora.keys() or source.path.read_bytes() != first.path.read_bytes():
            message = f"is of step {step}, as {first.path} is"
            raise ConfigError(Problem(str(source.path), message, "give each save once", "same-step"))
    runs = {source.metadata.get("ss_output_name") for source in by_step.values()}
    if len(runs) > 1:
        # The factors of two runs are unrelated, even where their deltas are alike: B R and R^-1 A are the same delta
        # for any invertible R. Only deltas can be averaged then.
        message = f"these are of several runs ({', '.join(sorted(map(str, runs)))}), with unrelated factors"
        raise ConfigError(Problem("lora ema", message, "lora merge takes the mean of their changes", "several-runs"))
    steps = sorted(by_step)
    if len(steps) < 2:
        hint = "give several, or train with a smaller save.every"
        raise ConfigError(Problem("lora ema", "there is only one save, so nothing to average", hint, "too-few-files"))
    shares = arithmetic.ema_weights(steps, decay, sigma_rel)
    sources = [by_step[step] for step in steps]
    mean = arithmetic.mean_of_factors([source.lora for source in sources], shares)
    used: list[dict[str, Any]] = []
    lines: list[str] = []
    for step, share, source in zip(steps, shares, sources, strict=True):
        used.append(source.facts(step=step, share=share))
        lines.append(f"step {step}: {share:.1%}  {source.path}")
    facts = {"decay": decay, "sigma_rel": sigma_rel, "from": used}
    header = metadata.edited_metadata("ema", [source.metadata for source in sources], facts, ranks_of(mean))
    return [*lines, *write_lora(mean, output, header)]


def reduce_lora(lora: Lora, rank: int | None, energy: float) -> tuple[Lora, str]:
    """Return `lora` with lower ranks, and the sentence that reports how much is kept; see `factorize_modules`."""
    return factorize_modules(lora, lambda name: arithmetic.reduce_rank(lora[name], rank, energy, name))


def factorize_modules(
    modules: Iterable[str], factorize: Callable[[str], tuple[Factors, float, float]]
) -> tuple[Lora, str]:
    """Return the factors of each module, and a sentence with the share of the squared delta kept, in all and at worst.

    Args:
        factorize: returns the factors of a module, their squared norm, and that of the delta that they approximate.
    """
    console, names = Console(stream=sys.stderr), list(modules)
    lora: Lora = {}
    kept_sum = total_sum = 0.0
    worst_share, worst_module = 1.0, ""
    with console.live_progress():
        for done, name in enumerate(names, 1):
            lora[name], kept, total = factorize(name)
            kept_sum += kept
            total_sum += total
            if total > 0 and kept / total < worst_share:
                worst_share, worst_module = kept / total, name
            console.progress("modules", done, len(names))
    share = kept_sum / total_sum if total_sum > 0 else 1.0
    worst = f", least in {worst_module} ({worst_share:.2%})" if worst_module else ""
    return lora, f"keeps {share:.2%} of the squared change{worst}"


def unmatched_notes(rules: Sequence[tuple[ScaleRule, Sequence[LoraSource]]]) -> list[str]:
    """Return a note for each rule that names no module in any of the files that it applies to.

    Raises:
        ConfigError: no rule names any module.
    """
    unmatched: list[tuple[ScaleRule, Sequence[LoraSource]]] = []
    for rule, sources in rules:
        if all(scale_rules.unmatched_rules([rule], source.lora) for source in sources):
            unmatched.append((rule, sources))
    if rules and len(unmatched) == len(rules):
        source = rules[0][1][0]
        message = f"no rule names any of its {len(source.lora)} modules"
        raise ConfigError(
            Problem(str(source.path), message, f"it has {_blocks_and_components(source.lora)}", "nothing-selected")
        )
    notes: list[str] = []
    for rule, sources in unmatched:
        files = ", ".join(str(source.path) for source in sources)
        notes.append(f"note: {rule.text} names nothing in {files}")
    return notes


def _blocks_and_components(lora: Lora) -> str:
    blocks, components, _ = targets.modules_table(dict.fromkeys(lora, 1.0))
    return ", ".join([f"{blocks[0]} to {blocks[-1]}", *components])


def ranks_of(lora: Lora) -> list[int]:
    """Return the rank of each module."""
    return [factors.rank for factors in lora.values()]


def format_ranks(lora: Lora) -> str:
    """Return the common rank, or `4 to 16` for the lowest and the highest."""
    ranks = ranks_of(lora)
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _step_of(source: LoraSource) -> int:
    """Return the step at which a run saved a LoRA, from its metadata or else its name."""
    text = source.metadata.get("ss_steps", "")
    match = re.search(r"-(\d{6,})$", source.path.stem)
    if not text and match:
        text = match[1]
    if not text.isdecimal() or len(text) > 12 or int(text) == 0:
        message = "has its step neither in its metadata nor in its name"
        raise WeightsError(Problem(str(source.path), message, "give LoRAs that a run saved", "not-a-save"))
    return int(text)
