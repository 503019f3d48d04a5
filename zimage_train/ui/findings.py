"""What there is to say of a run, with remedies: verdicts on its previews, and warnings of its config and process."""

import re
from dataclasses import dataclass

from zimage_train.planning.config_warnings import ConfigWarning
from zimage_train.planning.suggestions import SettingChange
from zimage_train.planning.verdicts import VerdictKind, run_verdicts
from zimage_train.training.run_dir import RunDir, read_facts
from zimage_train.ui import run_state
from zimage_train.ui.run_state import RunState


@dataclass(frozen=True)
class Finding:
    """A problem of a run, and its remedies."""

    text: str
    kind: VerdictKind | None = None
    """Of a verdict; None for a warning."""
    changes: tuple[SettingChange, ...] = ()
    """Settings of a new run, each of which alone is a remedy."""
    good_step: int | None = None
    """The newest step of a kept LoRA, up to the last one without the problem."""


def findings_of(state: RunState) -> list[Finding]:
    """Return the verdicts on a run, then its warnings."""
    config = run_state.config_of(state.folder)
    found: list[Finding] = []
    offered: set[SettingChange] = set()
    for verdict in run_verdicts(config, run_state.events_of(state.folder)) if config else []:
        changes = tuple(change for change in verdict.changes if change not in offered)
        offered |= set(changes)
        found.append(Finding(verdict.text, verdict.kind, changes, _kept_step(state, verdict.good_step)))
    warnings = _config_warnings(state)
    found += [Finding(warning.text, changes=warning.changes) for warning in warnings]
    # The process repeats those of its config.
    said = {warning.text for warning in warnings}
    return [*found, *(Finding(text) for text in state.output.warnings if text not in said)]


def _kept_step(state: RunState, good_step: int | None) -> int | None:
    """Return the newest step up to `good_step` whose LoRA the run has kept."""
    if good_step is None:
        return None
    pattern = re.compile(rf"{re.escape(state.name)}-(\d{{6,}})\.safetensors")
    steps: list[int] = []
    for path in (state.folder / "lora").glob("*.safetensors"):
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) <= good_step:
            steps.append(int(match[1]))
    return max(steps, default=None)


def _config_warnings(state: RunState) -> list[ConfigWarning]:
    warnings = read_facts(RunDir(state.folder, state.name)).get("warnings", [])
    return [ConfigWarning.from_json(values) for values in warnings]
