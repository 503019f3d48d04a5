"""The model that claims are measured on."""

from dataclasses import dataclass
from pathlib import Path

import torch

from zimage_train import mini
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ModelPaths
from zimage_train.models.locate import DownloadFn, NotDownloadedError, cached_only, locate, transformer_tensors

PROMPTS = (
    *("", "a photo of zchar", "a red zorb on the left of a blue box", "Ein alter Leuchtturm im Sturm, Ölgemälde"),
    *(
        "一只戴着红色围巾的猫，水墨画",
        "сад после дождя",
        'a sign that says "OPEN 24/7" in neon',
        "portrait, 85mm, f/1.4 🌸",
    ),
    "a kitchen in the morning, with a table, two cups, bread, a window, and a cat that looks out of it; film grain",
    "a very long caption, " * 120,
)
"""Prompts of several scripts and lengths: empty, short, and longer than the model reads."""


@dataclass(frozen=True)
class Subject:
    """A model with its parts, and where and how it is run."""

    paths: ModelPaths
    shape: TransformerShape
    device: torch.device
    dtype: str
    is_miniature: bool
    is_quick: bool

    @property
    def folder(self) -> Path:
        """The folder of all parts, in the layout of diffusers."""
        return self.paths.transformer.parent


def choose_model(config: Config | None, dtype: str, is_quick: bool, fetch: DownloadFn = cached_only) -> Subject:
    """Return the model of `config`; without one, Turbo where it is downloaded, and the miniature otherwise.

    Raises:
        ZImageTrainError: the model of the config is not complete.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    if config is None:
        try:
            return _subject(_config({"variant": "turbo", "dtype": dtype}), device, is_quick, fetch)
        except NotDownloadedError:
            model = {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"}
            return _subject(_config(model), device, is_quick, fetch)
    return _subject(config, device, is_quick, fetch)


def _config(model: dict[str, str]) -> Config:
    config, problems = validate_config({"name": "prove", "model": model, "data": [{"folder": str(mini.IMAGES)}]}, str)
    if config is None:
        raise ConfigError(*problems)
    return config


def _subject(config: Config, device: torch.device, is_quick: bool, fetch: DownloadFn) -> Subject:
    paths = locate(config.model, fetch)
    shape, _ = transformer_tensors(paths.transformer)
    is_miniature = Path(paths.transformer).is_relative_to(mini.HERE)
    return Subject(paths, shape, device, config.model.dtype, is_miniature, is_quick)
