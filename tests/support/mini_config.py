"""Configs of tiny runs on the miniature."""

from pathlib import Path
from typing import Any

import yaml

from zimage_train import mini

TINY = {
    "model.path": str(mini.TURBO),
    "model.extras": "null",
    "model.adapter": str(mini.ADAPTER_V1),
    "model.dtype": "fp32",
    "data.0.folder": str(mini.IMAGES),
    "data.0.resolution": "[64]",
    "train.steps": "2",
    "train.batch_size": "2",
    "sample.width": "64",
    "sample.height": "64",
    "sample.first": "false",
    "save.every": "1",
    "log.tensorboard": "false",
}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def mini_values(output: Path, cache: Path, /, **changes: Any) -> dict[str, Any]:
    """Plain values of a tiny run on the miniature; every default that matters to speed is lowered."""
    base = {
        "name": "tiny",
        "output_dir": str(output),
        "seed": 7,
        "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"},
        "data": [{"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb"}],
        "cache": {"folder": str(cache)},
        "lora": {"rank": 4},
        "train": {"steps": 4, "batch_size": 2},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "sample": {"every": None},
        "save": {"every": None, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    return merge(base, changes)


def tiny(output: Path, cache: Path) -> list[str]:
    """Options that bring any config to the miniature and to seconds."""
    places = {"output_dir": str(output), "cache.folder": str(cache)}
    return [word for key, value in (TINY | places).items() for word in ("--set", f"{key}={value}")]


def mini_text(folder: Path, name: str, steps: int = 4, **changes: Any) -> str:
    """The YAML of a tiny run in `folder`/runs."""
    values = mini_values(folder / "runs", folder / "cache", name=name, **changes)
    return yaml.safe_dump(merge(values, {"train": {"steps": steps}}), sort_keys=False)
