"""The previews of a job: prompts with their flags, sizes and seeds, and the steps and guidance that they share."""

import re
from typing import Any

from zimage_train.compat.aitoolkit.job import AIToolkitJob
from zimage_train.compat.aitoolkit.keys import FLAGS, FLAGS_LEFT_OUT, PREVIEW_STRENGTH
from zimage_train.config.triggers import insert_trigger

Values = dict[str, Any]

_TEXT_FLAGS = ("n", "n2", "p2", "ctrl_img", "ev", "extra_values")
_NUMBER_FLAGS = [name for name in (*FLAGS, *FLAGS_LEFT_OUT) if name not in _TEXT_FLAGS]
_FLAG = re.compile(
    rf"(?:^|\s)--(?:(?P<number>{'|'.join(_NUMBER_FLAGS)})\s+(?P<value>-?(?:\d+\.?\d*|\.\d+))(?=\s|$)"
    rf"|(?P<text>{'|'.join(_TEXT_FLAGS)})(?=\s|$))"
)
TURBO_STEPS, MISCOUNTED_STEPS = 8, 9


def sample_section(job: AIToolkitJob, variant: str) -> Values:
    sample, train = job.values["sample"], job.values["train"]
    given = "prompts" if sample["samples"] is None else "samples"
    items = [_item(job, entry, f"sample.{given}.{index}") for index, entry in enumerate(_entries(job))]
    steps = _shared_value(job, items, "sample_steps", sample["sample_steps"])
    if variant == "turbo" and steps == MISCOUNTED_STEPS:
        job.note("sample.sample_steps", "9 becomes 8: older libraries counted a step that did nothing")
        steps = TURBO_STEPS
    cfg_scale = _shared_value(job, items, "guidance_scale", sample["guidance_scale"])
    seed = _seed(job, sample["seed"], "sample.seed")
    shared_seed = None if sample["walk_seed"] else seed
    return {
        "every": None if train["disable_sampling"] else sample["sample_every"],
        "first": not (train["skip_first_sample"] or train["disable_sampling"]),
        "prompts": [_prompt(job, item, shared_seed) for item in items],
        "negative": sample["neg"] or "",
        "width": _side(sample["width"]),
        "height": _side(sample["height"]),
        "steps": steps,
        "guidance": round(max(0.0, cfg_scale - 1), 6),
        "seed": 42 if seed is None else seed,
        "weights": "ema" if train["ema_config"]["use_ema"] else "raw",
    }


def _entries(job: AIToolkitJob) -> list[Values]:
    """Return the prompts of a job as entries of `sample.samples`, which wins over `sample.prompts`."""
    sample = job.values["sample"]
    if sample["samples"] is None:
        return [{"prompt": prompt} for prompt in sample["prompts"]]
    if sample["prompts"]:
        job.note("sample.prompts", "are left out: sample.samples wins, as in AI Toolkit")
    return sample["samples"]


def _item(job: AIToolkitJob, entry: Values, key: str) -> Values:
    """Return the keys of a prompt, by AI Toolkit's names, with those of its flags, which win, and its own name."""
    if entry["prompt"] is None:
        job.refuse(f"{key}.prompt", "is missing", "give the prompt", "missing-key")
    item = {name: value for name, value in entry.items() if value is not None}
    words, flags = split_flags(entry["prompt"] or "missing")
    for flag in flags.keys() & FLAGS_LEFT_OUT.keys():
        if FLAGS_LEFT_OUT[flag] == PREVIEW_STRENGTH and _number(flags[flag]) == 1:
            continue
        job.note(key, f"has the flag --{flag}, which is left out: {FLAGS_LEFT_OUT[flag]}")
    for flag in flags.keys() & FLAGS.keys():
        value = flags[flag]
        item[FLAGS[flag]] = value if flag in _TEXT_FLAGS else _number(value)
    trigger = job.values["trigger_word"]
    return item | {"prompt": insert_trigger(words, trigger) if trigger else words, "key": key}


def split_flags(prompt: str) -> tuple[str, dict[str, str]]:
    """Return the words and the flags of a prompt: `a cat`, {`w`: `512`} for `a cat --w 512`.

    Two hyphens that begin no flag are part of the words. AI Toolkit cuts the prompt off there.
    """
    matches = list(_FLAG.finditer(prompt))
    if not matches:
        return prompt.strip(), {}
    flags: dict[str, str] = {}
    words = prompt[: matches[0].start()]
    ends = [match.start() for match in matches[1:]] + [len(prompt)]
    for match, end in zip(matches, ends, strict=True):
        rest = prompt[match.end() : end].strip()
        if match["text"]:
            flags[match["text"]] = rest
        else:
            flags[match["number"]] = match["value"]
            words += f" {rest}" if rest else ""
    return words.strip(), flags


def _number(text: str) -> float:
    # A number of thousands of digits is none for `int`; as a float it is infinite, which is refused as such.
    return int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else float(text)


def _shared_value(job: AIToolkitJob, items: list[Values], name: str, default: Any) -> Any:
    """Return the value of a key if all prompts have the same, else `default`, with a note on each other value."""
    values = [item.get(name, default) for item in items] or [default]
    if all(value == values[0] for value in values):
        return values[0]
    same = (0, 1) if name == "guidance_scale" and default in (0, 1) else (default,)  # both mean no guidance
    for item in items:
        if item.get(name, default) not in same:
            job.note(item["key"], f"asks for {name} {item[name]:g}; all previews are drawn with {default:g}")
    return default


def _seed(job: AIToolkitJob, seed: int | None, key: str) -> int | None:
    """Return a seed, or None for -1, with which AI Toolkit draws a new seed each time."""
    if seed is not None and seed < 0:
        what = "is" if key == "sample.seed" else "asks for seed"
        job.note(key, f"{what} {seed}, a new seed each time there; previews keep theirs here, to be compared")
        return None
    return seed


def _prompt(job: AIToolkitJob, item: Values, shared_seed: int | None) -> Values:
    seed = _seed(job, item.get("seed"), item["key"])
    values = {
        "prompt": item["prompt"],
        "negative": (item["neg"] or "") if "neg" in item else None,
        "seed": shared_seed if seed is None else seed,
        "width": _side(item["width"]) if "width" in item else None,
        "height": _side(item["height"]) if "height" in item else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _side(pixels: float) -> int:
    """Return a side rounded down to a multiple of 16, at least 64, as AI Toolkit does."""
    return max(64, int(pixels) // 16 * 16)
