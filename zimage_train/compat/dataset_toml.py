"""Conversion of the dataset files of kohya's sd-scripts and of musubi-tuner (TOML) to the entries of `data`.

Both have `[general]` with values for all, and `[[datasets]]`. A dataset of sd-scripts has `[[datasets.subsets]]` with
the folders; one of musubi-tuner has its folder itself. Each key becomes a setting, is left out with a note, or is
refused. References: library/config_util.py of sd-scripts, dataset/config_utils.py of musubi-tuner.
"""

import math
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_train.config import load
from zimage_train.config.foreign import ConfigWithNotes
from zimage_train.config.strict_yaml import KeyPath, YamlDocument
from zimage_train.errors import ConfigError, Location, Problem

KOHYA, MUSUBI = "sd-scripts", "musubi-tuner"
_HEADER = re.compile(r"^\s*(\[{1,2})\s*([\w.\s\"-]+?)\s*\]{1,2}\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*([\w-]+|\"[^\"]*\")\s*=")
_AT_LINE = re.compile(r"\s*\(at line (\d+), column \d+\)|\s*\(at end of document\)")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Rule:
    """The treatment of a key.

    With `setting`, its value becomes that of a setting of the entry. Otherwise a value other than the `neutral` ones is
    left out with a note of `why`, or refused if there is a `hint`.
    """

    kind: type | tuple[type, ...]
    setting: str = ""
    why: str = ""
    hint: str = ""
    neutral: tuple[Any, ...] = (False, 0, "", None)
    convert: Callable[[Any], Any] = _same


def _extension(text: str) -> str:
    return text if text.startswith(".") else f".{text}"


NUMBER = (int, float)
LARGEST = 10**9
"""No whole number of a setting is larger."""
_EDITING = ("is for editing models", "leave it out: Z-Image LoRAs are trained without control images")
_VIDEO = ("is for videos", "give a dataset of images; this trainer has no videos")
_FRAMES = Rule((int, list, bool), why="is for FramePack", hint="leave it out", neutral=())
SHARED: dict[str, Rule] = {
    "caption_extension": Rule(str, "caption_ext", convert=_extension),
    "batch_size": Rule(int, "batch_size"),
    "num_repeats": Rule(int, "repeats"),
    "resolution": Rule((int, list)),
    "enable_bucket": Rule(bool),
    "bucket_no_upscale": Rule(bool),
}
MUSUBI_KEYS: dict[str, Rule] = SHARED | {
    "image_directory": Rule(str, "folder"),
    "image_jsonl_file": Rule(str, "metadata"),
    "cache_directory": Rule(str, why="is left out: the cache has a place of its own (cache.folder)"),
    "control_directory": Rule(str, "", *_EDITING),
    "multiple_target": Rule(bool, "", *_EDITING),
    "no_resize_control": Rule(bool, "", *_EDITING),
    "control_resolution": Rule((int, list), "", *_EDITING),
    **dict.fromkeys(("flux_kontext_no_resize_control", "qwen_image_edit_no_resize_control"), Rule(bool, "", *_EDITING)),
    "qwen_image_edit_control_resolution": Rule((int, list), "", *_EDITING),
    **dict.fromkeys(("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"), _FRAMES),
    "video_directory": Rule(str, "", *_VIDEO),
    "video_jsonl_file": Rule(str, "", *_VIDEO),
    "target_frames": Rule(list, "", *_VIDEO),
    "frame_extraction": Rule(str, "", *_VIDEO),
    **dict.fromkeys(("frame_stride", "frame_sample", "max_frames"), Rule(int, "", *_VIDEO)),
    "source_fps": Rule(NUMBER, "", *_VIDEO),
}
_BUCKETS = "is left out: sizes are multiples of 16 with the area of the resolution"
KOHYA_SUBSET: dict[str, Rule] = {
    "image_dir": Rule(str, "folder"),
    "metadata_file": Rule(
        str, why="is a .json of captions", hint="make it a .jsonl with image and prompt, and set data.0.metadata"
    ),
    "conditioning_data_dir": Rule(str, "", *_EDITING),
    "is_reg": Rule(bool, "regularization"),
    "alpha_mask": Rule(bool, "mask", convert=lambda value: "alpha" if value else None),
    "class_tokens": Rule(str, "default_caption"),
    "cache_info": Rule(bool, why="is left out: images are always indexed"),
    "num_repeats": Rule(int, "repeats"),
    "shuffle_caption": Rule(bool, "shuffle_tags"),
    "keep_tokens": Rule(int, "keep_tags"),
    "caption_extension": Rule(str, "caption_ext", convert=_extension),
    "caption_separator": Rule(str, why="is not a comma", hint="separate tags by commas", neutral=(",", ", ")),
    "caption_dropout_rate": Rule(NUMBER, "caption_dropout", convert=float),
    "caption_tag_dropout_rate": Rule(NUMBER, "tag_dropout", convert=float),
    "flip_aug": Rule(bool, "flip"),
    "caption_dropout_every_n_epochs": Rule(int, why="drops all captions of an epoch", hint="use caption_dropout_rate"),
    "keep_tokens_separator": Rule(str, why="marks kept tags in captions", hint="use keep_tokens"),
    "secondary_separator": Rule(str, why="joins tags", hint="write joined tags without commas"),
    "enable_wildcard": Rule(
        bool, why="draws words in captions", hint="write a caption per line (data.0.caption_lines)"
    ),
    "caption_prefix": Rule(str, why="is put before captions", hint="set data.0.trigger, or write it into the captions"),
    "caption_suffix": Rule(str, why="is put after captions", hint="write it into the captions"),
    "color_aug": Rule(bool, why="changes colours at random", hint="leave it out; it is taught to the LoRA"),
    "random_crop": Rule(bool, why="crops at random", hint="leave it out; images are cropped at the centre"),
    "face_crop_aug_range": Rule(list, why="crops at faces", hint="leave it out", neutral=()),
    "token_warmup_min": Rule(int, neutral=(1,), why="has no effect without token_warmup_step"),
    "token_warmup_step": Rule(NUMBER, why="adds tags during the run", hint="leave it out"),
    "custom_attributes": Rule(dict, why="is left out: no training of Z-Image uses it", neutral=({},)),
    "resize_interpolation": Rule(str, why="is left out: images are reduced by Lanczos"),
}
KOHYA_DATASET: dict[str, Rule] = SHARED | {
    "min_bucket_reso": Rule(int, why=_BUCKETS),
    "max_bucket_reso": Rule(int, why=_BUCKETS),
    "bucket_reso_steps": Rule(int, why=_BUCKETS),
    "network_multiplier": Rule(
        NUMBER, why="scales the LoRA itself", hint="leave it out, or set data.0.weight", neutral=(1,)
    ),
    "validation_seed": Rule(int, why="is left out: validation.folder holds out whole images"),
    "validation_split": Rule(
        NUMBER, why="holds out a share", hint="move images to a folder, and set validation.folder"
    ),
    "prior_loss_weight": Rule(NUMBER, why="is a flag there", hint="set data.0.weight of the images", neutral=(1,)),
    "debug_dataset": Rule(bool, why="is left out: check shows the data"),
}


@dataclass
class _Reader:
    """A dataset file under conversion."""

    path: Path
    lines: dict[KeyPath, int]
    problems: list[Problem] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    """An ordered set: several datasets have the same note."""
    origins: dict[KeyPath, KeyPath] = field(default_factory=dict)
    """Path of a setting -> path of the key that it is from."""

    def refuse(self, path: KeyPath, message: str, hint: str, code: str = "bad-value") -> None:
        location = Location(str(self.path), self.line(path), _dotted(path) or None)
        self.problems.append(Problem(location, message, hint, code))

    def line(self, path: KeyPath) -> int:
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return 1


def convert_dataset(path: Path, text: str, overrides: Sequence[str] = ()) -> ConfigWithNotes:
    """Return the config whose `data` a dataset file becomes; all other settings have their defaults.

    Raises:
        ConfigError: it is not valid TOML, or lists every problem.
    """
    try:
        content = tomllib.loads(text)
    except RecursionError:
        problem = Problem(str(path), "is nested too deeply", "write lists of at most two levels", "not-toml")
        raise ConfigError(problem) from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise ConfigError(_syntax_problem(path, text, str(error))) from None
    reader = _Reader(path, _key_lines(text))
    datasets = content.get("datasets")
    if not isinstance(datasets, list) or not datasets or not all(isinstance(one, dict) for one in datasets):
        reader.refuse(
            ("datasets",), "is missing or empty", "write a [[datasets]] for each folder of images", "missing-key"
        )
        raise ConfigError(*reader.problems)
    is_kohya = any("subsets" in dataset or "image_dir" in dataset for dataset in datasets)
    kind = KOHYA if is_kohya else MUSUBI
    for key in content.keys() - {"general", "datasets"}:
        reader.refuse((key,), f"is no part of a dataset file of {kind}", "leave it out", "unknown-key")
    general = content.get("general", {})
    if not isinstance(general, dict):
        reader.refuse(("general",), "is no section", "write [general] above its keys", "bad-value")
        general = {}
    general_rules = KOHYA_DATASET | KOHYA_SUBSET if is_kohya else SHARED
    values, origins = _read_keys(reader, general, ("general",), general_rules, kind)
    entries: list[dict[str, Any]] = []
    for index, dataset in enumerate(datasets):
        here: KeyPath = ("datasets", index)
        layer = (values, origins)
        if is_kohya:
            _add_kohya(reader, dataset, here, layer, entries)
        else:
            found = _layered(layer, _read_keys(reader, dataset, here, MUSUBI_KEYS, kind))
            _add_entry(reader, here, found, entries, {"caption_dropout": 0.0})
    name = re.sub(r"[^\w .+-]", "_", path.stem).strip(" .-+") or "run"
    document = YamlDocument({"name": re.sub(r"-(\d+)$", r"_\1", name), "data": entries})
    document.lines = {(): 1} | {setting: reader.line(key) for setting, key in reader.origins.items()}
    document.names = {setting: _dotted(key) for setting, key in reader.origins.items()}
    config = load.load_document(path, document, overrides, reader.problems)
    notes = [f"{path.name} holds the images of {kind} alone; every other setting has its default", *reader.notes]
    return ConfigWithNotes(config, notes)


Layer = tuple[dict[str, Any], dict[str, KeyPath]]
"""Values by key, and where each of them stands."""


def _layered(outer: Layer, inner: Layer) -> Layer:
    return outer[0] | inner[0], outer[1] | inner[1]


def _add_kohya(reader: _Reader, dataset: dict[str, Any], here: KeyPath, general: Layer, entries: list[Any]) -> None:
    """Add an entry for each subset of a dataset of sd-scripts."""
    subsets = dataset.get("subsets", [])
    own = {key: value for key, value in dataset.items() if key != "subsets"}
    rules = KOHYA_DATASET | {key: rule for key, rule in KOHYA_SUBSET.items() if key not in ("image_dir", "is_reg")}
    layer = _layered(general, _read_keys(reader, own, here, rules, KOHYA))
    if not isinstance(subsets, list) or not subsets or not all(isinstance(one, dict) for one in subsets):
        reader.refuse(here, "has no subsets", "write [[datasets.subsets]] with image_dir below it", "missing-key")
        return
    for index, subset in enumerate(subsets):
        place = (*here, "subsets", index)
        found = _layered(layer, _read_keys(reader, subset, place, KOHYA_SUBSET, KOHYA))
        _add_entry(reader, place, found, entries, {"caption_dropout": 0.0, "caption_ext": ".caption"})


def _read_keys(reader: _Reader, section: dict[str, Any], here: KeyPath, rules: dict[str, Rule], kind: str) -> Layer:
    """Return the known keys of a section; refuse the others, those of a wrong type, and those that have no equal."""
    values: dict[str, Any] = {}
    origins: dict[str, KeyPath] = {}
    for key, value in section.items():
        path, rule = (*here, key), rules.get(key)
        if rule is None:
            known = f"{here[0]} of {kind} has {', '.join(sorted(rules))}"
            reader.refuse(path, "is no key of this section", f"leave it out; {known}", "unknown-key")
        elif not isinstance(value, rule.kind) or (isinstance(value, bool) and rule.kind in (int, NUMBER)):
            kinds = rule.kind if isinstance(rule.kind, tuple) else (rule.kind,)
            wanted = " or ".join(dict.fromkeys(_TYPES[one] for one in kinds))
            reader.refuse(path, f"is {value!r}", f"give {wanted}")
        elif any(isinstance(one, int) and abs(one) > LARGEST for one in _as_list(value)):
            reader.refuse(path, "is a number that no setting can have", "write a smaller one")
        elif rule.setting or (not rule.why):
            values[key], origins[key] = value, path
        elif value in rule.neutral:
            continue
        elif rule.hint:
            reader.refuse(path, f"{rule.why}, which is not done here", rule.hint, "unsupported")
        else:
            reader.notes[f"{key} {rule.why}"] = None
    return values, origins


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_TYPES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def _add_entry(reader: _Reader, here: KeyPath, layer: Layer, entries: list[Any], defaults: dict[str, Any]) -> None:
    """Add the entry of `data` that the keys of a folder, and those around it, become."""
    values, origins = layer
    number = len(entries)
    rules = KOHYA_DATASET | KOHYA_SUBSET | MUSUBI_KEYS
    entry: dict[str, Any] = dict(defaults)
    reader.origins["data", number] = here
    for key, value in values.items():
        setting = rules[key].setting
        if setting:
            entry[setting] = rules[key].convert(value)
            reader.origins["data", number, setting] = origins[key]
    if "folder" not in entry and "metadata" not in entry:
        names = "image_dir" if here[-2] == "subsets" else "image_directory or image_jsonl_file"
        reader.refuse(here, "names no images", f"give {names}", "missing-key")
        entry["folder"] = "missing"
    if "metadata" in entry:
        entry.pop("caption_ext", None)
        reader.notes["paths in image_jsonl_file are relative to that file here, and to the working folder there"] = None
    if entry.get("keep_tags") and not (entry.get("shuffle_tags") or entry.get("tag_dropout")):
        entry.pop("keep_tags")
        reader.notes["keep_tokens keeps nothing without shuffle_caption or caption_tag_dropout_rate"] = None
    if entry.get("regularization"):
        reader.notes[
            "is_reg: train.regularization_share says how often these images are seen, 0.5 unless you set it"
        ] = None
    if entry.get("flip"):
        reader.notes["flip_aug trains each image mirrored as well, rather than in half of the draws"] = None
    entry["resolution"] = _resolution(reader, values.get("resolution"), origins.get("resolution", here))
    reader.origins["data", number, "resolution"] = origins.get("resolution", here)
    if not values.get("enable_bucket", False):
        reader.notes["enable_bucket is off there: here images keep their own aspect, within the area of resolution"] = (
            None
        )
    if not values.get("bucket_no_upscale", False):
        reader.notes["bucket_no_upscale is off there: here images are never upscaled"] = None
    entries.append(entry)


def _resolution(reader: _Reader, value: Any, path: KeyPath) -> list[int]:
    """Return the side of the square with the area of a resolution, a multiple of 16."""
    sides = value if isinstance(value, list) else [value, value]
    if value is None:
        reader.refuse(path, "has no resolution", "write resolution = 1024 in it or in [general]", "missing-key")
        return [1024]
    is_pair = len(sides) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides
    )
    if not is_pair:
        reader.refuse(path, f"is {value!r}", "give a side, or [width, height]")
        return [1024]
    side = max(16 * round(math.sqrt(sides[0] * sides[1]) / 16), 16)
    if [side, side] != sides:
        reader.notes[f"resolution {value} became {side}: the side of the square of the same area, a multiple of 16"] = (
            None
        )
    return [side]


def _key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line of each table and key; tables are numbered as `tomllib` lists them."""
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            table = ()
            parts = [part.strip().strip('"') for part in header[2].split(".")]
            for depth, part in enumerate(parts):
                table = (*table, part)
                if header[1] == "[[" and depth == len(parts) - 1:
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:
                    table = (*table, counts[table])
            lines[table] = number
        elif key:
            lines.setdefault((*table, key[1].strip('"')), number)
    return lines


def _syntax_problem(path: Path, text: str, message: str) -> Problem:
    """Return the problem of a text that is not TOML, at its line."""
    match = _AT_LINE.search(message)
    line = int(match[1]) if match and match[1] else len(text.splitlines())
    what = _AT_LINE.sub("", message)
    if "overwrite" in what:
        return Problem(
            Location(str(path), line), "sets a key that is set above already", "remove one of the two", "duplicate-key"
        )
    hint = "check quotes, brackets and backslashes of this line, or of the line before"
    return Problem(Location(str(path), line), f"is not valid TOML: {what[:1].lower()}{what[1:]}", hint, "not-toml")


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
