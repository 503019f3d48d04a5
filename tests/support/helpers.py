"""Helpers of tests that train on the miniature: what a run left behind, how to spoil a step, other processes."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config, ModelSettings
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.errors import Stopped
from zimage_train.lora.layers import base_layer
from zimage_train.models import locate, text_encoder, vae
from zimage_train.report.metrics import read_records
from zimage_train.training import loop, step_runner
from zimage_train.training.loss import Loss

ROOT = Path(__file__).parents[2]


def frozen_tensor(frozen: FrozenTransformer, name: str) -> torch.Tensor:
    """The frozen parameter `name`, as it is stored, also under a LoRA."""
    owner, _, leaf = name.rpartition(".")
    return getattr(base_layer(frozen.model, owner), leaf)


def script(name: str) -> ModuleType:
    """The module of scripts/`name`.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder(config: Config) -> Path:
    return Path(config.output_dir) / config.name


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in read_records(folder(config) / "metrics.jsonl")]


def final(config: Config) -> bytes:
    return (folder(config) / "lora" / f"{config.name}.safetensors").read_bytes()


def numbers(config: Config) -> bytes:
    """The bytes of the final LoRA without its header, which names the run."""
    content = final(config)
    return content[8 + int.from_bytes(content[:8], "little") :]


def facts(config: Config) -> dict:
    return json.loads((folder(config) / "run.json").read_text())


PREVIEWED = {"every": 2, "width": 64, "height": 64, "prompts": ["a red zorb on a blue background", "a red circle"]}


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[int]:
    """Make the loss of `steps` not a number, once each."""
    fired: list[int] = []

    def spoil(step: int, model: torch.nn.Module, loss: Loss) -> Loss:
        if step not in steps or step in fired:
            return loss
        fired.append(step)
        return Loss(loss.objective * float("nan"), loss.plain * float("nan"))

    spoil_losses(monkeypatch, spoil)
    return fired


def spoil_losses(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, torch.nn.Module, Loss], Loss]) -> None:
    """Let `spoil` change every loss of the loop; it gets the step."""
    original, original_prefetch, now = step_runner.losses, loop.prefetch, {"step": 0}

    def prefetch(run):
        for step, loaded in original_prefetch(run):
            now["step"] = step
            yield step, loaded
        now["step"] = 0

    def spoiled(model, batch, config):
        for loss in original(model, batch, config):
            yield spoil(now["step"], model, loss) if now["step"] else loss

    monkeypatch.setattr(loop, "prefetch", prefetch)
    monkeypatch.setattr(step_runner, "losses", spoiled)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the run to stop while it is in `step`, as SIGTERM would."""
    original = loop.prefetch

    def prefetch(run):
        for at, loaded in original(run):
            if at == step:
                run.stop.signal_number = 15
            yield at, loaded

    monkeypatch.setattr(loop, "prefetch", prefetch)


def run_in_two_starts(config: Config, monkeypatch: pytest.MonkeyPatch, step: int = 2) -> None:
    """Train to `step`, where SIGTERM would come, and continue to the end."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Stopped):
            run_training(config, fresh=False)
    run_training(config, fresh=False)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def load_all(model: Path) -> None:
    """Load every part of a model's folder, as a run does."""
    found = locate.locate(ModelSettings(path=str(model), adapter=None))
    device = torch.device("cpu")
    load_frozen(found.transformer, None, "fp32", device)
    text_encoder.load_text_encoder(found.extras, device, torch.float32)
    vae.load_vae(found.extras.vae, device, torch.float32)
