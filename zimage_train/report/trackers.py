"""Experiment trackers: TensorBoard and Weights & Biases.

They receive the numbers of metrics.jsonl and events.jsonl and the previews on disk, and nothing else. A tracker that
fails is dropped for the rest of the run: no run ends because a curve could not be logged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from zimage_train.errors import ConfigError, Problem

LOGGED_NUMBERS = ("loss", "preservation", "lr", "grad_norm", "seconds", "gb")


class Tracker(Protocol):
    """Logs numbers by name and images by label, each at a step."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def images(self, step: int, paths: Mapping[str, Path]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes event files into `folder`; hides the steps after `start` that an earlier run has logged."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, paths: Mapping[str, Path]) -> None:
        for label, path in paths.items():
            with Image.open(path) as image:
                self._writer.add_image(f"previews/{label}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases, continuing the run with the same id; with WANDB_MODE=offline to the local disk only.

    Raises:
        ConfigError: wandb is not installed, or not logged in.
    """

    def __init__(self, project: str, name: str, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            hint = "pip install wandb, or set log.wandb: null"
            raise ConfigError(Problem("log.wandb", "wandb is not installed", hint, "missing-package")) from None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            hint = "run wandb login, or set WANDB_MODE=offline"
            raise ConfigError(Problem("log.wandb", str(error).splitlines()[0][:200], hint, "not-logged-in")) from None
        # A continued run logs some steps again. Over train/step these are equal values at the same place; over wandb's
        # own step counter, which only rises, they would be new points.
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._image = wandb.Image

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"train/step": step, **values})

    def images(self, step: int, paths: Mapping[str, Path]) -> None:
        images = {f"previews/{label}": self._image(str(path)) for label, path in paths.items()}
        self._run.log({"train/step": step} | images)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """Forwards to all trackers of a run; a tracker that fails is dropped with a warning."""

    def __init__(self, trackers: list[Tracker], warn: Callable[[str], None]) -> None:
        self._trackers = trackers
        self._warn = warn

    def record(self, record: Mapping[str, Any]) -> None:
        """Log a record of metrics.jsonl, without the numbers that a skipped step does not have."""
        values = {f"train/{name}": record[name] for name in LOGGED_NUMBERS if record.get(name) is not None}
        self._each(lambda tracker: tracker.numbers(record["step"], values))

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Log the results of a validation."""
        named = {f"validation/{name}": value for name, value in values.items()}
        self._each(lambda tracker: tracker.numbers(step, named))

    def drift(self, step: int, value: float) -> None:
        """Log the drift from Turbo's own steps."""
        self._each(lambda tracker: tracker.numbers(step, {"previews/drift": value}))

    def images(self, step: int, paths: Mapping[str, Path]) -> None:
        self._each(lambda tracker: tracker.images(step, paths))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, log: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                log(tracker)
            except Exception as error:  # noqa: BLE001  a tracker that fails must not end a run
                self._trackers.remove(tracker)
                self._warn(f"{type(tracker).__name__} failed ({type(error).__name__}: {error}); continuing without it")
