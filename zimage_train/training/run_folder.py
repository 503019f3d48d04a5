"""The folder of a run: what lies where, and whether a new start may continue what is there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train import files
from zimage_train.config import yaml_reader
from zimage_train.config.reading import dump_config, flatten, resolved
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Problem

MAY_CHANGE = ("train.steps", "output", "cache.", "save.", "sample.", "validation.", "memory.", "log.")
"""Settings that a resumed run may change: none of them alters a weight that was trained."""
BY_DIGEST = ("model.path", "model.extras", "model.adapter", "data.*.folder", "data.*.metadata")
"""Settings that are paths: what they lead to is compared instead."""


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    root: Path
    name: str

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def facts(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def lora(self, step: int | None = None) -> Path:
        """The exported LoRA of a step; None: the finished one."""
        return (
            self.root / "lora" / (f"{self.name}.safetensors" if step is None else f"{self.name}-{step:06d}.safetensors")
        )


def of(config: Config) -> RunFolder:
    """The run folder of a config: output/name."""
    return RunFolder(Path(config.output) / config.name, config.name)


def read_facts(folder: RunFolder) -> dict[str, Any]:
    """run.json, or nothing if there is none that can be read."""
    try:
        facts = json.loads(folder.facts.read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_facts(folder: RunFolder, facts: Mapping[str, Any]) -> None:
    files.write_json(folder.facts, facts)


def write_config(folder: RunFolder, config: Config) -> None:
    """Write the effective config, with absolute paths: any command takes it, wherever it runs."""
    files.write_text(folder.config, dump_config(resolved(config)))


def require_same(folder: RunFolder, config: Config, fingerprint: Mapping[str, Any]) -> None:
    """Refuse to continue a run with settings or inputs that would make it another run.

    Raises:
        ConfigError: shows every difference as `- was`, `+ is`.
    """
    problems = [*_changed_settings(folder, config), *_changed_inputs(folder, fingerprint)]
    if problems:
        raise ConfigError(*problems, Problem(str(folder.root), "belongs to another run", TODO))


TODO = "undo the change, choose another name, or begin again with --fresh (which moves the old run aside)"


def _changed_settings(folder: RunFolder, config: Config) -> list[Problem]:
    try:
        before = yaml_reader.parse(folder.config.read_text(encoding="utf-8")).value
    except (OSError, ValueError, yaml_reader.YamlProblem):
        return []
    old, new = flatten(before), flatten(config.model_dump())
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _is_free(key)]
    return [Problem(key, f"- {_shown(old, key)}  + {_shown(new, key)}") for key in changed]


def _changed_inputs(folder: RunFolder, fingerprint: Mapping[str, Any]) -> list[Problem]:
    before = read_facts(folder).get("fingerprint")
    if not isinstance(before, dict):
        return []
    old, new = flatten(before), flatten(dict(fingerprint))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    words = {(True, True): "changed", (True, False): "is gone", (False, True): "is new"}
    return [Problem(key, words[key in old, key in new]) for key in changed]


def _is_free(key: str) -> bool:
    parts = ["*" if part.isdigit() else part for part in key.split(".")]
    return ".".join(parts) in BY_DIGEST or key.startswith(MAY_CHANGE)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return yaml_reader.dump(values[key]).removesuffix("...\n").strip() if key in values else "(absent)"
