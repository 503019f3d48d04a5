"""The model that claims are measured on, the device, and how much of the model fits there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zimage_train import mini
from zimage_train.config.load import cache_dir, validate_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ModelPaths
from zimage_train.models.locate import NotDownloadedError, cached_only, locate, transformer_tensors
from zimage_train.planning import devices

PROMPTS = (
    "",
    "a photo of zchar",
    " a red zorb on the left of a blue box\n",
    "Ein alter Leuchtturm im Sturm, Ölgemälde",
    "一只戴着红色围巾的猫，水墨画",
    "сад после дождя",
    'a sign that says "OPEN 24/7" in neon',
    "portrait, 85mm, f/1.4 🌸",
    "a kitchen in the morning, with a table, two cups, bread, a window, and a cat that looks out of it; film grain",
    "a very long caption, " * 120,
)
"""Prompts of several scripts and lengths: empty, between spaces, and longer than the model reads."""
SIDES, MINIATURE_SIDES = (512, 768, 1024), (64, 128)
SHARE_OF_MEMORY = 0.8
"""Share of main memory that a comparison may take."""


@dataclass(frozen=True)
class Subject:
    """A model with its parts, and where and how it is run."""

    config: Config
    """Its `model` section says which model this is."""
    paths: ModelPaths
    shape: TransformerShape
    device: torch.device
    is_miniature: bool
    is_quick: bool
    work: Path
    """Folder of the LoRA and the pictures that parts share."""

    @property
    def dtype(self) -> str:
        return self.config.model.dtype

    @property
    def digest_file(self) -> Path:
        """File in which a run remembers digests."""
        return cache_dir(self.config) / "digests.json"

    @property
    def side(self) -> int:
        """Width and height of images where one size is enough, px."""
        return self.sides[0]

    @property
    def sides(self) -> tuple[int, ...]:
        """Width and height of the images that steps are measured with, px."""
        sides = MINIATURE_SIDES if self.is_miniature else SIDES
        return sides[:1] if self.is_quick else sides

    @property
    def is_forecast(self) -> bool:
        """Whether memory and time are promised: not for the miniature on a GPU, where fixed costs are most of both."""
        return not (self.is_miniature and self.device.type == "cuda")

    @property
    def device_bytes(self) -> float:
        """Memory that a plan may use of the device."""
        return devices.device_limits(self.device).limit_bytes

    @property
    def host_bytes(self) -> float:
        """Main memory that a comparison may take."""
        return SHARE_OF_MEMORY * main_memory_bytes()

    def first_blocks(self, bytes_of: Callable[[TransformerShape], float], available: float) -> TransformerShape | None:
        """Return the shape with as many of the first blocks as fit `available`; None if not even one does."""
        for blocks in range(self.shape.n_layers, 0, -1):
            shape = replace(self.shape, n_layers=blocks)
            if bytes_of(shape) <= available:
                return shape
        return None

    def blocks_note(self, shape: TransformerShape, reason: str = "as all of them do not fit") -> str:
        """Return what a note says of a comparison on `shape`: nothing where this is the whole model."""
        if shape.n_layers == self.shape.n_layers:
            return ""
        return f", the first {shape.n_layers} of {self.shape.n_layers} blocks, {reason}"


def choose_model(config: Config | None, is_quick: bool, work: Path) -> Subject:
    """Return the model of `config`, or without one Turbo, and where that is not downloaded, the miniature.

    Raises:
        ZImageTrainError: the model of the config is not complete, or this machine cannot run it.
    """
    if config is None:
        config = _config({"variant": "turbo"})
        try:
            locate(config.model, cached_only)
        except NotDownloadedError:
            config = _config({"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = locate(config.model)
    shape, _ = transformer_tensors(paths.transformer)
    devices.require_device(device, shape, config.model.dtype)
    is_miniature = Path(paths.transformer).resolve().is_relative_to(mini.HERE.resolve())
    return Subject(config, paths, shape, device, is_miniature, is_quick, work)


def _config(model: dict[str, str]) -> Config:
    config, problems = validate_config({"name": "prove", "model": model, "data": [{"folder": str(mini.IMAGES)}]}, str)
    if config is None:
        raise ConfigError(*problems)
    return config
