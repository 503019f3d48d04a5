"""The previews of a job: prompts with their flags, sizes, seeds, and steps and guidance that all of them share."""

import re
from typing import Any

from zimage_train.compat.aitoolkit.job import AIToolkitJob
from zimage_train.compat.aitoolkit.keys import FLAGS, FLAGS_LEFT_OUT, PREVIEW_STRENGTH

Values = dict[str, Any]

_TEXT_FLAGS = ("n", "n2", "p2", "ctrl_img", "ev", "extra_values")
_NUMBER_FLAGS = [name for name in (*FLAGS, *FLAGS_LEFT_OUT) if name not in _TEXT_FLAGS]
_FLAG = re.compile(
    rf"(?:^|\s)--(?:(?P<number>{'|'.join(_NUMBER_FLAGS)})\s+(?P<value>-?(?:\d+\.?\d*|\.\d+))(?=\s|$)"
    rf"|(?P<text>{'|'.join(_TEXT_FLAGS)})(?=\s|$))"
)
TURBO_STEPS, MISCOUNTED_STEPS = 8, 9


def sample(job: AIToolkitJob, variant: str) -> Values:
    there, train = job.values["sample"], job.values["train"]
    items = [_item(job, one, f"sample.samples.{number}") for number, one in enumerate(_samples(job))]
    steps = _shared(job, items, "sample_steps", there["sample_steps"])
    if variant == "turbo" and steps == MISCOUNTED_STEPS:
        job.note("sample.sample_steps", "9 becomes 8: older libraries counted a step that did nothing")
        steps = TURBO_STEPS
    scale = _shared(job, items, "guidance_scale", there["guidance_scale"])
    seed = _seed(job, there["seed"], "sample.seed")
    own_seed = None if there["walk_seed"] else seed
    return {
        "every": None if train["disable_sampling"] else there["sample_every"],
        "first": not (train["skip_first_sample"] or train["disable_sampling"]),
        "prompts": [_prompt(job, item, own_seed) for item in items],
        "negative": there["neg"] or "",
        "width": _side(there["width"]),
        "height": _side(there["height"]),
        "steps": steps,
        "guidance": round(max(0.0, scale - 1), 6),
        "seed": 42 if seed is None else seed,
        "weights": "ema" if train["ema_config"]["use_ema"] else "raw",
    }


def _samples(job: AIToolkitJob) -> list[Values]:
    there = job.values["sample"]
    if there["samples"] is None:
        return [{"prompt": prompt} for prompt in there["prompts"]]
    if there["prompts"]:
        job.note("sample.prompts", "are left out: sample.samples wins, as in AI Toolkit")
    return there["samples"]


def _item(job: AIToolkitJob, there: Values, key: str) -> Values:
    """The keys of one prompt, by AI Toolkit's names; its flags win over them."""
    if there["prompt"] is None:
        job.refuse(f"{key}.prompt", "is missing", "give the prompt")
    given = {name: value for name, value in there.items() if value is not None}
    words, flags = split_flags(there["prompt"] or "missing")
    for flag in flags.keys() & FLAGS_LEFT_OUT.keys():
        if FLAGS_LEFT_OUT[flag] == PREVIEW_STRENGTH and _number(flags[flag]) == 1:
            continue
        job.note(key, f"has the flag --{flag}, which is left out: {FLAGS_LEFT_OUT[flag]}")
    for flag in flags.keys() & FLAGS.keys():
        value = flags[flag]
        given[FLAGS[flag]] = value if flag in _TEXT_FLAGS else _number(value)
    trigger = job.values["trigger_word"]
    return given | {"prompt": words.replace("[trigger]", trigger) if trigger else words, "key": key}


def split_flags(prompt: str) -> tuple[str, dict[str, str]]:
    """The words of a prompt, and its flags: `a cat --w 512` -> (`a cat`, {`w`: `512`}).

    Two hyphens that begin no flag are part of the words, which AI Toolkit cuts off.
    """
    found = list(_FLAG.finditer(prompt))
    flags: dict[str, str] = {}
    words = prompt[: found[0].start()] if found else prompt
    ends = [match.start() for match in found[1:]] + [len(prompt)]
    for match, end in zip(found, ends, strict=bool(found)):
        rest = prompt[match.end() : end].strip()
        if match["text"]:
            flags[match["text"]] = rest
        else:
            flags[match["number"]] = match["value"]
            words += f" {rest}" if rest else ""
    return words.strip(), flags


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def _shared(job: AIToolkitJob, items: list[Values], name: str, otherwise: Any) -> Any:
    """What all prompts agree on; if they do not, what holds for the section, and a note."""
    values = [item.get(name, otherwise) for item in items] or [otherwise]
    if all(value == values[0] for value in values):
        return values[0]
    for item in items:
        if item.get(name, otherwise) != otherwise:
            what = f"asks for {name} {item[name]:g}; all previews are drawn with {otherwise:g}"
            job.note(item["key"], what)
    return otherwise


def _seed(job: AIToolkitJob, seed: int | None, key: str) -> int | None:
    """A seed; None for -1, which is another one each time there."""
    if seed is not None and seed < 0:
        job.note(key, f"is {seed}, a new seed each time there; previews keep theirs here, to be compared")
        return None
    return seed


def _prompt(job: AIToolkitJob, item: Values, shared_seed: int | None) -> Values:
    seed = _seed(job, item.get("seed"), item["key"])
    found = {
        "prompt": item["prompt"],
        "negative": (item["neg"] or "") if "neg" in item else None,
        "seed": shared_seed if seed is None else seed,
        "width": _side(item["width"]) if "width" in item else None,
        "height": _side(item["height"]) if "height" in item else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _side(pixels: float) -> int:
    """Rounded down to a multiple of 16, at least 64, as there."""
    return max(64, int(pixels) // 16 * 16)
