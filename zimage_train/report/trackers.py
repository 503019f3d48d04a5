"""Where numbers and previews of a run go besides its own files: TensorBoard, and Weights & Biases.

Both are given what stands in metrics.jsonl and on disk, and nothing else. A tracker that fails is left out from then
on: no run ends because a curve could not be drawn.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from zimage_train.errors import ConfigError, Problem

LOGGED_NUMBERS = ("loss", "preservation", "lr", "grad_norm", "seconds", "gb")


class Tracker(Protocol):
    """Takes the numbers of a step by their names, the images of a preview by their labels, and the end."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def images(self, step: int, paths: Mapping[str, Path]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; what an earlier start wrote after `start` is hidden."""

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
    """A run of the project on Weights & Biases, continued under the same id; WANDB_MODE=offline keeps it on this disk.

    Raises:
        ConfigError: wandb is not installed, or nobody is logged in.
    """

    def __init__(self, project: str, name: str, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            todo = "pip install wandb, or set log.wandb: null"
            raise ConfigError(Problem("log.wandb", "wandb is not installed", todo)) from None
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
            todo = "run wandb login, or set WANDB_MODE=offline"
            raise ConfigError(Problem("log.wandb", str(error).splitlines()[0][:200], todo)) from None
        # Steps that a new start does again are logged again: equal values over train/step, not over wandb's own count.
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._image = wandb.Image

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"train/step": step, **values})

    def images(self, step: int, paths: Mapping[str, Path]) -> None:
        shown = {f"previews/{label}": self._image(str(path)) for label, path in paths.items()}
        self._run.log({"train/step": step} | shown)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run as one."""

    def __init__(self, trackers: list[Tracker], warn: Callable[[str], None]) -> None:
        self._trackers = trackers
        self._warn = warn

    def record(self, record: Mapping[str, Any]) -> None:
        """Pass on a line of metrics.jsonl; numbers that a skipped step lacks are left out."""
        values = {f"train/{name}": record[name] for name in LOGGED_NUMBERS if record.get(name) is not None}
        self._each(lambda tracker: tracker.numbers(record["step"], values))

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on what a validation found."""
        named = {f"validation/{name}": value for name, value in values.items()}
        self._each(lambda tracker: tracker.numbers(step, named))

    def drift(self, step: int, value: float) -> None:
        """Pass on how far Turbo is from its own steps."""
        self._each(lambda tracker: tracker.numbers(step, {"previews/drift": value}))

    def images(self, step: int, paths: Mapping[str, Path]) -> None:
        self._each(lambda tracker: tracker.images(step, paths))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # noqa: BLE001  a tracker that fails must not end a run
                self._trackers.remove(tracker)
                self._warn(f"{type(tracker).__name__} failed ({type(error).__name__}: {error}); going on without it")
