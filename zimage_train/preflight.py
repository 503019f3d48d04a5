"""Everything that can be known before a GPU is touched: all problems at once, or all that a run needs (torch-free)."""

import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train import files, flops, memory
from zimage_train.config import advice
from zimage_train.config.reading import cache_folder
from zimage_train.config.schema import Config
from zimage_train.data import folder
from zimage_train.data.buckets import Bucket, crop_percent
from zimage_train.data.folder import Picture
from zimage_train.data.looks import Looks, Tick
from zimage_train.data.plan import Item, items_of, make_plan
from zimage_train.errors import ConfigError, Problem, WeightsError, ZImageTrainError, collected, raise_all
from zimage_train.lora import headers, names
from zimage_train.memory import Estimate
from zimage_train.model import extras as parts
from zimage_train.model import sources
from zimage_train.model.shapes import TransformerShape
from zimage_train.model.sources import Fetch, NotDownloaded, Sources
from zimage_train.sampling.recipe import also, previews


@dataclass(frozen=True)
class Weights:
    """The model of a run, as far as headers tell."""

    sources: Sources
    shape: TransformerShape
    modules: list[str]
    """What gets a LoRA."""
    adapter_modules: int


@dataclass(frozen=True)
class Checked:
    """A config that holds, with everything it refers to."""

    config: Config
    pictures: list[list[Picture]]
    items: list[Item]
    weights: Weights | None
    """None: not downloaded yet."""
    notes: list[str]
    warnings: list[str]


def examine(config: Config, fetch: Fetch | None = None, tick: Tick = lambda what, done, total: None) -> Checked:
    """Check pictures, captions, weights, adapter and disk.

    Raises:
        ZImageTrainError: every problem found; the exit code is the lowest that applies.
    """
    errors: list[ZImageTrainError] = []
    notes: list[str] = []
    looks = Looks(cache_folder(config) / "looks.json")
    scans = [folder.scan(entry, f"data.{index}", looks, tick) for index, entry in enumerate(config.data)]
    looks.save()
    errors += [error for scan in scans for error in scan.errors]
    notes += [note for scan in scans for note in scan.notes]
    pictures = [scan.pictures for scan in scans]
    items: list[Item] = []
    with collected(errors):
        items = items_of(config, pictures)
    weights, faults, absent = _weights(config, fetch)
    errors += faults
    notes += absent
    with collected(errors):
        files.require_folder(Path(config.output) / config.name)
        if config.cache.folder is not None:
            files.require_folder(Path(config.cache.folder))
        files.require_space(Path(config.output), _disk_bytes(config, weights), "checkpoints and exports")
    checked = Checked(config, pictures, items, weights, notes, advice.warnings(config, sum(map(len, pictures))))
    raise_all(errors)
    _require_budget(checked)
    notes += _small_pictures(items)
    return checked


def estimate(checked: Checked, checkpointing: bool, gpu: bool) -> Estimate:
    """The memory of a training step of `checked`; what is not downloaded yet has the size of the published models."""
    shape, modules, sizes = _measures(checked)
    return memory.estimate(checked.config, shape, modules, sizes, checkpointing, gpu)


def less_memory(checked: Checked, limit_bytes: int, gpu: bool) -> str:
    """Settings by which a step of `checked` is predicted to fit."""
    shape, modules, sizes = _measures(checked)
    return memory.smaller(checked.config, shape, modules, sizes, limit_bytes, gpu)


def _measures(checked: Checked) -> tuple[TransformerShape, list[str], Counter[Bucket]]:
    shape = checked.weights.shape if checked.weights else TransformerShape()
    modules = checked.weights.modules if checked.weights else names.select(checked.config.lora.targets, shape.linears)
    return shape, modules, Counter(item.size for item in checked.items)


def _require_budget(checked: Checked) -> None:
    """A budget that someone sets is kept or refused; without one the card decides, and this is a prediction.

    Raises:
        ConfigError: a step would take more.
    """
    budget, setting = checked.config.memory.budget_gb, checked.config.memory.checkpointing
    if isinstance(budget, str) or not checked.items:
        return
    is_for_gpu = memory.parameters_of(_measures(checked)[0]) > memory.LARGEST_ON_CPU
    least = estimate(checked, setting is not False, is_for_gpu).total
    if least > budget * 1e9:
        what = f"is {budget:g}, and a training step takes {least / 1e9:.2f} GB (predicted)"
        raise ConfigError(Problem("memory.budget_gb", what, less_memory(checked, int(budget * 1e9), is_for_gpu)))


def report(checked: Checked) -> list[str]:
    """What `check` prints: data, order, modules, memory, notes and warnings."""
    config = checked.config
    lines = [f"{config.name}: no problems found", "", *_table(checked)]
    plan = make_plan(config, checked.items)
    per_step = config.train.batch_size * config.train.accumulate
    epochs = config.train.steps / plan.steps_per_epoch
    lines += [
        "",
        f"{len(checked.items)} samples an epoch, {plan.steps_per_epoch:.1f} steps an epoch, "
        f"{config.train.steps} steps of up to {per_step} samples = {epochs:.1f} epochs",
    ]
    if checked.weights is not None:
        weights = checked.weights
        groups = ", ".join(f"{name} {count}" for name, count in names.count_by_group(weights.modules).items())
        lines.append(f"LoRA of rank {config.lora.rank} on {len(weights.modules)} modules ({groups})")
        if weights.sources.adapter is not None:
            lines.append(f"adapter fits {weights.adapter_modules}/{weights.adapter_modules} modules")
    lines += ["", *_memory_lines(checked), *_share_lines(checked, _recomputes(checked))]
    lines += [f"note: {note}" for note in checked.notes]
    lines += [f"warning: {warning}" for warning in checked.warnings]
    return lines


def system_memory_bytes() -> int:
    """The machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16_000_000_000


def _weights(config: Config, fetch: Fetch | None) -> tuple[Weights | None, list[ZImageTrainError], list[str]]:
    """The model, if all of it is here and right; what is wrong; what is not here yet. Each part for itself."""
    found = sources.search(config.model, fetch)
    absent = [error for error in found.errors if isinstance(error, NotDownloaded)]
    errors: list[ZImageTrainError] = [error for error in found.errors if error not in absent]
    notes = [_absence(one) for error in absent for one in error.problems]

    transformer, extras, adapter = found.transformer, found.extras, found.adapter
    shape = TransformerShape()  # what is not here has the size of the published models
    if transformer is not None:
        try:
            shape = sources.transformer_tensors(transformer)[0]
        except WeightsError as error:
            return None, [*errors, error], notes
    also, faults, more = _also(config.sample.also, shape if transformer else None, fetch)
    errors, notes = errors + faults, list(dict.fromkeys(notes + more))
    modules: list[str] = []
    sizes: headers.Sizes = {}
    with collected(errors):
        modules = names.select(config.lora.targets, shape.linears)
    if extras is not None:
        with collected(errors):
            parts.require(extras, shape.cap_feat_dim)
    if adapter is not None and (transformer is not None or config.model.path is None):
        with collected(errors):
            sizes = headers.read_sizes(adapter)
            headers.require_match(adapter, sizes, shape.linears)
    if errors or notes or transformer is None or extras is None:
        return None, errors, notes
    return Weights(Sources(transformer, extras, adapter, also), shape, modules, len(sizes)), [], []


def _also(
    name: str | None, shape: TransformerShape | None, fetch: Fetch | None
) -> tuple[Path | None, list[ZImageTrainError], list[str]]:
    """The second model of previews, which must have the shape of the first; what is wrong; what is not here yet."""
    if name is None:
        return None, [], []
    try:
        path = sources.other_transformer(name, fetch)
        found = sources.transformer_tensors(path)[0]
    except NotDownloaded as error:
        return None, [], [_absence(one) for one in error.problems]
    except WeightsError as error:
        return None, [error], []
    if shape is not None and found != shape:
        what = "has another shape than the model of this run, so its LoRA does not fit"
        return None, [WeightsError(Problem(f"sample.also: {name}", what, "give a model of the same size"))], []
    return path, [], []


def _absence(problem: Problem) -> str:
    return f"{problem.where}: not on this machine yet; train downloads it"


def _disk_bytes(config: Config, weights: Weights | None) -> int:
    if weights is None:
        return 0
    trained = sum(sum(weights.shape.linears[module]) for module in weights.modules) * config.lora.rank
    checkpoint = trained * (4 + memory.OPTIMIZER_BYTES[config.optimizer.name])
    export = trained * memory.DTYPE_BYTES[config.save.dtype]
    return int(checkpoint * 3 + export * (config.save.keep + 2))


def _table(checked: Checked) -> list[str]:
    by_picture: dict[tuple[int, Path], list[Item]] = {}
    for item in checked.items:
        if item.repeat == 0:
            by_picture.setdefault((item.entry, item.picture.path), []).append(item)
    repeats = [entry.repeats for entry in checked.config.data]
    lines = [_row(items, repeats[entry]) for (entry, _), items in by_picture.items()]
    total = sum(len(found) for found in checked.pictures)
    return [f"{total} pictures", *lines]


def _row(items: list[Item], repeats: int) -> str:
    picture = items[0].picture
    sizes = ", ".join(
        f"{size.width}x{size.height} (scale {max(size.width / picture.width, size.height / picture.height):.2f}, "
        f"crop {crop_percent(picture.width, picture.height, size):.0f} %)"
        for size in (item.size for item in items)
    )
    times = f"  x{repeats}" if repeats > 1 else ""
    return f"  {picture.path.name}: {picture.width}x{picture.height} -> {sizes}{times}  {picture.prompt!r}"


def _small_pictures(items: list[Item]) -> list[str]:
    """Pictures that fill less than a listed resolution, which they are then trained below."""
    small: dict[int, set[Path]] = {}
    total = len({item.picture.path for item in items})
    for item in items:
        if item.picture.width * item.picture.height < 0.9 * item.resolution**2:
            small.setdefault(item.resolution, set()).add(item.picture.path)
    lines = []
    for resolution, paths in sorted(small.items()):
        some = ", ".join(path.name for path in sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
        what = f"smaller than {resolution}x{resolution} px, so trained at their own size there"
        lines.append(f"{what}: {len(paths)} of {total} pictures ({some})")
    return lines


def _share_lines(checked: Checked, checkpointing: bool) -> list[str]:
    """Where the time and the memory of the run go: by resolution, and to previews; from operations, not a clock."""
    config = checked.config
    shape = checked.weights.shape if checked.weights else TransformerShape()
    work: dict[int, float] = {}
    for item in checked.items:
        work[item.resolution] = work.get(item.resolution, 0.0) + flops.step(shape, item.size, checkpointing)
    epoch = sum(work.values())
    lines = []
    for resolution, amount in sorted(work.items()):
        part = replace(checked, items=[item for item in checked.items if item.resolution == resolution])
        most = estimate(part, checkpointing, True).total / 1e9
        lines.append(f"  {resolution} px: {amount / epoch:.0%} of the training time, {most:.2f} GB a step")
    epochs = config.train.steps / make_plan(config, checked.items).steps_per_epoch
    recipes = [*previews(config), *also(config)]
    drawn = sum(
        flops.forward(shape, Bucket(one.width, one.height)) * one.steps * (2 if one.guidance > 0 else 1)
        for one in recipes
    )
    times = _previews_in_a_run(config)
    share = drawn * times / (drawn * times + epoch * epochs)
    lines.append(f"  previews: {times} times {len(recipes)} pictures, {share:.0%} of the run")
    return ["time by share of the arithmetic:", *lines]


def _previews_in_a_run(config: Config) -> int:
    every, steps = config.sample.every, config.train.steps
    if every is None:
        return 0
    return -(-steps // every) + config.sample.first


def _memory_limit(checked: Checked) -> float | None:
    budget = checked.config.memory.budget_gb
    return budget * 1e9 if not isinstance(budget, str) else _gpu_bytes()


def _recomputes(checked: Checked) -> bool:
    setting, limit = checked.config.memory.checkpointing, _memory_limit(checked)
    if isinstance(setting, bool):
        return setting
    return limit is not None and estimate(checked, False, True).total > limit


def _memory_lines(checked: Checked) -> list[str]:
    kept, recomputed = estimate(checked, False, True), estimate(checked, True, True)
    limit, use, setting = _memory_limit(checked), _recomputes(checked), checked.config.memory.checkpointing
    lines = ["memory of one training step:", *(f"  {line}" for line in (recomputed if use else kept).lines())]
    other = kept if use else recomputed
    lines.append(f"  {'without' if use else 'with'} recomputation it would be {other.total / 1e9:.2f} GB")
    if limit is None:
        lines.append("  no NVIDIA GPU found here: the run decides by the card it meets")
    elif (recomputed if setting == "auto" or setting else kept).total > limit:
        lines.append(f"  this does not fit {limit / 1e9:.1f} GB: {less_memory(checked, int(limit), True)}")
    return lines


def _gpu_bytes() -> float | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return float(output.splitlines()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
