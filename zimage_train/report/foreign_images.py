"""How an image of another program was drawn, from its metadata: the text of A1111 and Forge, or ComfyUI's graph.

The metadata of an image may hold anything, so every value is checked, and one that cannot be read is named.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_train.dataset.sources import is_text
from zimage_train.errors import DataError, Problem
from zimage_train.io.json_text import parse_json
from zimage_train.report import comfyui_graph, preview_images
from zimage_train.report.comfyui_graph import UnreadableError

MAX_CHARACTERS = 2_000_000
"""Characters of a text chunk; longer text is not read."""
MAX_NAME = 120
"""Characters of a name of a model or LoRA in a line of output."""

_SETTING = re.compile(r'\s*([^:,"]{1,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_LORA_TAG = re.compile(r"<(?:lora|lyco):([^:<>]+)(?::([^<>]*))?>")
_NEGATIVE = "Negative prompt:"
_WEIGHTED_WORDS = re.compile(r"\([^()]+:\d+(?:\.\d+)?\)")


@dataclass
class ForeignRecipe:
    """What the metadata of an image says of how it was drawn."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of a sampling request."""
    unread: dict[str, str] = field(default_factory=dict)
    """Field that cannot be read -> why."""
    notes: list[str] = field(default_factory=list)
    """What the image had that is not drawn here."""
    drawn_by: str = ""
    """Model and LoRAs, as the metadata names them."""


def read_recipe(path: Path, texts: dict[str, str]) -> ForeignRecipe:
    """Return how the image at `path` was drawn, from its text chunks.

    Raises:
        DataError: the image does not say, or its prompt cannot be read.
    """
    too_long = [key for key, text in texts.items() if len(text) > MAX_CHARACTERS]
    texts = {key: text for key, text in texts.items() if key not in too_long}
    if "parameters" in texts:
        recipe = _from_parameters(texts["parameters"])
    elif "prompt" in texts:
        recipe = _from_graph(texts["prompt"])
    else:
        raise DataError(Problem(str(path), _absence(path, texts, too_long), _HINT, "not-a-preview"))
    for name in ("prompt", "negative"):
        if not is_text(recipe.fields.get(name, "")):
            del recipe.fields[name]
            recipe.unread[name] = "holds a character that no text has"
    if "prompt" not in recipe.fields:
        what = f"its prompt cannot be read: {recipe.unread.get('prompt', 'it has none')}"
        raise DataError(
            Problem(str(path), what, "give the prompt by --prompt, and its settings as options", "no-prompt")
        )
    if _WEIGHTED_WORDS.search(recipe.fields["prompt"]):
        recipe.notes.append("its prompt has weights such as (word:1.2), which are words here")
    return recipe


_HINT = "give a PNG of train or sample, or one of A1111, Forge or ComfyUI with its metadata; or give --prompt"


def _absence(path: Path, texts: dict[str, str], too_long: list[str]) -> str:
    if not texts and not too_long and (wrong := preview_images.what_is_wrong_with(path)):
        return wrong
    if too_long:
        return f"has over {MAX_CHARACTERS} characters in {too_long[0][:40]!r}"
    if "workflow" in texts:
        return "has ComfyUI's canvas (workflow) and not the graph that was run (prompt)"
    names = ", ".join(repr(key[:40]) for key in list(texts)[:5])
    return f"has no sampling settings that are read here, but {names}" if names else "has no sampling settings"


def guidance_of_cfg(cfg_scale: float) -> float:
    """Return the guidance g of a CFG scale, which is g + 1; 0 if that is negative."""
    return round(max(0.0, cfg_scale - 1.0), 6)


def _from_parameters(text: str) -> ForeignRecipe:
    """Return the recipe in the text that A1111 and Forge write: prompt, negative prompt, a line of settings."""
    recipe = ForeignRecipe()
    if _is_json(text):
        recipe.unread["prompt"] = "its parameters are JSON, as SwarmUI and Fooocus write them"
        return recipe
    lines = text.strip().split("\n")
    number = next((index for index in range(len(lines) - 1, -1, -1) if lines[index].startswith("Steps:")), len(lines))
    settings: dict[str, str] = {}
    for match in _SETTING.finditer(" ".join(lines[number:])):
        # The first counts: what follows may be of other images and models, such as a list of resources.
        settings.setdefault(match[1].strip(), match[2].strip())
    words = "\n".join(lines[:number])
    start = 0 if words.startswith(_NEGATIVE) else words.find("\n" + _NEGATIVE)
    prompt, negative = (words, "") if start < 0 else (words[:start], words[start:].strip().removeprefix(_NEGATIVE))
    loras = [f"{plain(match[1])}={plain(match[2] or '1')}" for match in _LORA_TAG.finditer(prompt)]
    recipe.fields["prompt"] = " ".join(_LORA_TAG.sub("", prompt).split(" ")).strip()
    recipe.fields["negative"] = negative.strip()
    if not recipe.fields["prompt"]:
        del recipe.fields["prompt"]
    _read_setting(recipe, "steps", settings, "Steps", int)
    _read_setting(recipe, "seed", settings, "Seed", int)
    if "guidance g" in settings:  # the text of this program's own images
        _read_setting(recipe, "guidance", settings, "guidance g", lambda value: float(value.split()[0]))
    else:
        _read_setting(recipe, "guidance", settings, "CFG scale", lambda value: guidance_of_cfg(_finite(value)))
    if "Shift" in settings:
        _read_setting(recipe, "shift", settings, "Shift", _finite)
    _read_setting(recipe, "size", settings, "Size", _sides)
    recipe.fields |= dict(zip(("width", "height"), recipe.fields.pop("size", ()), strict=False))
    _note_sampler(recipe, settings.get("Sampler"), settings.get("Schedule type"))
    for key in ("Denoising strength", "Hires upscale"):
        if key in settings:
            made = f"it has {key} {plain(settings[key])}, so it was made from another image"
            recipe.notes.append(f"{made}, and is drawn from noise here")
    recipe.drawn_by = _drawn_by(settings.get("Model"), loras)
    return recipe


def _read_setting(recipe: ForeignRecipe, name: str, settings: dict[str, str], key: str, read: Any) -> None:
    """Add the setting `key` to the recipe's fields as `name`, or to what cannot be read."""
    try:
        recipe.fields[name] = read(settings[key])
    except KeyError:
        recipe.unread[name] = f"there is no {key}"
    except (ValueError, IndexError):
        recipe.unread[name] = f"{key} is {plain(settings[key])!r}"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _sides(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _from_graph(text: str) -> ForeignRecipe:
    """Return the recipe in the graph that ComfyUI ran."""
    recipe = ForeignRecipe()
    try:
        sampling = comfyui_graph.read_sampling(text)
    except UnreadableError as error:
        recipe.unread["prompt"] = str(error)
        return recipe
    recipe.fields, recipe.unread, recipe.notes = sampling.fields, sampling.unread, sampling.notes
    if "cfg" in recipe.fields:
        recipe.fields["guidance"] = guidance_of_cfg(recipe.fields.pop("cfg"))
    elif "cfg" in recipe.unread:
        recipe.unread["guidance"] = recipe.unread.pop("cfg")
    _note_sampler(recipe, sampling.sampler, sampling.scheduler)
    loras = [f"{plain(name)}={strength}" for name, strength in sampling.loras]
    recipe.drawn_by = _drawn_by(sampling.model, loras)
    return recipe


def _note_sampler(recipe: ForeignRecipe, sampler: str | None, schedule: str | None) -> None:
    if sampler is not None and sampler.lower() != "euler":
        recipe.notes.append(f"it was drawn with the sampler {plain(sampler)}, and is drawn with Euler here")
    if schedule is not None and schedule.lower() not in ("simple", "automatic"):
        what = f"it was drawn with the noise levels {plain(schedule)}"
        recipe.notes.append(f"{what}, and is drawn with those of the pipeline here (simple)")


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _drawn_by(model: str | None, loras: list[str]) -> str:
    if model is None and not loras:
        return ""
    name = "a model that is not named" if model is None else plain(model)
    return f"{name} with {' and '.join(loras) or 'no LoRA'}"


def plain(text: str) -> str:
    """Return `text` as a part of a line of output: printable, and not long."""
    shown = "".join(char if char.isprintable() else " " for char in text.strip().strip('"'))
    return shown if len(shown) <= MAX_NAME else f"{shown[:MAX_NAME]}..."
