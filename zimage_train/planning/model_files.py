"""Search for the model files of a run, and checks of their headers, without reading a weight (torch-free)."""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train.config.sample import ExtraLora
from zimage_train.config.schema import Config
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
from zimage_train.lora import headers, keys, targets
from zimage_train.lora.kronecker_shapes import shapes_of
from zimage_train.lora.module_shapes import part_shapes
from zimage_train.models import components, locate
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ModelPaths
from zimage_train.models.locate import DownloadFn, NotDownloadedError
from zimage_train.planning.notes import not_downloaded


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, which are complete and fit together."""

    paths: ModelPaths
    shape: TransformerShape
    modules: list[str]
    """Names of the linear layers that get a LoRA."""
    adapter_modules: int
    """Number of modules that the training adapter changes; 0 without an adapter."""


def find_model_files(
    config: Config, fetch: DownloadFn | None
) -> tuple[ModelFiles | None, list[ZImageTrainError], list[Note]]:
    """Return the model files of `config`, the errors in them, and a note for each part that is still to be downloaded.

    The files are None if there is an error or a note. Every part is checked, even if another has errors, but
    nothing is compared with a transformer that cannot be read.
    """
    search = locate.find_paths(config.model, fetch)
    errors: list[ZImageTrainError] = []
    notes: list[Note] = []
    for error in search.errors:
        with _collect_problems(errors, notes):
            raise error

    transformer, extras, adapter = search.transformer, search.extras, search.adapter
    shape = TransformerShape()  # until a transformer is read, it is taken to be a published model
    known_shape: TransformerShape | None = None
    if transformer is not None:
        try:
            shape = known_shape = locate.transformer_tensors(transformer)[0]
        except WeightsError as error:
            return None, [*errors, error], notes

    second_model: Path | None = None
    with _collect_problems(errors, notes):
        second_model = _second_model(config, known_shape, fetch)
    extra_loras: list[Path] = []
    beside: list[Path] = []
    for key, settings, found, kinds in (
        # Merged before others are added, so their change may not depend on the weights.
        ("train.beside", config.train.beside, beside, headers.ADDITIVE),
        ("sample.extra_loras", config.sample.extra_loras, extra_loras, headers.READ),
    ):
        for index, lora in enumerate(settings):
            with _collect_problems(errors, notes):
                found.append(_extra_lora(Location(key=f"{key}.{index}"), lora, kinds, known_shape, fetch))
    with _collect_problems(errors, notes):
        _require_once(config, extra_loras, beside)
    modules: list[str] = []
    init_from: Path | None = None
    with _collect_problems(errors, notes):
        modules = targets.select_modules(config.lora.targets, shape.linears)
        _require_patterns_match(config, modules)
        _require_principal_parts(config, modules, shape)
        _require_groups(config, modules, shape)
        init_from = _init_from(config, modules, known_shape, fetch)
    if extras is not None:
        with collect_errors(errors):
            components.require_components(extras, shape.cap_feat_dim)
    adapter_sizes: headers.Sizes = {}
    # If `model.path` was not found its shape is unknown, so the adapter cannot be compared with it.
    if adapter is not None and (transformer is not None or config.model.path is None):
        with collect_errors(errors):
            adapter_sizes = headers.read_sizes(adapter, headers.ADDITIVE)
            headers.require_match(adapter, adapter_sizes, shape.linears)

    notes = list(dict.fromkeys(notes))  # two settings may name the same model
    if errors or notes or transformer is None or extras is None:
        return None, errors, notes
    paths = ModelPaths(transformer, extras, adapter, second_model, init_from, tuple(extra_loras), tuple(beside))
    return ModelFiles(paths, shape, modules, len(adapter_sizes)), [], []


@contextlib.contextmanager
def _collect_problems(errors: list[ZImageTrainError], notes: list[Note]) -> Iterator[None]:
    """Put a failure of the block into `errors`, or into `notes` if it is only a missing download; go on after it."""
    try:
        yield
    except NotDownloadedError as error:
        notes.extend(not_downloaded(problem) for problem in error.problems)
    except ZImageTrainError as error:
        errors.append(error)


def _second_model(config: Config, shape: TransformerShape | None, fetch: DownloadFn | None) -> Path | None:
    """Return the transformer of `sample.compare_on`, or None if there is none.

    Raises:
        WeightsError: it cannot be found, or its shape is not `shape`, so that the LoRA does not fit it.
    """
    name = config.sample.compare_on
    if name is None:
        return None
    location = Location(key="sample.compare_on")
    path = locate.transformer_at(name, location, fetch)
    second_shape = locate.transformer_tensors(path)[0]
    if shape is not None and second_shape != shape:
        message = "has another shape than the model of this run, so its LoRA does not fit"
        raise WeightsError(
            Problem(replace(location, source=name), message, "give a model of the same size", "other-model")
        )
    return path


def _init_from(
    config: Config, modules: list[str], shape: TransformerShape | None, fetch: DownloadFn | None
) -> Path | None:
    """Return the file of the LoRA that the training starts from, or None if it starts from a new LoRA.

    Raises:
        WeightsError: it cannot be found, is no LoRA, or does not fit a model of `shape`.
        ConfigError: its modules or its rank are not those of the LoRA to be trained.
    """
    name = config.lora.init_from
    if name is None:
        return None
    location = Location(key="lora.init_from")
    path = locate.lora_at(name, location, fetch)
    if shape is None:
        return path
    headers.require_match(path, headers.read_sizes(path), shape.linears)
    location = replace(location, source=name)
    if config.lora.type != "lora":
        found = headers.read_part_shapes(path, config.lora.label)
        _require_same_parts(config, found, modules, shape, location)
        return path
    ranks = headers.read_ranks(path)
    _require_same_modules(list(ranks), modules, location)
    distinct_ranks = sorted(set(ranks.values()))
    if config.lora.ranks:
        _require_same_ranks(ranks, targets.ranks_of(config.lora, modules), location)
    elif distinct_ranks != [config.lora.rank]:
        listed = " and ".join(map(str, distinct_ranks))
        least = distinct_ranks[0]
        hint = f"set lora.rank: {least}"
        if len(distinct_ranks) > 1:
            # No command makes a rank higher.
            hint = f"make its ranks equal with `zimage-train lora resize --rank {least}`, and {hint}"
        message = f"has rank {listed}, and lora.rank is {config.lora.rank}"
        raise ConfigError(Problem(location, message, hint, "other-rank"))
    return path


def _require_patterns_match(config: Config, modules: list[str]) -> None:
    """Require that each pattern of `lora.ranks` and `optimizer.lr_factors` matches modules that are trained.

    Raises:
        ConfigError: lists those that do not.
    """
    errors: list[ZImageTrainError] = []
    if config.lora.ranks:
        with collect_errors(errors):
            targets.ranks_of(config.lora, modules)
    with collect_errors(errors):
        targets.lr_factors_of(config.optimizer, modules)
    raise_all(errors)


def _require_principal_parts(config: Config, modules: list[str], shape: TransformerShape) -> None:
    """Require that each weight has as many singular values as `lora.start: pissa` takes of it.

    Raises:
        ConfigError: names the first that has not.
    """
    if config.lora.start != "pissa":
        return
    for module, rank in targets.ranks_of(config.lora, modules).items():
        most = min(shape.linears[module])
        if rank > most:
            message = f"{module} has rank {rank}, and its weight no more than {most} singular values"
            hint = f"set its rank to {most} at the most, by lora.rank or lora.ranks"
            raise ConfigError(Problem(Location(key="lora.start"), message, hint, "bad-value"))


def _require_groups(config: Config, modules: list[str], shape: TransformerShape) -> None:
    """Require that the rows of each weight can be divided into groups of `lora.rank` rows, of an OFT.

    Raises:
        ConfigError: names the first that cannot, and a rank with which all can.
    """
    rank = config.lora.rank
    if config.lora.type != "oft" or rank is None:
        return
    for module in modules:
        rows = shape.linears[module][0]
        if rows % rank:
            common = math.gcd(*(shape.linears[name][0] for name in modules))
            most = max(number for number in range(1, min(rank, common) + 1) if common % number == 0)
            message = f"{module} has {rows} rows, which are no groups of {rank}"
            raise ConfigError(Problem(Location(key="lora.rank"), message, f"set lora.rank: {most}", "bad-value"))


def _require_same_ranks(found: Mapping[str, int], wanted: Mapping[str, int], location: Location) -> None:
    for module, rank in wanted.items():
        if found[module] != rank:
            message = f"has rank {found[module]} in {module}, and this run {rank}"
            hint = "set lora.rank and lora.ranks to what it was trained with"
            raise ConfigError(Problem(location, message, hint, "other-rank"))


def _require_same_modules(found: list[str], modules: list[str], location: Location) -> None:
    different_modules = sorted(set(found) ^ set(modules))
    if different_modules:
        message = f"has {len(found)} modules and lora.targets {len(modules)}; {different_modules[0]} is in either alone"
        raise ConfigError(Problem(location, message, "set lora.targets to what it was trained with", "other-modules"))


def _require_same_parts(
    config: Config,
    found: Mapping[str, Mapping[str, tuple[int, ...]]],
    modules: list[str],
    shape: TransformerShape,
    location: Location,
) -> None:
    """Require that an adapter has the matrices that the one to be trained has."""
    _require_same_modules(list(found), modules, location)
    settings = config.lora
    for module in modules:
        if settings.type == "lokr":
            wanted = dict(shapes_of(settings, shape.linears, [module])[module].parts)
        else:
            wanted = part_shapes(settings, *shape.linears[module])
        parts = dict(_trained_part(part, size) for part, size in found[module].items())
        if parts != wanted:
            there, here = ", ".join(map(_described, parts.items())), ", ".join(map(_described, wanted.items()))
            size = "lora.factor and lora.rank" if settings.type == "lokr" else "lora.rank"
            hint = f"set {size} to what it was trained with"
            if keys.OFT in found[module]:
                hint = f"set lora.rank: {found[module][keys.OFT][1]}"
            raise ConfigError(Problem(location, f"has {there} in {module}, and this run {here}", hint, "other-rank"))


def _trained_part(part: str, size: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of the parameter that a run trains for the part of a file."""
    if part == keys.MAGNITUDE:  # a column
        return "gain", size[:1]
    if part == keys.OFT:  # of which a run has the part above the diagonals
        groups, rows, _ = size
        return "above", (groups, rows * (rows - 1) // 2)
    return part.removeprefix("lokr_").removeprefix("hada_"), size


def _described(part: tuple[str, tuple[int, ...]]) -> str:
    name, size = part
    return f"{name} {'x'.join(map(str, size))}"


def _require_once(config: Config, extra_loras: list[Path], beside: list[Path]) -> None:
    """Require that no LoRA is named by both `train.beside` and `sample.extra_loras`: previews would have it twice."""
    in_training = [path.resolve() for path in beside]
    for index, path in enumerate(extra_loras):
        if path.resolve() in in_training:
            location = Location(key=f"sample.extra_loras.{index}", source=config.sample.extra_loras[index].file)
            message = "is in train.beside, and previews have those LoRAs already"
            raise ConfigError(Problem(location, message, "name it only in train.beside", "conflicting-settings"))


def _extra_lora(
    location: Location,
    lora: ExtraLora,
    kinds: Collection[str],
    shape: TransformerShape | None,
    fetch: DownloadFn | None,
) -> Path:
    """Return the file of an entry of `sample.extra_loras` or `train.beside`.

    Raises:
        WeightsError: it cannot be found, is no LoRA, or does not fit a model of `shape`.
    """
    path = locate.lora_at(lora.file, location, fetch)
    if shape is not None:
        headers.require_match(path, headers.read_sizes(path, kinds), shape.linears)
    return path
