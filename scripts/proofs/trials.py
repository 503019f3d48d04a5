"""Runs of two steps on the miniature, each made once, and their outputs."""

import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from zimage_train.commands.train import run_training
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.errors import ZImageTrainError
from zimage_train.planning import gpus, planner, preflight
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.report.metrics import read_records

from proofs.inputs import make_inputs

COMMON: dict[str, Any] = {
    "name": "proof",
    "seed": 7,
    "model.path": "{turbo}",
    "model.adapter": "{adapter_v1}",
    "model.dtype": "fp32",
    "data.0.folder": "{images}",
    "data.0.resolution": [64],
    "data.0.trigger": "zorb",
    "data.0.caption_dropout": 0.2,
    "lora.rank": 4,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.max_grad_norm": None,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "sample.every": None,
    "save.every": None,
    "save.dtype": "fp32",
    "log.tensorboard": False,
}
"""Settings of every run, unless a row changes them; a row can take one out with `LEFT_OUT`."""
LEFT_OUT = "(left out)"
H100, LARGE, HOST_BYTES = GPU_SPECS["h100"], Bucket(1024, 1024), 16e9


class Trial:
    """A finished run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.output_dir) / config.name

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of its steps."""
        return read_records(self.folder / "metrics.jsonl")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The records of its events, such as validations."""
        return read_records(self.folder / "events.jsonl")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of run.json."""
        return json.loads((self.folder / "run.json").read_text())

    @property
    def lora(self) -> Path:
        """The LoRA that it ended with."""
        return self.folder / "lora" / f"{self.config.name}.safetensors"

    @cached_property
    def numbers(self) -> bytes:
        """The bytes of the LoRA without its header, which names the run."""
        content = self.lora.read_bytes()
        return content[8 + int.from_bytes(content[:8], "little") :]

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Tensor of the LoRA -> its shape."""
        with safe_open(self.lora, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The header of the LoRA."""
        with safe_open(self.lora, "pt") as file:
            return file.metadata()

    def files(self, pattern: str) -> list[str]:
        """Return the names of the files of the run folder that match a pattern."""
        return sorted(path.name for path in self.folder.glob(pattern))

    @property
    def previews(self) -> list[Path]:
        """The previews of the last step."""
        return sorted((self.folder / "samples").glob(f"{self.config.train.steps:06d}-*.png"))

    def texts(self) -> dict[str, str]:
        """Return the sampling settings in the first preview."""
        with Image.open(self.previews[0]) as image:
            recipe = json.loads(image.info["zimage_train.recipe"])
        return {name: str(value) for name, value in recipe.items()}

    @cached_property
    def spec(self) -> RunSpec:
        """The checked specification of the run."""
        return preflight.check_run(self.config)

    @cached_property
    def plan(self) -> MemoryPlan:
        """The plan of these settings for the full model and images of 1024 px, on an H100 or with the budget set."""
        workload = preflight.workload_of(replace(self.spec, model_files=None), gpu=True)
        workload = replace(workload, sizes=Counter({LARGE: 1}), largest_batches=None, batch_weights=None)
        budget = self.config.memory.budget_gb
        limit = gpus.usable_bytes(H100.memory_gb * 1e9) if isinstance(budget, str) else budget * 1e9
        constraints = planner.plan_constraints(self.config, workload.shape.n_layers)
        return planner.choose_plan(workload, constraints, limit, HOST_BYTES, H100)


@dataclass
class Trials:
    """Makes runs in the folder `work`, and remembers them."""

    work: Path

    def __post_init__(self) -> None:
        os.environ["WANDB_MODE"] = "offline"
        self.inputs = make_inputs(self.work / "inputs")
        self._made: dict[str, Trial] = {}
        trained = self.run({"name": "trained"})
        self.inputs |= {"trained": str(trained.lora)}

    def run(self, settings: Mapping[str, Any]) -> Trial:
        """Return the run with these settings beside the common ones.

        Raises:
            ValueError: the settings are refused.
            ZImageTrainError: the run is refused.
        """
        words = json.dumps(settings, sort_keys=True)
        if words not in self._made:
            config = self.config(settings)
            run_training(config, fresh=True)
            self._made[words] = Trial(config)
        return self._made[words]

    def config(self, settings: Mapping[str, Any]) -> Config:
        """Return the config of the run with these settings.

        Raises:
            ValueError: the settings are refused.
        """
        output = {
            "output_dir": str(self.work / "runs" / str(len(self._made))),
            "cache.folder": str(self.work / "cache"),
        }
        config, problems = validate_config(nested(self.filled(COMMON | output | dict(settings))), str)
        if config is None:
            raise ValueError("; ".join(str(problem) for problem in problems))
        return config

    def filled(self, value: Any) -> Any:
        """Return a value in which names of inputs in braces are their paths."""
        if isinstance(value, Mapping):
            return {key: self.filled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.filled(one) for one in value]
        if isinstance(value, str):
            for name, path in self.inputs.items():
                value = value.replace(f"{{{name}}}", path)
        return value

    def refusal(self, settings: Mapping[str, Any]) -> str:
        """Return why a run with these settings is refused; empty if it is not."""
        try:
            self.run(settings)
        except (ValueError, ZImageTrainError) as error:
            return str(error)
        return ""


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of settings whose keys are as `--set` has them; those that are left out are not in it."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if value == LEFT_OUT:
            continue
        *path, leaf = key.split(".")
        section: Any = result
        for name in path:
            section = section.setdefault(name, {})
        section[leaf] = copy.deepcopy(value)
    return _with_lists(result)


def _with_lists(value: Any) -> Any:
    """Return sections in which those with numbers as keys are lists."""
    if not isinstance(value, dict):
        return value
    sections = {key: _with_lists(one) for key, one in value.items()}
    if sections and all(str(key).isdigit() for key in sections):
        return [sections[key] for key in sorted(sections)]
    return sections
