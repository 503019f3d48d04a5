"""Everything that can be known before a GPU is touched: all problems at once, or all that a run needs (torch-free)."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.config.load import cache_dir
from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.dataset.image_index import ImageIndex
from zimage_train.dataset.sample_order import SampleOrder, TrainItem, make_items, make_sample_order, resolve_epochs
from zimage_train.dataset.scan import FolderScan, ImageRecord, scan_entry
from zimage_train.diffusion.request import comparison_requests, preview_requests, teacher_request
from zimage_train.errors import (
    ConfigError,
    Location,
    Note,
    Problem,
    WeightsError,
    ZImageTrainError,
    collect_errors,
    raise_all,
)
from zimage_train.io import atomic
from zimage_train.io.dtypes import bytes_per_number
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.progress import Progress
from zimage_train.io.units import format_bytes
from zimage_train.lora import headers, targets
from zimage_train.models import components, locate
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import DownloadFn, ModelPaths, NotDownloadedError
from zimage_train.planning import memory, path_lengths, planner
from zimage_train.planning.memory import SettingChange, Workload
from zimage_train.planning.notes import not_downloaded, notes_on_settings, notes_on_sizes
from zimage_train.planning.planner import Suggestion
from zimage_train.planning.warnings import config_warnings


@dataclass(frozen=True)
class ModelFiles:
    """The model of a run, as far as headers tell."""

    paths: ModelPaths
    shape: TransformerShape
    modules: list[str]
    """What gets a LoRA."""
    adapter_modules: int


@dataclass(frozen=True)
class RunSpec:
    """A config that was checked, with everything that it refers to."""

    config: Config
    """With steps in place of epochs."""
    images: list[list[ImageRecord]]
    """The images of each entry of `data`."""
    order: SampleOrder
    held_out: list[TrainItem]
    """The validation images."""
    weights: ModelFiles | None
    """None if a part of the model is not downloaded yet."""
    notes: list[Note]
    warnings: list[str]

    @property
    def items(self) -> tuple[TrainItem, ...]:
        return self.order.items


def check_run(
    config: Config,
    fetch: DownloadFn | None = None,
    tick: Progress = lambda what, done, total: None,
    processes: int = 1,
) -> RunSpec:
    """Check images, captions, weights, adapter and disk, for a run of `processes`, and decide the order of samples.

    Raises:
        ZImageTrainError: every problem found; the exit code is the lowest that applies.
    """
    errors: list[ZImageTrainError] = []
    notes: list[Note] = []
    looks = ImageIndex(cache_dir(config) / "looks.json")
    scans = [scan_entry(entry, f"data.{index}", looks, tick) for index, entry in enumerate(config.data)]
    held_out, faults, remarks = _held_out(config, scans, looks, tick)
    looks.save()
    errors += faults
    notes += remarks
    errors += [error for scan in scans for error in scan.errors]
    notes += [note for scan in scans for note in scan.notes]
    images = [scan.images for scan in scans]
    if config.method.generates_data:  # for one prompt each
        images = [[replace(one, prompts=one.prompts[:1]) for one in entry] for entry in images]
    items: list[TrainItem] = []
    with collect_errors(errors):
        items = make_items(config, images)
        notes += notes_on_settings(config)
    order = make_sample_order(config, items, processes)
    config = resolve_epochs(config, order)
    with collect_errors(errors):
        _require_bitsandbytes(config)
    weights, faults, absent = _weights(config, fetch)
    errors += faults
    notes += absent
    with collect_errors(errors):
        atomic.require_writable_folder(Path(config.output_dir) / config.name, "output_dir")
        if config.cache.folder is not None:
            atomic.require_writable_folder(Path(config.cache.folder), "cache.folder")
        path_lengths.require_short_paths(config)
        atomic.require_free_space(Path(config.output_dir), _disk_bytes(config, weights), "checkpoints and exports")
    own = [found for entry, found in zip(config.data, images, strict=True) if not entry.regularization]
    is_small = weights is not None and memory.parameters_of(weights.shape) <= memory.MAX_CPU_PARAMETERS
    warnings = config_warnings(config, sum(map(len, own)), is_small)
    checked = RunSpec(config, images, order, held_out, weights, notes, warnings)
    raise_all(errors)
    _require_budget(checked)
    notes += notes_on_sizes(items)
    return checked


def _held_out(
    config: Config, trained: list[FolderScan], looks: ImageIndex, tick: Progress
) -> tuple[list[TrainItem], list[ZImageTrainError], list[Note]]:
    """What validation looks at, read as the first data entry of the concept is; what is wrong with it; what is odd."""
    settings = config.validation
    if settings.folder is None or settings.every is None:
        return [], [], []
    first = next(entry for entry in config.data if not entry.regularization)
    entry = DataEntry(folder=settings.folder, resolution=[settings.resolution])
    read = ("trigger", "default_caption", "caption_ext", "caption_lines", "shuffle_tags", "tag_dropout")
    entry = entry.model_copy(update={name: getattr(first, name) for name in read})
    scan = scan_entry(entry, "validation", looks, tick)
    errors, items = scan.errors, []
    with collect_errors(errors):
        items = make_items(config.model_copy(update={"data": [entry]}), [scan.images])
    known = {image.digest for one in trained for image in one.images}
    both = [image.path.name for image in scan.images if image.digest in known]
    text = f"validation.folder: {len(both)} of its images are trained on too ({both[0]})" if both else ""
    return items, errors, scan.notes + ([Note("held-out-is-trained", text)] if both else [])


def _require_bitsandbytes(config: Config) -> None:
    """Refuse what needs a package that some platforms do not have, before anything is loaded for it.

    Raises:
        ConfigError: names the settings.
    """
    asked = {"model.quantize": config.model.quantize, "optimizer.name": config.optimizer.name}
    needing = ["model.quantize"] if config.model.quantize == "nf4" else []
    if OPTIMIZERS[config.optimizer.name].needs == "bitsandbytes":
        needing.append("optimizer.name")
    if needing and importlib.util.find_spec("bitsandbytes") is None:
        todo = "install it, or choose another value"
        what = "needs bitsandbytes, which is not installed"
        raise ConfigError(
            *(Problem(Location(key=key), f"{asked[key]} {what}", todo, "missing-package") for key in needing)
        )


def workload_of(checked: RunSpec, gpu: bool | None = None) -> Workload:
    """What `checked` trains, as far as memory and time go; what is not downloaded yet has the published models' size.

    `gpu`: whether on one; None: by the size of the model.
    """
    config = checked.config
    shape = checked.weights.shape if checked.weights else TransformerShape()
    modules = checked.weights.modules if checked.weights else targets.select_modules(config.lora.targets, shape.linears)
    if gpu is None:
        gpu = memory.parameters_of(shape) > memory.MAX_CPU_PARAMETERS
    job = memory.make_workload(
        config,
        shape,
        modules,
        checked.order,
        [*preview_requests(config), *comparison_requests(config)],
        gpu,
        checked.held_out,
    )
    if config.method.generates_data:
        sized = [(one.image.prompts[0], one.size.width, one.size.height) for one in checked.items]
        job = replace(job, generated=tuple(teacher_request(config, *one, seed=0) for one in sized))
    if checked.weights is None:
        return job
    found = checked.weights.paths
    in_fp32 = 2 * sum(path.stat().st_size for path in found.extra_loras)
    channels = components.read_vae(found.extras)[0]["block_out_channels"][0]
    return replace(job, vae_channels=channels, preview_lora_bytes=in_fp32)


def how_to_fit(checked: RunSpec, limit_bytes: float, gpu: bool | None = None) -> Suggestion:
    """Settings by which a step of `checked` is predicted to fit, each under the name that it has in this config."""
    job = workload_of(checked, gpu)
    wanted = planner.plan_constraints(checked.config, job.shape.n_layers)
    found = planner.suggest_settings(job, wanted, limit_bytes, main_memory_bytes())
    changes: list[SettingChange] = []
    for change in found.changes:
        changes += _in_config(checked.config, change)
    return replace(found, changes=changes)


def _in_config(config: Config, change: SettingChange) -> list[SettingChange]:
    """`change`, once for each entry of `data` that it is about."""
    entries = list(enumerate(config.data))
    if change.key == "data.*.resolution":
        side = int(change.value)
        return [
            SettingChange(f"data.{n}.resolution", side)
            if entry.max_pixels is None
            else SettingChange(f"data.{n}.max_pixels", side * side)
            for n, entry in entries
        ]
    if change.key == "train.batch_size":
        own = [n for n, entry in entries if entry.batch_size is not None]
        shared = [change] if len(own) < len(entries) and config.train.batch_size > 1 else []
        return [*shared, *(SettingChange(f"data.{n}.batch_size", change.value) for n in own)]
    return [change]


def _require_budget(checked: RunSpec) -> None:
    """A budget that someone sets is kept or refused; without one the card decides, and this is a prediction.

    Raises:
        ConfigError: a step would take more.
    """
    budget = checked.config.memory.budget_gb
    if isinstance(budget, str) or not checked.items:
        return
    job = workload_of(checked)
    wanted = planner.plan_constraints(checked.config, job.shape.n_layers)
    plan = planner.choose_plan(job, wanted, budget * 1e9, main_memory_bytes(), None)
    if not plan.fits:
        what = f"is {budget:g}, and a run takes {format_bytes(plan.peak.total)} (predicted)"
        todo = str(how_to_fit(checked, budget * 1e9))
        raise ConfigError(Problem(Location(key="memory.budget_gb"), what, todo, "does-not-fit"))


def _weights(config: Config, fetch: DownloadFn | None) -> tuple[ModelFiles | None, list[ZImageTrainError], list[Note]]:
    """The model, if all of it is here and right; what is wrong; what is not here yet. Each part for itself."""
    found = locate.find_paths(config.model, fetch)
    absent = [error for error in found.errors if isinstance(error, NotDownloadedError)]
    errors: list[ZImageTrainError] = [error for error in found.errors if error not in absent]
    notes = [not_downloaded(one) for error in absent for one in error.problems]

    transformer, extras, adapter = found.transformer, found.extras, found.adapter
    shape = TransformerShape()  # what is not here has the size of the published models
    if transformer is not None:
        try:
            shape = locate.transformer_tensors(transformer)[0]
        except WeightsError as error:
            return None, [*errors, error], notes
    also, faults, more = _also(config.sample.compare_on, shape if transformer else None, fetch)
    errors, notes = errors + faults, list(dict.fromkeys(notes + more))
    extra_loras, faults, more = _extra_loras(config, shape if transformer else None, fetch)
    errors, notes = errors + faults, [*notes, *more]
    modules: list[str] = []
    sizes: headers.Sizes = {}
    init_from: Path | None = None
    with collect_errors(errors):
        modules = targets.select_modules(config.lora.targets, shape.linears)
        init_from, more = _init_from(config, modules, shape if transformer else None, fetch)
        notes += more
    if extras is not None:
        with collect_errors(errors):
            components.require_components(extras, shape.cap_feat_dim)
    if adapter is not None and (transformer is not None or config.model.path is None):
        with collect_errors(errors):
            sizes = headers.read_sizes(adapter)
            headers.require_match(adapter, sizes, shape.linears)
    if errors or notes or transformer is None or extras is None:
        return None, errors, notes
    whole = ModelPaths(transformer, extras, adapter, also, init_from, extra_loras)
    return ModelFiles(whole, shape, modules, len(sizes)), [], []


def _also(
    name: str | None, shape: TransformerShape | None, fetch: DownloadFn | None
) -> tuple[Path | None, list[ZImageTrainError], list[Note]]:
    """The second model of previews, which must have the shape of the first; what is wrong; what is not here yet."""
    if name is None:
        return None, [], []
    where = Location(key="sample.compare_on")
    try:
        path = locate.transformer_at(name, where, fetch)
        found = locate.transformer_tensors(path)[0]
    except NotDownloadedError as error:
        return None, [], [not_downloaded(one) for one in error.problems]
    except WeightsError as error:
        return None, [error], []
    if shape is not None and found != shape:
        what = "has another shape than the model of this run, so its LoRA does not fit"
        todo = "give a model of the same size"
        return None, [WeightsError(Problem(replace(where, source=name), what, todo, "other-model"))], []
    return path, [], []


def _init_from(
    config: Config, modules: list[str], shape: TransformerShape | None, fetch: DownloadFn | None
) -> tuple[Path | None, list[Note]]:
    """The LoRA that the training begins with, and what is not here yet of it.

    Raises:
        WeightsError: it does not fit the model, or is no LoRA.
        ConfigError: it has other modules or another rank than the one that is to be trained.
    """
    name = config.lora.init_from
    if name is None:
        return None, []
    where = Location(key="lora.init_from")
    try:
        path = locate.lora_at(name, where, fetch)
    except NotDownloadedError as error:
        return None, [not_downloaded(one) for one in error.problems]
    if shape is None:
        return path, []
    headers.require_match(path, headers.read_sizes(path), shape.linears)
    ranks = headers.read_ranks(path)
    where = replace(where, source=name)
    problems = []
    if different := sorted(ranks.keys() ^ set(modules)):
        what = f"has {len(ranks)} modules and lora.targets {len(modules)}; {different[0]} is in one of them alone"
        problems.append(Problem(where, what, "set lora.targets to what it was trained with", "other-modules"))
    elif (found := set(ranks.values())) != {config.lora.rank}:
        shown = " and ".join(map(str, sorted(found)))
        todo = f"set lora.rank: {shown}" if len(found) == 1 else "make it one rank with `zimage-train lora resize`"
        what = f"has rank {shown}, and lora.rank is {config.lora.rank}"
        problems.append(Problem(where, what, todo, "other-rank"))
    if problems:
        raise ConfigError(*problems)
    return path, []


def _extra_loras(
    config: Config, shape: TransformerShape | None, fetch: DownloadFn | None
) -> tuple[tuple[Path, ...], list[ZImageTrainError], list[Note]]:
    """What previews have besides the run's own LoRA, all of which must fit; what is wrong; what is not here yet."""
    paths: list[Path] = []
    errors: list[ZImageTrainError] = []
    notes: list[Note] = []
    for index, one in enumerate(config.sample.extra_loras):
        try:
            path = locate.lora_at(one.file, Location(key=f"sample.extra_loras.{index}"), fetch)
            if shape is not None:
                headers.require_match(path, headers.read_sizes(path), shape.linears)
            paths.append(path)
        except NotDownloadedError as error:
            notes += map(not_downloaded, error.problems)
        except WeightsError as error:
            errors.append(error)
    return tuple(paths), errors, notes


def _disk_bytes(config: Config, weights: ModelFiles | None) -> int:
    if weights is None:
        return 0
    trained = sum(sum(weights.shape.linears[module]) for module in weights.modules) * config.lora.rank
    copies = 1 if config.ema.decay is None else 2
    checkpoint = trained * (4 * copies + OPTIMIZERS[config.optimizer.name].state_bytes)
    export = trained * bytes_per_number(config.save.dtype) * copies
    return int(checkpoint * 3 + export * (config.save.keep + 2))
