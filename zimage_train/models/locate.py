"""Where the parts of a model are: a hub id, a diffusers folder or a single file becomes paths on this machine.

Local paths never touch the network. Nothing is ever loaded by pickle, and no code that a repository holds is run.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import ADAPTERS, NAMED_LORAS, VARIANTS
from zimage_train.errors import Location, Problem, WeightsError, ZImageTrainError, collect_errors
from zimage_train.io.safetensors_format import hint_for_folder, read_json, require_readable_name
from zimage_train.models import arch, native_keys, stored_weights
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ExtrasPaths, ModelPaths
from zimage_train.models.hub import client
from zimage_train.models.stored_weights import StoredWeight

EXTRAS = ("text_encoder", "tokenizer", "vae")
MARKERS = {"text_encoder": "config.json", "tokenizer": "tokenizer.json", "vae": "config.json"}
"""A file that the folder of each part has."""
PART_PATTERNS = {
    "text_encoder": ["text_encoder/*", "config.json", "model*.safetensors*"],
    "tokenizer": ["tokenizer/*", "tokenizer*.json", "*.jinja"],
    "vae": ["vae/*", "config.json", "diffusion_pytorch_model*.safetensors*"],
}
"""The files of a part in a hub repository, which is a pipeline or holds that part alone."""

DOWNLOAD_HINT = "check the name and the connection, or give a local path"


LORA_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names of a LoRA in a folder of its own: peft's, and that of diffusers' scripts."""


class NotDownloadedError(WeightsError):
    """Everything named exists as far as is known, but some of it is not on this machine yet."""


DownloadFn = Callable[[str, str | None, list[str]], Path]


@dataclass(frozen=True)
class PathSearch:
    """What was found of a model, part by part, and what is wrong with the rest."""

    transformer: Path | None
    extras: ExtrasPaths | None
    adapter: Path | None
    errors: list[ZImageTrainError]


def find_paths(model: ModelSettings, fetch: DownloadFn | None = None) -> PathSearch:
    """Look for every part that `model` names, downloading from the hub what is not here yet.

    `fetch(repository, revision, patterns)` returns the local folder of a hub repository.
    """
    fetch = fetch or download
    variant = VARIANTS[model.variant]
    transformer = extras = adapter = None
    errors: list[ZImageTrainError] = []
    with collect_errors(errors):
        transformer = _transformer(model.path or variant.transformer, Location(key="model.path"), fetch)
    parts = _single_parts(model, fetch, errors)
    shared = [part for part in EXTRAS if getattr(model, part) is None]
    if shared and (transformer is not None or model.extras is not None or model.path is None):
        with collect_errors(errors):
            folder = _shared_folder(model, shared, fetch)
            parts |= {part: folder / part for part in shared}
    if len(parts) == len(EXTRAS):
        extras = ExtrasPaths(**parts)
    if model.adapter is not None:
        with collect_errors(errors):
            adapter = _file(ADAPTERS.get(model.adapter, model.adapter), Location(key="model.adapter"), fetch)
    return PathSearch(transformer, extras, adapter, errors)


def locate(model: ModelSettings, fetch: DownloadFn | None = None) -> ModelPaths:
    """Find every part that `model` names, as `search` does.

    Raises:
        WeightsError: lists every part that cannot be found.
    """
    found = find_paths(model, fetch)
    wrong = [error for error in found.errors if not isinstance(error, NotDownloadedError)] or found.errors
    if wrong:
        raise type(wrong[0])(*(problem for error in wrong for problem in error.problems))
    assert found.transformer is not None and found.extras is not None
    return ModelPaths(found.transformer, found.extras, found.adapter)


def transformer_at(name: str, where: Location, fetch: DownloadFn | None = None) -> Path:
    """The transformer alone that the setting or option `where` names: a variant, a folder, a file or a hub id.

    Raises:
        WeightsError: it cannot be found.
    """
    known = VARIANTS.get(name)
    return _transformer(known.transformer if known else name, where, fetch or download)


def lora_at(name: str, where: Location, fetch: DownloadFn | None = None) -> Path:
    """The LoRA that `name` is: a file or its folder, `org/repo/file` on the hub, or a short name such as distillpatch.

    Raises:
        WeightsError: it cannot be found.
    """
    path = Path(name)
    return lora_in(path, where) if path.is_dir() else _file(NAMED_LORAS.get(name, name), where, fetch or download)


def lora_in(path: Path, where: Location | None = None) -> Path:
    """Return `path`, or if it is a folder, the LoRA in it.

    Raises:
        WeightsError: it is a folder without a LoRA of one of the known names.
    """
    if not path.is_dir():
        return path
    for name in LORA_FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    what = f"is a folder without {' or '.join(LORA_FOLDER_FILES)}"
    place = str(path) if where is None else _named(where, str(path))
    raise WeightsError(Problem(place, what, "give the LoRA itself", "missing-file"))


def repository(name: str, where: Location, patterns: list[str], fetch: DownloadFn | None = None) -> Path:
    """The folder `name`, or the snapshot of the hub repository of that name, with the files that meet `patterns`.

    Raises:
        WeightsError: it is neither, or cannot be had.
    """
    path = Path(name)
    return path if path.is_dir() else _fetched(name, where, patterns, fetch or download)


def transformer_tensors(path: Path) -> tuple[TransformerShape, dict[str, StoredWeight]]:
    """Return the transformer's shape and its weights under diffusers' names, from headers alone.

    Everything that reads a transformer takes its weights from here, and so reads the same of a file.

    Raises:
        WeightsError: unreadable, in a precision that is not read, or not exactly the tensors of a Z-Image transformer.
    """
    stored = stored_weights.read_part(path, "transformer")
    if not path.is_dir() and any(".lora_" in name for name in stored):
        todo = "give a model, or this as --lora"
        raise WeightsError(Problem(str(path), "is a LoRA, no transformer", todo, "other-kind-of-file"))
    weights: dict[str, StoredWeight] = {}
    for key, weight in stored.items():
        for name, third in _diffusers_names(key):
            if name in weights:
                message = f"holds {name} twice, the second time as {key}"
                raise WeightsError(Problem(str(path), message, "get the file again", "damaged-file"))
            weights[name] = weight.split(third)
    shapes = {name: weight.shape for name, weight in weights.items()}
    if path.is_dir():
        shape = arch.shape_from_config(path / "config.json", read_json(path / "config.json"))
    else:
        shape = arch.shape_from_tensors(shapes)
    arch.require_same_shapes(str(path), shapes, shape.parameters, "a Z-Image transformer")
    return shape, weights


def _diffusers_names(name: str) -> list[tuple[str, int | None]]:
    """Return diffusers' names of a tensor in either layout, each with the third of a fused tensor that it is."""
    return [] if name == "norm_final.weight" else native_keys.from_native(name)  # an unused leftover in some files


def _transformer(name: str, where: Location, fetch: DownloadFn) -> Path:
    path = Path(name)
    if path.is_dir():
        for folder in (path / "transformer", path):
            if (folder / "config.json").exists():
                return folder
        what, todo = "holds no transformer/config.json", hint_for_folder(path) or "give a diffusers folder or a file"
        raise WeightsError(Problem(_named(where, name), what, todo, "incomplete-model"))
    if path.is_file():
        return path
    require_readable_name(name, _named(where, name))
    if name.endswith(".safetensors"):
        return _file(name, where, fetch)
    folder = _fetched(name, where, ["transformer/*", "model_index.json"], fetch)
    return _transformer(str(folder), _named(where, name), fetch)


def _single_parts(model: ModelSettings, fetch: DownloadFn, errors: list[ZImageTrainError]) -> dict[str, Path]:
    """Return part -> path for the parts that have a setting of their own, which comes before `model.extras`."""
    parts: dict[str, Path] = {}
    for part in EXTRAS:
        name = getattr(model, part)
        if name is not None:
            with collect_errors(errors):
                parts[part] = _single_part(part, name, fetch)
    return parts


def _single_part(part: str, name: str, fetch: DownloadFn) -> Path:
    """Return the folder or the file `name` of a part, or its folder in the pipeline or hub repository `name`."""
    path, where = Path(name), Location(key=f"model.{part}")
    has_single_file = part != "tokenizer"
    if path.is_file():
        if has_single_file:
            return path
        require_readable_name(name, _named(where, name))
        what, todo = "is a file", f"give the folder that {MARKERS[part]} is in, or a hub id"
        raise WeightsError(Problem(_named(where, name), what, todo, "not-a-folder"))
    if not path.is_dir():
        require_readable_name(name, _named(where, name))
        if has_single_file and name.endswith(".safetensors"):
            return _file(name, where, fetch)
        path = _fetched(name, where, PART_PATTERNS[part], fetch)
    for folder in (path / part, path):
        if (folder / MARKERS[part]).exists():
            return folder
    what = f"holds neither {part}/{MARKERS[part]} nor {MARKERS[part]}"
    todo = "give a folder or hub id that has it"
    if has_single_file:
        todo = hint_for_folder(path) or f"{todo}, or the .safetensors itself"
    raise WeightsError(Problem(_named(where, name), what, todo, "incomplete-model"))


def _shared_folder(model: ModelSettings, parts: list[str], fetch: DownloadFn) -> Path:
    """Return the folder of `parts`: `model.extras`; else that of the pipeline at `model.path`; else the variant's."""
    patterns, where = [f"{part}/*" for part in parts], Location(key="model.extras")
    variant = VARIANTS[model.variant]
    if model.extras is not None:
        path = Path(model.extras)
        if not path.is_dir():
            require_readable_name(model.extras, _named(where, model.extras))
        if not path.exists():
            path = _fetched(model.extras, where, patterns, fetch)
        return _whole(path, model.extras, parts)
    if model.path is not None:
        path = Path(model.path)
        if (path / "transformer").is_dir():  # a whole pipeline, so what it lacks is missing and not elsewhere
            return _whole(path, model.path, parts)
        if not path.exists() and not model.path.endswith(".safetensors"):
            path = _fetched(model.path, Location(key="model.path"), patterns, fetch)
            if all((path / part).is_dir() for part in parts):
                return path
    return _whole(_fetched(variant.extras, where, patterns, fetch), variant.extras, parts)


def _whole(path: Path, name: str, parts: list[str]) -> Path:
    missing = [part for part in parts if not (path / part).is_dir()]
    if missing:
        what = f"{name} has no {', '.join(missing)}"
        settings = " or ".join(f"model.{part}" for part in missing)
        todo = f"give a diffusers folder or hub id that has them, or set {settings}"
        raise WeightsError(Problem(Location(key="model.extras"), what, todo, "incomplete-model"))
    return path


def _fetched(name: str, where: Location, patterns: list[str], fetch: DownloadFn) -> Path:
    """The snapshot of the hub repository `name`; what goes wrong is said of the setting `where`."""
    repository, revision = _hub_id(name, where)
    try:
        return fetch(repository, revision, patterns)
    except client.HubUnavailableError:  # no setting's doing
        raise
    except WeightsError as error:
        raise type(error)(
            *(replace(problem, location=_named(where, str(problem.location))) for problem in error.problems)
        ) from None


def _named(where: Location, name: str) -> Location:
    """The place `where` with the name that it gives; after that, what the name leads to."""
    return replace(where, source=name if where.source is None else f"{where.source}: {name}")


def _file(name: str, where: Location, fetch: DownloadFn) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    require_readable_name(name, _named(where, name))
    parts = name.split("/")
    if path.is_absolute() or len(parts) < 3 or name.startswith("."):
        what = "is a folder, not a file" if path.exists() else "does not exist"
        todo = "give a file that is there, or org/repo/file on the hub"
        raise WeightsError(Problem(_named(where, name), what, todo, "missing-file"))
    _require_not_local(name, where)
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    found = _fetched(repository, where, [inside], fetch) / inside
    if not found.is_file():
        raise WeightsError(Problem(_named(where, name), f"{repository} has no such file", "check it", "missing-file"))
    return found


def _hub_id(name: str, where: Location) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    parts = repository.split("/")
    if len(parts) != 2 or not all(parts) or repository.startswith((".", "~")):
        todo = "give a folder or .safetensors that is there, or a hub id such as Tongyi-MAI/Z-Image-Turbo"
        raise WeightsError(
            Problem(_named(where, name), "is neither a path that exists nor a hub id", todo, "missing-file")
        )
    _require_not_local(name, where)
    return repository, revision or None


def _require_not_local(name: str, where: Location) -> None:
    """Refuse a name that reads like a hub id and is a mistyped path: `my/loras/adapter.safetensors`.

    Raises:
        WeightsError: its first folder is on this machine, or the path is after the correction of a letter or two.
    """
    first, _, rest = name.partition("/")
    like = _like(Path(), first)
    if Path(first).is_dir():
        parent = Path(first)
        for part in Path(rest).parts:
            if not (parent / part).exists():
                near = _like(parent, part)
                todo = f"did you mean {parent / near}?" if near else "check the path"
                what = f"does not exist: there is no {part} in {parent}"
                raise WeightsError(Problem(_named(where, name), what, todo, "missing-file"))
            parent /= part
    elif like and (Path(like) / rest).exists():
        todo = f"did you mean {like}/{rest}?"
        raise WeightsError(
            Problem(_named(where, name), f"does not exist: there is no {first} here", todo, "missing-file")
        )


def _like(folder: Path, name: str) -> str | None:
    """Return the entry of `folder` whose name is nearest to `name`, or None if none is near."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.8)), None)


def download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The local snapshot of a hub repository, completed if need be.

    Raises:
        WeightsError: the hub cannot be reached, or has no such repository.
    """
    return _snapshot(repository, revision, patterns, local_only=False)


def cached_only(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Like `download`, from what is on this machine already.

    Raises:
        NotDownloadedError: nothing that `patterns` match is here; the snapshot may hold other files.
    """
    folder = _snapshot(repository, revision, patterns, local_only=True)
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise _not_downloaded(repository, revision)
    return folder


def is_here(repository: str, patterns: list[str]) -> bool:
    """Whether a snapshot of `repository` with something of each of `patterns` is on this machine."""
    try:
        folder = cached_only(repository, None, patterns)
    except NotDownloadedError:
        return False
    return all(any(folder.glob(pattern)) for pattern in patterns)


def _snapshot(repository: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    source = client.selected_hub()
    try:
        return source.snapshot(repository, revision, patterns, local_only)
    except Exception as error:  # noqa: BLE001  the hubs raise a dozen kinds, from four libraries
        if local_only:
            raise _not_downloaded(repository, revision) from None
        what = f"cannot be downloaded ({client.first_line(error)})"
        where = _with_revision(repository, revision)
        raise WeightsError(Problem(where, what, DOWNLOAD_HINT, "download-failed")) from None


def _not_downloaded(repository: str, revision: str | None) -> NotDownloadedError:
    where = _with_revision(repository, revision)
    return NotDownloadedError(Problem(where, "is not on this machine", DOWNLOAD_HINT, "not-downloaded"))


def _with_revision(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision}" if revision else repository
