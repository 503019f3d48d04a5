"""Verdicts on a run from what its previews measured: not learning, leaking or drifted, and what to do (torch-free)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.planning.config_warnings import HIGH_LR
from zimage_train.planning.suggestions import SettingChange

NOT_LEARNING_BELOW = 0.02
"""Shift with the trigger below which images look as before training."""
LEAK_RATIO = 0.75
"""Shift without the trigger, relative to that with it, from which the concept leaks into other images."""
NOTICEABLE_SHIFT = 0.05
"""Shift without the trigger below which nothing counts as a leak."""
LATE_SHARE = 0.25
"""Fraction of the run before which previews say nothing about learning and leaking."""
KEPT_BELOW, LOST_FROM = 0.38, 0.45
"""Drift below which Turbo keeps its 8 steps, and from which they are partly lost, on the miniature (docs/lab.md)."""
MIN_RANK = 4
LR_FACTOR = 1.5

VerdictKind = Literal["not_learning", "leaking", "drifted"]


@dataclass(frozen=True)
class Verdict:
    """A problem of the LoRA at a step."""

    kind: VerdictKind
    step: int
    text: str
    changes: tuple[SettingChange, ...]
    """Settings of a new run, each of which alone is a remedy."""
    good_step: int | None
    """The last earlier step of which there was nothing to say, for those who have its LoRA."""

    def __str__(self) -> str:
        return self.text


def run_verdicts(config: Config, events: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Return the verdicts on the newest previews of a run, from the records of its events.jsonl."""
    previews = [event for event in events if event.get("event") == "preview" and event["step"] > 0]
    if not previews or config.method.generates_data:  # methods that should leave images as they are
        return []
    newest = previews[-1]
    earlier = [event for event in previews[:-1] if event["step"] >= LATE_SHARE * config.train.steps]
    good_steps = [event["step"] for event in earlier if not _found(config, event) and _has_learned(event)]
    good_step = max(good_steps, default=None)
    return [
        Verdict(kind, newest["step"], text, _changes(config, kind, good_step), good_step)
        for kind, text in _found(config, newest)
    ]


def _has_learned(event: Mapping[str, Any]) -> bool:
    return (event.get("change_with_trigger") or 0.0) >= NOT_LEARNING_BELOW


def _found(config: Config, event: Mapping[str, Any]) -> list[tuple[VerdictKind, str]]:
    """Return the kinds of problems that the previews of an event show, each with the text for it."""
    step, drift = event["step"], event.get("drift")
    shift, without = event.get("change_with_trigger"), event.get("change_without_trigger")
    found: list[tuple[VerdictKind, str]] = []
    if shift is not None and step >= LATE_SHARE * config.train.steps:
        if shift < NOT_LEARNING_BELOW:
            text = (
                f"not learning: at step {step} previews with the trigger differ by {shift:.3f} from those before "
                "training; check captions and trigger, or raise optimizer.lr"
            )
            found.append(("not_learning", text))
        elif without is not None and without >= max(NOTICEABLE_SHIFT, LEAK_RATIO * shift):
            text = (
                f"leaking: at step {step} previews without the trigger changed by {without:.3f}, with it by "
                f"{shift:.3f}; describe in captions what is not the concept (`zimage-train caption`), use fewer "
                "steps, or a lower rank"
            )
            found.append(("leaking", text))
    if drift is not None and drift >= LOST_FROM:
        text = (
            f"drifted: at step {step} the LoRA deviates by {drift:.2f} from Turbo's own steps, of which "
            f"{LOST_FROM:g} and more means blurred images in 8 steps (on the miniature); use the LoRA of an earlier "
            "step, a lower optimizer.lr, or DistillPatch (docs/methods.md)"
        )
        found.append(("drifted", text))
    return found


def _changes(config: Config, kind: VerdictKind, good_step: int | None) -> tuple[SettingChange, ...]:
    lr, rank = config.optimizer.lr, config.lora.rank
    changes: list[SettingChange] = []
    if kind == "not_learning":
        is_risky = config.model.variant == "turbo" and LR_FACTOR * lr >= HIGH_LR
        if is_risky or OPTIMIZERS[config.optimizer.name].finds_lr:
            changes.append(SettingChange("train.steps", 2 * config.train.steps))
        else:
            changes.append(SettingChange("optimizer.lr", LR_FACTOR * lr))
        return tuple(changes)
    if good_step is not None:
        changes.append(SettingChange("train.steps", good_step))
    if kind == "leaking" and rank is not None and rank > MIN_RANK:
        changes.append(SettingChange("lora.rank", max(rank // 2, MIN_RANK)))
    if kind == "drifted":
        is_bare = config.model.variant == "turbo" and config.model.adapter is None
        changes.append(SettingChange("model.adapter", "v2") if is_bare else SettingChange("optimizer.lr", lr / 2))
    return tuple(changes)
