"""Signals in every phase of a run: it saves what was trained, says how to go on, and goes on to the same bytes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zimage_train import mini
from zimage_train.commands import train
from zimage_train.commands.train import run_training
from zimage_train.config import strict_yaml
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.diffusion.drift import DriftMeter
from zimage_train.errors import Stopped
from zimage_train.training import build, checkpoint, exports, loop, outputs, validation

from helpers import environment, facts, final, folder, losses
from mini_config import mini_values

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HELD_OUT = 1
STEPS = 5
SETTINGS: dict[str, Any] = {
    "train": {"steps": STEPS, "batch_size": 1, "grad_accumulation": 2},
    "save": {"every": 3},
    "sample": {"every": 2, "width": 64, "height": 64, "steps": 2, "prompts": ["a red zorb"]},
}
PHASES: dict[str, tuple[Any, str, int, int]] = {
    "caching": (TensorCache, "write", 3, 0),
    "loading": (build, "load_model", 1, 0),
    "rehearsing": (train, "dry_run", 1, 0),
    "validating the start": (validation, "errors_by_sigma", 1, 0),
    "drawing the start": (outputs, "sample_all", 1, 0),
    "the first batch of all": (loop, "keyed_int", 1, 0),
    "the first batch of a step": (loop, "keyed_int", 2 * 4 + 1, 4),
    "the last batch of a step": (loop, "keyed_int", 2 * 4 + 2, 5),
    "validating": (validation, "errors_by_sigma", HELD_OUT + 1, 2),
    "drawing": (outputs, "sample_all", 2, 2),
    "measuring drift": (DriftMeter, "measure", 2, 4),
    "decoding": (outputs, "decode_all", 2, 2),
    "saving": (checkpoint, "save", 1, 3),
    "exporting": (exports, "export_step", 1, 3),
    "writing the report": (outputs, "write_report", 2, 3),
}
"""Phase -> where its function is, its name, which call of it the signal meets, and the step that is saved then."""


def config_in(place: Path, cache: Path) -> Config:
    held_out = place / "held_out"
    if not held_out.exists():
        held_out.mkdir(parents=True)
        for path in sorted(mini.IMAGES.glob("*.png"))[:HELD_OUT]:
            (held_out / path.name).write_bytes(path.read_bytes())
    values = mini_values(place / "runs", cache, **SETTINGS)
    values["validation"] = {"folder": str(held_out), "resolution": 64, "every": 2}
    config, problems = validate_config(values, str)
    assert config is not None, problems
    return config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Config:
    """A run without a signal."""
    config = config_in(tmp_path_factory.mktemp("whole"), cache)
    run_training(config, fresh=False)
    return config


class SignalAt:
    """Raises a signal within the nth call of a function; counts how often it did."""

    def __init__(self, patch: pytest.MonkeyPatch, place: Any, name: str, n: int, number: int) -> None:
        self.calls = self.fired = 0
        original: Callable[..., Any] = getattr(place, name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == n:
                self.fired += 1
                signal.raise_signal(number)
            return original(*args, **options)

        patch.setattr(place, name, call)


def drawn(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder(config) / "samples").glob("0*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_signal_in_any_phase(tmp_path: Path, monkeypatch, whole: Config, cache: Path, phase: str, number: int):
    """55. SIGINT, SIGTERM or SIGHUP in any phase: what was trained is saved, and the run goes on to the same bytes."""
    place, name, n, saved = PHASES[phase]
    config = config_in(tmp_path, tmp_path / "cache" if phase == "caching" else cache)
    with monkeypatch.context() as patch:
        fault = SignalAt(patch, place, name, n, number)
        with pytest.raises(Stopped, match="the same command continues") as stopped:
            run_training(config, fresh=False)
    assert fault.fired == 1 and stopped.value.exit_code == 128 + number
    steps = [step for step, _ in checkpoint.steps_in(folder(config) / "checkpoints")]
    assert max(steps, default=0) == saved
    if number == signal.SIGTERM:  # what is saved does not depend on the signal
        run_training(config, fresh=False)
        assert facts(config)["starts"] == ([0, saved] if phase != "caching" else [0])
        assert final(config) == final(whole) and losses(config) == losses(whole)
        assert drawn(config) == drawn(whole)


@pytest.mark.slow
def test_signal_in_the_last_export(tmp_path: Path, monkeypatch, whole: Config, cache: Path):
    """55. A signal while the last step is exported leaves a whole LoRA; the next start draws what is missing.

    A signal before the export leaves it to the next start, since the checkpoint is on disk.
    """
    config = config_in(tmp_path, cache)
    with monkeypatch.context() as patch:
        before = SignalAt(patch, exports, "export_step", 2, signal.SIGTERM)
        with pytest.raises(Stopped, match=f"after step {STEPS}, which is saved"):
            run_training(config, fresh=False)
    assert before.fired == 1 and not folder(config).joinpath("lora", f"{config.name}.safetensors").exists()
    with monkeypatch.context() as patch:
        fault = SignalAt(patch, exports.lora_file, "export_lora", 1, signal.SIGTERM)
        with pytest.raises(Stopped, match=f"after step {STEPS}, which is saved"):
            run_training(config, fresh=False)
    assert fault.fired == 1 and final(config) == final(whole) and drawn(config) != drawn(whole)
    run_training(config, fresh=False)
    assert facts(config)["starts"] == [0, STEPS, STEPS] and drawn(config) == drawn(whole)


@pytest.mark.slow
def test_signal_beside_an_asked_save(tmp_path: Path, monkeypatch, cache: Path):
    """55. A LoRA that was asked for in the step in which a signal comes is exported: no later start would do it."""
    config = config_in(tmp_path, cache)
    with monkeypatch.context() as patch:
        fault = SignalAt(patch, loop, "keyed_int", 2 * 3 + 2, signal.SIGTERM)  # the last batch of step 4
        take = outputs.requests.take
        patch.setattr(outputs.requests, "take", lambda folder: {"save"} if fault.fired else take(folder))
        with pytest.raises(Stopped, match="after step 4, which is saved"):
            run_training(config, fresh=False)
    assert fault.fired == 1 and SETTINGS["save"]["every"] == 3
    assert (folder(config) / "lora" / f"{config.name}-000004.safetensors").exists()


def test_a_signal_must_have_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """55. Check: a signal that is asked for at a call that never comes is not counted as one that came."""
    with monkeypatch.context() as patch:
        fault = SignalAt(patch, exports, "picture_path", 2, signal.SIGTERM)
        exports.picture_path(tmp_path)
    assert (fault.calls, fault.fired) == (1, 0)


SCANNED = """
import signal, sys
# Not ignored, as under nohup and in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from zimage_train import __main__
from zimage_train.planning import preflight
scan = preflight.scan_entry
def scan_entry(*args, **options):
    signal.raise_signal(signal.{name})
    print("still here", flush=True)
    return scan(*args, **options)
preflight.scan_entry = scan_entry
sys.argv = ["zimage-train", "train", "c.yaml"]
__main__.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGHUP, -1)])
def test_signal_while_images_are_checked(tmp_path: Path, shared_cache: Path, number: signal.Signals, code: int):
    """55. While images are checked there is nothing to save: a signal ends the command at once, and without a trace."""
    (tmp_path / "c.yaml").write_text(strict_yaml.dump(mini_values(tmp_path / "runs", shared_cache)))
    command = [sys.executable, "-c", SCANNED.format(name=number.name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "still here" not in done.stdout and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_time_from_signal_to_save(tmp_path: Path, monkeypatch, whole: Config, cache: Path):
    """55. A process that is told to stop within previews or batches saves at once, before anything else is finished."""
    config, told, saved = config_in(tmp_path, cache), [], []
    with monkeypatch.context() as patch:
        original, sample_all = checkpoint.save, outputs.sample_all

        def save(*args: Any) -> Any:
            saved.append(time.monotonic())
            return original(*args)

        def sample_slowly(model: Any, requests: Any, embeds: Any, progress: Callable[[int, int], None]) -> Any:
            if not (folder(config) / "samples" / "000000-00.png").exists():
                return sample_all(model, requests, embeds, progress)
            for index in range(600):
                if index == 3:
                    told.append(time.monotonic())
                    signal.raise_signal(signal.SIGTERM)
                time.sleep(0.1)
                progress(index, 600)
            raise AssertionError("drawn to the end")

        patch.setattr(checkpoint, "save", save)
        patch.setattr(outputs, "sample_all", sample_slowly)
        with pytest.raises(Stopped):
            run_training(config, fresh=False)
    assert len(told) == len(saved) == 1 and saved[0] - told[0] < 5
