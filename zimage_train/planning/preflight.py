"""All checks of a run that need no GPU; every problem is reported at once (torch-free)."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train.config.dataset import DataEntry
from zimage_train.config.load import cache_dir
from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.dataset.images import INDEX_NAME, ImageIndex
from zimage_train.dataset.sample_order import SampleOrder, TrainItem, make_items, make_sample_order, resolve_epochs
from zimage_train.dataset.scan import FolderScan, ImageRecord, scan_entry
from zimage_train.diffusion.request import comparison_requests, preview_requests, teacher_request
from zimage_train.errors import ConfigError, Location, Note, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.io import atomic
from zimage_train.io.dtypes import bytes_per_number
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.progress import Progress, no_progress
from zimage_train.io.units import format_bytes
from zimage_train.lora import targets
from zimage_train.models import components
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import DownloadFn
from zimage_train.planning import memory, path_lengths, planner
from zimage_train.planning.config_warnings import ConfigWarning, config_warnings
from zimage_train.planning.model_files import ModelFiles, find_model_files
from zimage_train.planning.notes import notes_on_settings, notes_on_sizes
from zimage_train.planning.suggestions import SettingChange, Suggestion, suggest_settings
from zimage_train.planning.workload import Workload, adapter_parameters, make_workload


@dataclass(frozen=True)
class RunSpec:
    """A config that has been checked, and everything that it refers to."""

    config: Config
    """The config with `train.epochs` converted to `train.steps`."""
    images: list[list[ImageRecord]]
    """The images of each entry of `data`."""
    order: SampleOrder
    held_out: list[TrainItem]
    """The validation images."""
    model_files: ModelFiles | None
    """None if a part of the model is not downloaded yet."""
    notes: list[Note]
    warnings: list[ConfigWarning]

    @property
    def items(self) -> tuple[TrainItem, ...]:
        return self.order.items


def check_run(
    config: Config,
    fetch: DownloadFn | None = None,
    progress: Progress = no_progress,
    processes: int = 1,
) -> RunSpec:
    """Check images, settings, model files and disk, and return the specification of a run of `processes`.

    Raises:
        ZImageTrainError: every problem found; the exit code is the lowest that applies.
    """
    errors: list[ZImageTrainError] = []
    notes: list[Note] = []

    # Images. The order is made of those without errors, so that the checks below can go on.
    images, held_out = _read_images(config, progress, errors, notes)
    items: list[TrainItem] = []
    with collect_errors(errors):
        items = make_items(config, images)
    order = make_sample_order(config, items, processes)

    # Config. The notes are on what the user wrote, before epochs become steps.
    notes += notes_on_settings(config)
    config = resolve_epochs(config, order)
    with collect_errors(errors):
        _require_bitsandbytes(config)

    # Model files.
    model_files, model_errors, download_notes = find_model_files(config, fetch)
    errors += model_errors
    notes += download_notes

    # Disk.
    with collect_errors(errors):
        _require_disk(config, model_files)
    raise_all(errors)

    # Warnings, and the budget, which needs the whole specification.
    notes += notes_on_sizes(items)
    warnings = _warnings(config, images, model_files)
    spec = RunSpec(config, images, order, held_out, model_files, notes, warnings)
    _require_budget(spec)
    return spec


def _read_images(
    config: Config, progress: Progress, errors: list[ZImageTrainError], notes: list[Note]
) -> tuple[list[list[ImageRecord]], list[TrainItem]]:
    """Return the images of each data entry and the validation items; append to `errors` and `notes`."""
    index = ImageIndex(cache_dir(config) / INDEX_NAME)
    scans = [scan_entry(entry, f"data.{number}", index, progress) for number, entry in enumerate(config.data)]
    for scan in scans:
        errors += scan.errors
        notes += scan.notes
    held_out = _read_validation_images(config, scans, index, progress, errors, notes)
    index.save()
    images: list[list[ImageRecord]] = []
    for scan in scans:
        records = scan.images
        if config.method.generates_data:
            # The model draws a single image for each record, for its first prompt.
            records = [replace(image, prompts=image.prompts[:1]) for image in records]
        images.append(records)
    return images, held_out


def _read_validation_images(
    config: Config,
    scans: list[FolderScan],
    index: ImageIndex,
    progress: Progress,
    errors: list[ZImageTrainError],
    notes: list[Note],
) -> list[TrainItem]:
    """Return the items of `validation.folder`; append to `errors` and `notes`.

    `scans` are those of the training data. Images that are in both get a note.
    """
    settings = config.validation
    if settings.folder is None or settings.every is None:
        return []
    # Captions are read like those of the first data entry of the concept, so that both losses have similar prompts.
    concept = next(entry for entry in config.data if not entry.regularization)
    caption_settings = ("trigger", "default_caption", "caption_ext", "caption_lines", "shuffle_tags", "tag_dropout")
    entry = DataEntry(folder=settings.folder, resolution=[settings.resolution])
    entry = entry.model_copy(update={name: getattr(concept, name) for name in caption_settings})
    scan = scan_entry(entry, "validation", index, progress)
    errors += scan.errors
    notes += scan.notes
    items: list[TrainItem] = []
    with collect_errors(errors):
        items = make_items(config.model_copy(update={"data": [entry]}), [scan.images])
    # Compared by content: the same image may have another name there.
    trained_digests: set[str] = set()
    for trained in scans:
        trained_digests.update(image.digest for image in trained.images)
    also_trained = [image.path.name for image in scan.images if image.digest in trained_digests]
    if also_trained:
        text = f"validation.folder: {len(also_trained)} of its images are trained on too ({also_trained[0]})"
        notes.append(Note("held-out-is-trained", text))
    return items


def _require_bitsandbytes(config: Config) -> None:
    """Require bitsandbytes, which some platforms do not have, where a setting needs it.

    Raises:
        ConfigError: names the settings.
    """
    needed_by: dict[str, str] = {}
    if config.model.quantize == "nf4":
        needed_by["model.quantize"] = config.model.quantize
    if OPTIMIZERS[config.optimizer.name].needs == "bitsandbytes":
        needed_by["optimizer.name"] = config.optimizer.name
    # `find_spec`, because importing it would load torch.
    if not needed_by or importlib.util.find_spec("bitsandbytes") is not None:
        return
    problems = []
    for key, value in needed_by.items():
        message = f"{value} needs bitsandbytes, which is not installed"
        problems.append(Problem(Location(key=key), message, "install it, or choose another value", "missing-package"))
    raise ConfigError(*problems)


def _require_disk(config: Config, model_files: ModelFiles | None) -> None:
    """Require that the folders of the run can be written and have space for its checkpoints and exports.

    Raises:
        ConfigError: a path is too long for this system.
        DiskError: a folder cannot be written, or there is too little space.
    """
    atomic.require_writable_folder(Path(config.output_dir) / config.name, "output_dir")
    if config.cache.folder is not None:
        atomic.require_writable_folder(Path(config.cache.folder), "cache.folder")
    path_lengths.require_short_paths(config)
    atomic.require_free_space(Path(config.output_dir), _disk_bytes(config, model_files), "checkpoints and exports")


def _disk_bytes(config: Config, model_files: ModelFiles | None) -> int:
    """Return the bytes of checkpoints and exports; 0 while the model is not known."""
    if model_files is None:
        return 0
    parameters = adapter_parameters(config.lora, model_files.shape, model_files.modules)
    copies = 1 if config.ema.decay is None else 2
    fixed = parameters if config.lora.start == "pissa" else 0
    checkpoint = parameters * (4 * copies + OPTIMIZERS[config.optimizer.name].state_bytes)
    checkpoint += fixed * bytes_per_number(config.model.dtype)
    export = (parameters + fixed) * bytes_per_number(config.save.dtype) * copies
    # An old file is removed once the new file is complete. So there are at most two checkpoints and a new one; and of
    # exports `save.keep`, a new export, and the final export.
    return int(checkpoint * 3 + export * (config.save.keep + 2))


def _warnings(config: Config, images: list[list[ImageRecord]], model_files: ModelFiles | None) -> list[ConfigWarning]:
    concept_images = 0
    for entry, records in zip(config.data, images, strict=True):
        if not entry.regularization:
            concept_images += len(records)
    is_small = model_files is not None and memory.parameters_of(model_files.shape) <= memory.MAX_CPU_PARAMETERS
    return config_warnings(config, concept_images, is_small)


def workload_of(spec: RunSpec, gpu: bool | None = None) -> Workload:
    """Return the workload of the run; a model that is not downloaded yet is taken to have the published size.

    `gpu` is whether it runs on a GPU; None means that it does if the model is too large for a CPU.
    """
    config, model_files = spec.config, spec.model_files
    if model_files is None:
        shape = TransformerShape()
        modules = targets.select_modules(config.lora.targets, shape.linears)
    else:
        shape, modules = model_files.shape, model_files.modules
    if gpu is None:
        gpu = memory.parameters_of(shape) > memory.MAX_CPU_PARAMETERS
    previews = [*preview_requests(config) * len(config.preview_weights), *comparison_requests(config)]
    workload = make_workload(config, shape, modules, spec.order, previews, gpu, spec.held_out)
    if config.method.generates_data:
        generated = []
        for item in spec.items:
            prompt, size = item.image.prompts[0], item.size
            generated.append(teacher_request(config, prompt, size.width, size.height, seed=0))
        workload = replace(workload, generated=tuple(generated))
    if model_files is None:
        return workload
    vae_config = components.read_vae(model_files.paths.extras.vae)[0]
    # Files in bf16, as LoRAs usually are, are loaded in fp32.
    paths = model_files.paths
    lora_bytes = 2 * sum(path.stat().st_size for path in (*paths.extra_loras, *paths.beside))
    return replace(workload, vae_channels=vae_config["block_out_channels"][0], preview_lora_bytes=lora_bytes)


def how_to_fit(spec: RunSpec, limit_bytes: float, gpu: bool | None = None) -> Suggestion:
    """Return the settings by which the run is predicted to fit `limit_bytes`, with the keys of its config."""
    workload = workload_of(spec, gpu)
    constraints = planner.plan_constraints(spec.config, workload.shape.n_layers)
    suggestion = suggest_settings(workload, constraints, limit_bytes, main_memory_bytes())
    changes: list[SettingChange] = []
    for change in suggestion.changes:
        changes += _changes_in_config(spec.config, change)
    return replace(suggestion, changes=changes)


def _changes_in_config(config: Config, change: SettingChange) -> list[SettingChange]:
    """Return `change` as changes of keys of `config`, a change for each data entry that it concerns."""
    if change.key == "data.*.resolution":
        side = int(change.value)
        changes = []
        for index, entry in enumerate(config.data):
            if entry.max_pixels is None:
                changes.append(SettingChange(f"data.{index}.resolution", side))
            else:
                changes.append(SettingChange(f"data.{index}.max_pixels", side * side))
        return changes
    if change.key == "train.batch_size":
        with_own = [index for index, entry in enumerate(config.data) if entry.batch_size is not None]
        # Where every entry has a batch size of its own, the shared batch size has no effect.
        shared = [change] if len(with_own) < len(config.data) and config.train.batch_size > 1 else []
        return [*shared, *(SettingChange(f"data.{index}.batch_size", change.value) for index in with_own)]
    return [change]


def _require_budget(spec: RunSpec) -> None:
    """Require that the run is predicted to fit `memory.budget_gb`, if it is set.

    Without a budget nothing is refused: the card may differ, and the prediction may be too high.

    Raises:
        ConfigError: the run is predicted to take more; the hint names settings that would fit.
    """
    budget_gb = spec.config.memory.budget_gb
    if isinstance(budget_gb, str) or not spec.items:
        return
    workload = workload_of(spec)
    constraints = planner.plan_constraints(spec.config, workload.shape.n_layers)
    plan = planner.choose_plan(workload, constraints, budget_gb * 1e9, main_memory_bytes(), None)
    if not plan.fits:
        message = f"is {budget_gb:g}, and a run takes {format_bytes(plan.peak.total)} (predicted)"
        hint = str(how_to_fit(spec, budget_gb * 1e9))
        raise ConfigError(Problem(Location(key="memory.budget_gb"), message, hint, "does-not-fit"))
