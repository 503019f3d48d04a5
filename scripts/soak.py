"""Kill a run at random moments, damage its files and its disk, and see that it goes on to the same bytes.

python scripts/soak.py [--minutes 10] [--seed 0]
    Train the miniature again and again, each start in a process of its own that is killed at a random moment of a
    random stage. Between starts a bit of a random file of the run or its cache is flipped, or the disk of the next
    start fails once. Each start must go on, or end with an exit code and a message; each finished LoRA must have the
    bytes of a run that nothing happened to. A stage in which no kill came fails at the end.
"""

import argparse
import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any
from unittest import mock

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.errors import ZImageTrainError
from zimage_train.training.run_dir import run_dir_of
from zimage_train.training.stage_clock import StageClock

KILLED_IN = ("checks", "encoding", "loading", "rehearsal", "steps", "previews", "drift", "validation", "saves")
"""The stages of a start in which a kill must have come."""
FAULTS = ("nothing", "a flipped bit", "a full disk", "a failing disk")
HANG_SECONDS = 300
UNEXPLAINED = 99
"""Exit code of a start that ended by anything but an error that this program declares."""


def config_in(root: Path) -> Config:
    values = {
        "name": "soaked",
        "output_dir": str(root / "runs"),
        "seed": 7,
        "model": {"path": str(mini.TURBO), "adapter": str(mini.ADAPTER_V1), "dtype": "fp32"},
        "data": [{"folder": str(root / "photos"), "resolution": [64], "trigger": "zorb"}],
        "cache": {"folder": str(root / "cache")},
        "lora": {"rank": 4},
        "train": {"steps": 24, "batch_size": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "sample": {"every": 6, "width": 64, "height": 64, "prompts": ["a red zorb", "a dog"]},
        "validation": {"folder": str(root / "held_out"), "resolution": 64, "every": 8},
        "save": {"every": 4, "dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    config, problems = validate_config(values, str)
    assert config is not None, problems
    return config


def copy_images(root: Path) -> None:
    """Copy the images of the miniature: most of them to train on, two to validate with."""
    paths = sorted(path for path in mini.IMAGES.iterdir() if path.suffix in (".png", ".jpg"))
    for place, chosen in (("photos", paths[2:]), ("held_out", paths[:2])):
        (root / place).mkdir(parents=True)
        for path in chosen:
            shutil.copy(path, root / place)
            shutil.copy(path.with_suffix(".txt"), root / place)


@contextmanager
def failing_disk(n: int, number: int) -> Iterator[None]:
    """Within the block, the `n`th file that is opened for writing fails with the error `number`; 0: none does."""
    open_path, left = Path.open, n

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        nonlocal left
        if "w" in mode or "a" in mode:
            left -= 1
            if left == 0:
                raise OSError(number, os.strerror(number), str(path))
        return open_path(path, mode, *args, **options)

    with mock.patch.object(Path, "open", opened):
        yield


@contextmanager
def watched_stages(stage: "Synchronized[int]") -> Iterator[None]:
    """Within the block, `stage` holds the index of the stage that the run is in."""
    change = StageClock._change_to

    def change_to(clock: StageClock, name: Any) -> None:
        change(clock, name)
        if name in KILLED_IN:
            stage.value = KILLED_IN.index(name)

    with mock.patch.object(StageClock, "_change_to", change_to):
        yield


def start(config: Config, stage: "Synchronized[int]", log: str, fault: tuple[int, int] | None) -> None:
    """Train in this process; end with the exit code of a declared error, or `UNEXPLAINED`."""
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with watched_stages(stage), failing_disk(*(fault or (0, 0))):
            run_training(config, fresh=False)
    except ZImageTrainError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_code)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
        sys.exit(UNEXPLAINED)


class Soak:
    """Runs of the same config, with whatever happens to them."""

    def __init__(self, root: Path, seed: int) -> None:
        copy_images(root)
        self._config, self._draw = config_in(root), random.Random(seed)
        self._run, self._cache = run_dir_of(self._config), root / "cache"
        self._log = root / "start.log"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["zimage_train.commands.train"])
        self.kills: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self._whole = self._train_undisturbed()

    def _train_undisturbed(self) -> bytes:
        code = self._start(kill_in=None, fault=None)
        assert code == 0, self._log.read_text()
        return self._run.lora().read_bytes()

    def episode(self, until: float) -> None:
        """Begin anew, and start until the run is complete; nothing more happens to it after `until`."""
        shutil.rmtree(self._run.root)
        if self._draw.random() < 0.5:
            shutil.rmtree(self._cache)
        while True:
            goes_on = time.monotonic() < until
            happens = self._draw.choice(FAULTS) if goes_on else "nothing"
            self.happened[happens] += 1
            fault: tuple[int, int] | None = None
            if happens == "a flipped bit":
                self._flip_a_bit()
            elif happens != "nothing":
                number = errno.ENOSPC if happens == "a full disk" else errno.EIO
                fault = (self._draw.randint(1, 60), number)
            rarest = min(KILLED_IN, key=lambda name: (self.kills[name], self._draw.random()))
            code = self._start(rarest if goes_on and self._draw.random() < 0.8 else None, fault)
            if code == 0:
                break
            if code == UNEXPLAINED:
                raise SystemExit(f"a start ended without an explanation:\n{self._log.read_text()}")
            if code is not None and self._needs_fresh():
                self.endings["refused: no checkpoint is intact"] += 1
                shutil.rmtree(self._run.root)
        same = self._run.lora().read_bytes() == self._whole
        self.endings["complete"] += 1
        if not same:
            raise SystemExit(f"{self._run.lora()} has other bytes; {self._log} has its last start")

    def _needs_fresh(self) -> bool:
        return "--fresh" in self._log.read_text()

    def _start(self, kill_in: str | None, fault: tuple[int, int] | None) -> int | None:
        """Start the run; return its exit code, or None if it was killed in the stage `kill_in`."""
        stage: Synchronized[int] = self._context.Value("i", 0)
        process = self._context.Process(target=start, args=(self._config, stage, str(self._log), fault))
        process.start()
        until = time.monotonic() + HANG_SECONDS
        while process.is_alive() and time.monotonic() < until:
            if kill_in is not None and KILLED_IN[stage.value] == kill_in:
                time.sleep(self._draw.uniform(0.0, 0.1))
                process.kill()
                break
            time.sleep(0.001)
        was_hanging = time.monotonic() >= until
        process.kill()
        process.join()
        if was_hanging:
            raise SystemExit(f"a start did not end in {HANG_SECONDS} s:\n{self._log.read_text()}")
        if process.exitcode == -signal.SIGKILL:
            self.kills[KILLED_IN[stage.value]] += 1
            return None
        self.endings[f"exit code {process.exitcode}"] += 1
        return process.exitcode

    def _flip_a_bit(self) -> None:
        # What a finished export holds is not read again, so its damage is for `lora verify` to find.
        found = [*self._run.root.rglob("*"), *self._cache.rglob("*")]
        files = [path for path in found if path.is_file() and path.parent.name not in ("lora", "ema")]
        paths = [path for path in files if path.stat().st_size]
        if not paths:
            return
        path = self._draw.choice(sorted(paths))
        content = bytearray(path.read_bytes())
        content[self._draw.randrange(len(content))] ^= 1 << self._draw.randrange(8)
        path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), asked.seed)
        until = time.monotonic() + 60.0 * asked.minutes
        while time.monotonic() < until:
            soak.episode(until)
    for title, counted in (("killed in", soak.kills), ("between starts", soak.happened), ("ended", soak.endings)):
        print(f"{title}: {', '.join(f'{name} {count}' for name, count in sorted(counted.items()))}")
    missed = [name for name in KILLED_IN if not soak.kills[name]]
    if missed:
        raise SystemExit(f"no kill came in: {', '.join(missed)}; give more minutes")


if __name__ == "__main__":
    main()
