"""peft's description of a LoRA: the alphas that are not in tensors, read and written (torch-free).

peft keeps it in `adapter_config.json` beside `adapter_model.safetensors`; diffusers puts the same, with the prefix of
the part of the pipeline, into the header as `lora_adapter_metadata`. Modules that no pattern matches have the common
alpha and rank. With rsLoRA the scale is alpha / sqrt(rank), otherwise alpha / rank.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zimage_train.config.module_groups import UnboundedPatternError, compile_bounded
from zimage_train.errors import Problem, WeightsError
from zimage_train.io.json_text import parse_json
from zimage_train.io.safetensors_format import read_json
from zimage_train.models.locate import LORA_FOLDER_FILES

FOLDER_FILE, CONFIG_FILE = LORA_FOLDER_FILES[0], "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"
HEADER_PREFIX = "transformer."
LARGEST_ALPHA = 1e6
MAX_PATTERNS = 1000
"""Patterns of modules; Z-Image has fewer modules."""
DEFAULT_ALPHA = 8
"""What peft takes for the alpha of a config without one."""
TYPES_WITH_ALPHA = ("LORA", "LOHA", "LOKR")
INITS_OF_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How values of `init_lora_weights` begin with which peft changes the weights of the model, too."""
TODO = "save it with the alpha that it was trained with"


class ScaleSource(NamedTuple):
    """A place where the scales of a LoRA stand."""

    name: str
    """For messages."""
    scale_of: Callable[[Iterable[str], int], float]
    """Returns the scale of a module, given its names and the rank of its factors, which is 0 if they do not show it."""


def scale_sources(path: Path, metadata: Mapping[str, str]) -> list[ScaleSource]:
    """Return the descriptions of the LoRA at `path`: that beside it, if it is named as peft names it, and its header's.

    Raises:
        WeightsError: a description cannot be read, has an alpha that is no positive number, or is of a LoRA that began
            by a change of the model.
    """
    sources: list[ScaleSource] = []
    config_path = path.with_name(CONFIG_FILE)
    if path.name == FOLDER_FILE and config_path.exists():
        described = read_json(config_path)
        if _has_scale(described):
            sources.append(_source(config_path, CONFIG_FILE, described))
    try:
        found = parse_json(metadata.get(HEADER_KEY, ""))
        config = {key.removeprefix(HEADER_PREFIX): value for key, value in found.items()}
    except (ValueError, AttributeError):
        config = {}  # other programs may write something else under that key
    if _has_scale(config):
        sources.append(_source(path, "the header", config))
    return sources


def _has_scale(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes scales, if only by peft's default."""
    return bool(config.keys() & {"lora_alpha", "alpha", "r"}) or config.get("peft_type") in TYPES_WITH_ALPHA


def _alpha(config: Mapping[str, Any]) -> Any:
    return config.get("lora_alpha", config.get("alpha", DEFAULT_ALPHA))  # LoKr and LoHa have `alpha`


def _source(path: Path, name: str, config: Mapping[str, Any]) -> ScaleSource:
    """Return the scales that a config describes.

    Raises:
        WeightsError: an alpha or a rank is not a positive number, or the LoRA began by a change of the model.
    """
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(INITS_OF_BASE):
        what = f"began with {start[:20]}, which changed the weights of its model, so it is wrong on the original"
        hint = "convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft"
        raise WeightsError(Problem(str(path), what, hint, "other-base"))
    if _alpha(config) is None:
        raise _no_number(path, "alpha", None)
    alphas = _Patterns(path, "alpha", _alpha(config), config.get("alpha_pattern"))
    ranks = _Patterns(path, "rank", config.get("r"), config.get("rank_pattern"))
    is_rank_stabilised = bool(config.get("use_rslora"))

    def scale_of(names: Iterable[str], rank: int) -> float:
        names = list(names)
        alpha, described = alphas.find(names), ranks.find(names)
        if rank and described and rank != described:
            what = f"{name} says that {names[-1]} has rank {described:g}, and its factors have {rank}"
            raise WeightsError(Problem(str(path), what, "it belongs to another file", "conflicting-alpha"))
        rank = rank or int(described or 0)
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if is_rank_stabilised else rank)

    return ScaleSource(name, scale_of)


class _Patterns:
    """A number for each module: that of the first pattern that matches it, or else the common one."""

    def __init__(self, path: Path, what: str, common: Any, patterns: Any) -> None:
        self._common: float | None = common
        self._patterns: dict[str, float] = patterns if isinstance(patterns, dict) else {}
        wrong = [] if isinstance(patterns, dict | None) else [patterns]
        for value in (*([] if common is None else [common]), *self._patterns.values(), *wrong):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < LARGEST_ALPHA:
                raise _no_number(path, what, value)

        if len(self._patterns) > MAX_PATTERNS:
            finding = f"its metadata has {len(self._patterns)} patterns of modules"
            raise WeightsError(Problem(str(path), finding, TODO, "conflicting-alpha"))
        self._compiled = [(_compiled(path, pattern), float(value)) for pattern, value in self._patterns.items()]

    def find(self, names: list[str]) -> float | None:
        for pattern, value in self._compiled:
            if any(pattern.match(name) for name in names):
                return value
        return None if self._common is None else float(self._common)


def _no_number(path: Path, what: str, value: Any) -> WeightsError:
    finding = f"its metadata says that {what} is {str(value)[:20]}"
    return WeightsError(Problem(str(path), finding, TODO, "conflicting-alpha"))


def _compiled(path: Path, pattern: str) -> re.Pattern[str]:
    """Return a pattern that matches modules as peft's `get_pattern_key` does; an invalid one is a name.

    Raises:
        WeightsError: matching may take for ever.
    """
    try:
        return compile_bounded(pattern, r"(.*\.)?({})$")
    except UnboundedPatternError as error:
        finding = f"its metadata has the pattern {pattern[:40]!r}: {error}"
        raise WeightsError(Problem(str(path), finding, TODO, "conflicting-alpha")) from None
    except ValueError:
        return re.compile(rf"{re.escape(pattern)}\Z")


def make_config(ranks: Mapping[str, int], alphas: Mapping[str, float], is_dora: bool) -> dict[str, Any]:
    """Return a description of modules of these ranks and alphas; the most frequent become the common values."""
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": is_dora,
    }


def header_text(config: Mapping[str, Any]) -> str:
    """Return `config` as diffusers stores it in a header."""
    return json.dumps({HEADER_PREFIX + key: value for key, value in config.items()}, sort_keys=True)


def _most_frequent(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(sorted(set(found)), key=found.count)
