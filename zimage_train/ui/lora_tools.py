"""The commands `zimage-train lora ...` as the page runs them: in a process of its own, with their results as events."""

import asyncio
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from zimage_train.errors import ConfigError, Problem
from zimage_train.io.json_text import parse_json
from zimage_train.ui.lora_files import MADE
from zimage_train.ui.workspace import Workspace

Layout = Literal["comfyui", "diffusers", "peft", "kohya", "diffsynth", "musubi"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
MERGE_METHODS = ("sum", "ties", "dare_ties", "dare_linear")
FILE_NAME = re.compile(r"[^\W_][\w .+-]{0,99}")
PLOTS = "plots"
MAX_LINE_BYTES = 2**22


@dataclass(frozen=True)
class Command:
    """A command, and the files that it writes."""

    arguments: list[str]
    output: Path | None = None
    """A LoRA, or peft's folder of one."""
    plot: Path | None = None

    def files(self) -> list[Path]:
        """Return the files of the output that exist."""
        if self.output is None:
            return []
        if self.output.is_dir():
            return sorted(path for path in self.output.iterdir() if path.is_file())
        return [self.output] if self.output.exists() else []


@dataclass
class Outcome:
    """The output of a command."""

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class ToolRun:
    """A command that runs, and can be stopped."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Outcome:
        """Run the command to its end; `progress` is called with (done, total)."""
        outcome = Outcome()
        program = [sys.executable, "-m", "zimage_train", "--json", "lora", *self.command.arguments]
        pipe = asyncio.subprocess.PIPE
        process = self._process = await asyncio.create_subprocess_exec(
            *program, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, limit=MAX_LINE_BYTES
        )
        assert process.stdout is not None and process.stderr is not None
        try:
            await asyncio.gather(
                *(_read(stream, outcome, progress) for stream in (process.stdout, process.stderr)), process.wait()
            )
        finally:
            self.stop()
        if process.returncode and not outcome.errors:
            outcome.errors.append(f"ended with exit code {process.returncode}")
        return outcome

    def stop(self) -> None:
        """End the command."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


async def _read(stream: asyncio.StreamReader, outcome: Outcome, progress: Callable[[int, int], None]) -> None:
    """Take the events of a stream until it ends; other output, such as a traceback, is a line."""
    async for line in stream:
        text = line.decode("utf-8", "replace").rstrip()
        event = _event(text)
        if event is None:
            outcome.lines.append(text)
        elif event["event"] == "progress":
            progress(event["done"], event["total"])
        elif event["event"] == "error":
            hint = f"; {event['todo']}" if event["todo"] else ""
            outcome.errors.append(f"{event['where']}: {event['found']}{hint}")
        else:
            outcome.lines.append(event.get("text", ""))


def _event(text: str) -> dict[str, Any] | None:
    try:
        event = parse_json(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


class LoraTools:
    """The commands on the files of a workspace; they write into one folder of it."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    @property
    def folder(self) -> Path:
        return self._workspace.runs / MADE

    def inspect(self, file: str) -> Command:
        path = self._input(file)
        plot = self._plot(path.stem)
        return Command(["inspect", str(path), "--plot", str(plot)], plot=plot)

    def verify(self, file: str, model: str = "") -> Command:
        return Command(["verify", str(self._input(file)), *(["--model", model] if model else [])])

    def convert(self, file: str, layout: str, name: str) -> Command:
        path, output = self._input(file), self._output(name, is_folder=layout == "peft")
        return Command(["convert", str(path), "--to", layout, "-o", str(output)], output)

    def resize(self, file: str, rank: int | None, energy: float, name: str) -> Command:
        """Return the command for `rank`, or for the rank of each module that keeps `energy` if that is None."""
        path, output = self._input(file), self._output(name)
        ranks = ["--rank", str(rank)] if rank is not None else ["--rank", "auto", "--energy", f"{energy:g}"]
        return Command(["resize", str(path), *ranks, "-o", str(output)], output)

    def merge(
        self,
        files: Sequence[tuple[str, float]],
        name: str,
        method: str = "sum",
        density: float | None = None,
        rank: int | None = None,
        normalize: bool = False,
    ) -> Command:
        """Return the command that merges (file, ratio)."""
        if not files:
            raise ConfigError(Problem("merge", "has no files", "add at least one", "missing-argument"))
        inputs = [f"{self._input(file)}={ratio:g}" for file, ratio in files]
        output = self._output(name)
        options = ["--method", method]
        if density is not None and method != "sum":
            options += ["--density", f"{density:g}"]
        if rank is not None:
            options += ["--rank", str(rank)]
        if normalize:
            options.append("--normalize")
        return Command(["merge", *inputs, *options, "-o", str(output)], output)

    def diff(self, file: str, other: str) -> Command:
        path, other_path = self._input(file), self._input(other)
        plot = self._plot(f"{path.stem} and {other_path.stem}")
        return Command(["diff", str(path), str(other_path), "--plot", str(plot)], plot=plot)

    def free_name(self, name: str) -> str:
        """Return `name`, or with a number after it the first that no file in the folder has."""
        cleaned = "".join(letter if re.fullmatch(r"[\w .+-]", letter) else "-" for letter in name).lstrip(" ._+-")[:80]
        free, number = cleaned or "lora", 1
        while (self.folder / f"{free}.safetensors").exists() or (self.folder / free).exists():
            number += 1
            free = f"{cleaned or 'lora'}-{number}"
        return free

    def place_of_upload(self, name: str) -> Path:
        """Return where a file that somebody uploads as `name` goes.

        Raises:
            ConfigError: it is no .safetensors.
        """
        given = PurePath(name.replace("\\", "/"))
        if given.suffix.lower() != ".safetensors":
            raise ConfigError(Problem(given.name, "is no .safetensors", "choose a LoRA file", "not-safetensors"))
        return self.folder / f"{self.free_name(given.stem)}.safetensors"

    def _input(self, file: str) -> Path:
        if not file:
            raise ConfigError(Problem("LoRA", "is missing", "choose a file", "missing-argument"))
        return self._workspace.contain(Path(file))

    def _output(self, name: str, is_folder: bool = False) -> Path:
        stem = name.strip().removesuffix(".safetensors")
        if not FILE_NAME.fullmatch(stem):
            hint = "take letters, digits, spaces and . + - _"
            raise ConfigError(Problem(f"name {name!r}", "is no name of a file", hint, "bad-argument"))
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / (stem if is_folder else f"{stem}.safetensors")

    def _plot(self, stem: str) -> Path:
        folder = self.folder / PLOTS
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{stem}.png"
