"""Captioning with a vision-language model, in a process of its own: `zimage-train --json caption`."""

import atexit
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from zimage_train.dataset.caption_prompts import DEFAULT_MODEL
from zimage_train.errors import DataError, Problem, ZImageTrainError
from zimage_train.ui.image_folder import CAPTION_EXT, current_caption
from zimage_train.ui.run_state import event_of, text_of

PROGRAM = [sys.executable, "-m", "zimage_train", "--json", "caption"]
LAST_LINES = 50
STOP_SECONDS = 10.0
"""After that, a process that was asked to stop is killed; every caption that it has written is whole."""


@dataclass(frozen=True)
class CaptionWish:
    """A request for captions."""

    model: str = DEFAULT_MODEL
    style: str = "sentences"
    kind: str | None = None
    trigger: str | None = None
    replaces: bool = False
    """Also write the captions of images that have one."""

    def arguments(self) -> list[str]:
        """Return the options of the command."""
        arguments = ["--model", self.model, "--style", self.style]
        if self.kind is not None:
            arguments += ["--kind", self.kind]
        if self.trigger is not None:
            arguments += ["--trigger", self.trigger]
        if self.replaces:
            arguments.append("--force")
        return arguments


@dataclass
class CaptionJob:
    """A captioning of a folder, or of a single image.

    Args:
        folder: the folder of the images.
        image: the only image to caption; None for all of the folder.
        save: writes the caption of the only image.
    """

    folder: Path
    wish: CaptionWish
    image: Path | None = None
    save: Callable[[str], object] | None = None
    done: int = 0
    total: int = 0
    lines: list[str] = field(default_factory=list)
    """The last lines of the command's output."""
    errors: list[str] = field(default_factory=list)
    is_running: bool = False
    is_stopped: bool = False
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, and a thread that follows its events."""
        self.is_running = True
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Ask the process to end, and kill it if it does not; captions that it has written stay."""
        self.is_stopped = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        threading.Timer(STOP_SECONDS, process.kill).start()

    def _run(self) -> None:
        try:
            if self.image is None:
                self._follow(self.folder)
            else:
                self._caption_only(self.image)
        except (OSError, ZImageTrainError) as error:
            self.errors.append(str(error))
        finally:
            self.is_running = False

    def _caption_only(self, image: Path) -> None:
        """Caption one image: the command captions folders, so it gets a copy in a folder of its own."""
        with tempfile.TemporaryDirectory(prefix="zimage-train-") as place:
            copy = Path(place, image.name)
            shutil.copyfile(image, copy)
            self._follow(Path(place))
            caption = current_caption(copy.with_suffix(CAPTION_EXT))
        if caption and self.save is not None:
            self.save(caption)
        elif not self.errors and not self.is_stopped:
            raise DataError(Problem(str(image), "got no caption", "give another model", "no-caption"))

    def _follow(self, folder: Path) -> None:
        """Run the command on a folder, and take note of its events until it ends."""
        command = [*PROGRAM, str(folder), *self.wish.arguments()]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._process = process
        atexit.register(process.terminate)
        if self.is_stopped:  # before there was a process to stop
            process.terminate()
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self._take(line)
        code = process.wait()
        atexit.unregister(process.terminate)
        if code != 0 and not self.is_stopped and not self.errors:
            self.errors.append(self.lines[-1] if self.lines else f"exit code {code}")

    def _take(self, line: bytes) -> None:
        event = event_of(line)
        if event is None:
            return
        if event["event"] == "progress":
            if event.get("what") == "captions":  # not that of checking the images
                self.done, self.total = event["done"], event["total"]
        elif event["event"] == "error":
            if not self.is_stopped:
                self.errors.append(text_of(event))
        else:
            self.lines = [*self.lines[1 - LAST_LINES :], text_of(event)]
