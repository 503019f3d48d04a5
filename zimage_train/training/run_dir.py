"""The folder of a run: the paths of its files, and whether a new start may continue the run in it."""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from zimage_train.config.dataset import DataEntry
from zimage_train.config.key_names import is_setting
from zimage_train.config.load import dump_config, flatten_keys, resolve_paths
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Location, Problem, WeightsError
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json
from zimage_train.optim import schedules
from zimage_train.report import metrics

CHANGEABLE_ON_RESUME = (
    "train.steps",
    "train.epochs",
    "output_dir",
    "cache.",
    "save.",
    "sample.",
    "validation.",
    "memory.",
    "log.",
)
"""Settings that a resumed run may change, since none of them alters the trained weights; see also `run_identity`."""
ALLOWABLE = ("optimizer.lr", "schedule", "train.max_grad_norm", "timesteps", "loss", "guidance", "data", "path")
"""Settings and sections that may change on resume if `--allow` names them: each step reads them anew. `path` is no
setting: it is what computes the blocks, see `device_plan.BlockPath`."""
MICRO_BATCHES = "micro-batches of a step (train.grad_accumulation times processes)"
"""Key of an identity that stands for `train.grad_accumulation`, so that one process may take over from two."""
BY_DIGEST = (
    *("model.path", "model.extras", "model.text_encoder", "model.tokenizer", "model.vae", "model.adapter"),
    *("lora.init_from", "train.beside.*.file"),
    *("data.*.folder", "data.*.metadata", "data.*.prompts", "data.*.mask"),
)
"""Settings that are paths; on resume the content of the files is compared instead."""


@dataclass(frozen=True)
class RunDir:
    """The paths of a run."""

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
    def wandb_id(self) -> Path:
        return self.root / "wandb" / "id"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def rehearsal(self) -> Path:
        """The file that the dry run writes and removes again."""
        return self.root / "rehearsal.safetensors"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def request(self, name: str) -> Path:
        """Return the file that asks the run to do what `name` says; see `requests`."""
        return self.root / f"{name}.now"

    def lora(self, step: int | None = None, is_ema: bool = False) -> Path:
        """Return the path of the LoRA exported after `step`, or of the final export for None."""
        folder = self.root / "lora"
        if is_ema:
            folder /= "ema"
        name = self.name if step is None else f"{self.name}-{step:06d}"
        return folder / f"{name}.safetensors"


def run_dir_of(config: Config) -> RunDir:
    """Return the run folder of a config, output_dir/name."""
    return RunDir(Path(config.output_dir) / config.name, config.name)


def read_facts(folder: RunDir) -> dict[str, Any]:
    """Return the content of run.json without entries that are damaged, or an empty dict if it is missing."""
    try:
        facts = parse_json(folder.facts.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return {key: value for key, value in facts.items() if _is_sound(key, value)}


class _LoraFacts(BaseModel):
    matched: str
    groups: dict[str, int]
    ranks: dict[str, int] | None = None
    lr_factors: dict[str, int] | None = None


class _Warning(BaseModel):
    text: str
    changes: dict[str, Any]


class _QuantizedFacts(BaseModel):
    weight_error: FiniteFloat
    adapter_arrived: FiniteFloat = 1.0


_FACT_TYPES: dict[str, TypeAdapter[Any]] = {
    "versions": TypeAdapter(dict[str, str]),
    "device": TypeAdapter(str),
    "processes": TypeAdapter(int),
    "lora": TypeAdapter(_LoraFacts),
    "adapter": TypeAdapter(dict[str, Any] | None),
    "beside": TypeAdapter(list[dict[str, Any]]),
    "quantized": TypeAdapter(_QuantizedFacts | None),
    "dataset": TypeAdapter(dict[str, FiniteFloat]),
    "plan": TypeAdapter(dict[str, Any]),
    "rehearsal": TypeAdapter(dict[str, FiniteFloat | None]),
    "starts": TypeAdapter(list[int]),
    "seconds": TypeAdapter(dict[str, FiniteFloat]),
    "warnings": TypeAdapter(list[_Warning]),
}
"""Entries of run.json that are read again, with the form that they have."""


def _is_sound(key: str, value: object) -> bool:
    """Return whether an entry of run.json has the form that this version gives it, or is none that is read."""
    if key in _FACT_TYPES:
        try:
            _FACT_TYPES[key].validate_python(value, strict=True)
        except ValidationError:
            return False
    return True


def earlier_starts(folder: RunDir) -> list[int]:
    """Return the step that each earlier start of the run continued from, 0 for the first start, from run.json."""
    return read_facts(folder).get("starts", [])


def wandb_id(folder: RunDir) -> str:
    """Return the run's id on Weights & Biases, which is made at its first start and kept in its folder."""
    try:
        run_id = folder.wandb_id.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        run_id = ""
    if not re.fullmatch("[0-9a-f]{8}", run_id):
        run_id = secrets.token_hex(4)
        atomic.write_text(folder.wandb_id, run_id + "\n")
    return run_id


def write_facts(folder: RunDir, facts: Mapping[str, Any]) -> None:
    atomic.write_json(folder.facts, facts)


def add_facts(folder: RunDir, facts: Mapping[str, Any]) -> None:
    """Add `facts` to run.json."""
    write_facts(folder, {**read_facts(folder), **facts})


def write_config(folder: RunDir, config: Config) -> None:
    """Write the effective config with absolute paths, so that it means the same in any working directory."""
    atomic.write_text(folder.config, dump_config(resolve_paths(config)))


def run_identity(config: Config, fingerprint: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Return the settings that shape the trained weights, and the digests of the inputs.

    Every checkpoint holds it, so the comparison on resume depends on no other file.
    """
    settings = flatten_keys(config.model_dump(mode="json"))
    settings[MICRO_BATCHES] = settings.pop("train.grad_accumulation") * processes
    if schedules.depends_on_total_steps(config.schedule):
        # `train.steps` may change on resume, but not if the learning rate of earlier steps would have been another.
        settings["schedule.steps (train.steps, over which it decays)"] = config.train.steps
    return {
        "settings": {key: value for key, value in settings.items() if not _is_free(key)},
        "inputs": flatten_keys(dict(fingerprint)),
    }


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return a short digest of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def require_allowable(allow: Iterable[str]) -> None:
    """Refuse `--allow` for keys that cannot change within a run, and for incomplete keys.

    Raises:
        ConfigError: lists the keys that can be allowed.
    """
    refused = [key for key in allow if key not in ALLOWABLE and not (_allowable(key) and is_setting(key))]
    if refused:
        todo = f"one of {', '.join(ALLOWABLE)} can"
        raise ConfigError(
            *(Problem(f"--allow {key}", "cannot change within a run", todo, "not-allowable") for key in refused)
        )


def require_same(
    folder: RunDir, before: Mapping[str, Any], now: Mapping[str, Any], allow: Iterable[str] = ()
) -> list[str]:
    """Refuse to continue a run with other settings or inputs; return the differences that `allow` permits.

    Raises:
        ConfigError: shows every other difference as `- was`, `+ is`.
    """
    changed = _changed_settings(_with_micro_batches(before["settings"]), now["settings"]) | _changed_inputs(
        before["inputs"], now["inputs"]
    )
    problems = {key: Problem(Location(key=key), what, code="changed-on-resume") for key, what in changed.items()}
    allowed = tuple(allow)
    refused = []
    for key in problems:
        if not any(_covers(name, key) for name in allowed):
            refused.append(key)
    if refused:
        todo = "undo the change, choose another name, or begin again with --fresh (which moves the old run aside)"
        allowable = [_allowable(key) for key in refused]
        if all(allowable):
            todo += f"; or go on with it: {' '.join(dict.fromkeys(f'--allow {name}' for name in allowable))}"
        other = Problem(str(folder.root), "belongs to another run", todo, "another-run")
        raise ConfigError(*(problems[key] for key in refused), other)
    return [str(problem) for problem in problems.values()]


def _with_micro_batches(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint that may be older than `MICRO_BATCHES`, and is of one process then."""
    found = dict(settings)
    if "train.grad_accumulation" in found:
        found[MICRO_BATCHES] = found.pop("train.grad_accumulation")
    return found


def _changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    # A checkpoint of an earlier start may hold settings that are compared by content since.
    compared = [key for key in sorted(old.keys() | new.keys()) if not _is_free(key)]
    keys = [key for key in compared if old.get(key) != new.get(key)]
    # A setting that came with a later version, at its default, means what was done without it.
    defaults = _default_settings()
    keys = [key for key in keys if key in old or new[key] != defaults.get(_in_first_entry(key), _NO_DEFAULT)]
    return {key: f"- {_shown(old, key)}  + {_shown(new, key)}" for key in keys}


_NO_DEFAULT = object()


@cache
def _default_settings() -> dict[str, Any]:
    return flatten_keys(Config(name="defaults", data=[DataEntry(folder="defaults")]).model_dump(mode="json"))


def _in_first_entry(key: str) -> str:
    """Return the key of the same setting of the first entry of `data`."""
    return re.sub(r"^data\.\d+\.", "data.0.", key)


def _changed_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    words = {(True, True): "changed", (True, False): "is gone", (False, True): "is new"}
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return {key: words[key in old, key in new] for key in keys}


def _covers(allowed: str, key: str) -> bool:
    """Return whether `--allow ALLOWED` permits a change of `key`: the same key, or a key of an allowable section."""
    return key == allowed or (allowed in ALLOWABLE and key.startswith(f"{allowed}."))


def _allowable(key: str) -> str | None:
    """Return the entry of `ALLOWABLE` that covers `key`, or None."""
    return next((name for name in ALLOWABLE if _covers(name, key)), None)


def require_untouched(folder: RunDir) -> None:
    """Refuse to begin at step 0 in a folder whose checkpoints are gone.

    Raises:
        WeightsError: names the step that was saved.
    """
    todo = "put them back, or begin again with --fresh"
    # A run that was stopped within its first step has nothing to save.
    events = [event for event in metrics.read_records(folder.events) if event["step"] > 0]
    saved = [event["step"] for event in events if event.get("event") in ("save", "stopped")]
    if saved:
        what = f"its checkpoints are gone; the last one was of step {max(saved)}"
        raise WeightsError(Problem(str(folder.checkpoints), what, todo, "checkpoints-gone"))
    exported = sorted(folder.lora().parent.glob("*.safetensors"))
    if exported:
        what = f"its checkpoints are gone, and {exported[-1].name} was exported from one"
        raise WeightsError(Problem(str(folder.checkpoints), what, todo, "checkpoints-gone"))


def _is_free(key: str) -> bool:
    """Return whether the setting `key` is no part of the identity of a run."""
    parts = ["*" if part.isdigit() else part for part in key.split(".")]
    return ".".join(parts) in BY_DIGEST or key.startswith(CHANGEABLE_ON_RESUME)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "(absent)"
