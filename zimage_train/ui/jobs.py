"""The queue: jobs that wait for a GPU, and the processes that train them.

All of it is on disk, in the folder of the runs, so that a page that starts again finds it as it was. A waiting job is
`.queue/NAME.yaml`, and `.queue/order.json` says which comes first. A started job is `NAME/job.yaml`; its process is
`zimage-train --json train NAME/job.yaml`, in a session of its own, so that it goes on when the page ends. `worker.json`
names the process and `worker.jsonl` has its output.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from zimage_train.config import strict_yaml
from zimage_train.config.strict_yaml import YamlError
from zimage_train.errors import ConfigError, DataError, FolderInUseError, Problem
from zimage_train.io import atomic, locks
from zimage_train.io.operating_system import process_start
from zimage_train.training import requests
from zimage_train.training.requests import RequestName
from zimage_train.training.run_dir import RunDir
from zimage_train.ui import run_state
from zimage_train.ui.workspace import RUN_NAME, Workspace

QUEUE, TRASH = ".queue", ".trash"


@dataclass(frozen=True)
class WaitingJob:
    """A job that waits for a GPU."""

    name: str
    gpu: str | None
    """Index of the GPU that it waits for, None for the first that is free."""


class JobQueue:
    """The queue of a workspace.

    Args:
        gpus: indices of the GPUs, such as ["0", "1"]; empty for a machine without, which trains one job at a time.
    """

    def __init__(self, workspace: Workspace, gpus: list[str]) -> None:
        self._workspace = workspace
        self.slots = gpus or ["cpu"]
        self._lock = threading.RLock()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def _folder(self) -> Path:
        return self._workspace.runs / QUEUE

    def waiting(self) -> list[WaitingJob]:
        """Return the waiting jobs in their order."""
        jobs: list[WaitingJob] = []
        for name, gpu in run_state.read_json(self._folder / "order.json").items():
            if RUN_NAME.fullmatch(name) and (self._folder / f"{name}.yaml").exists():
                jobs.append(WaitingJob(name, gpu))
        return jobs

    def add(self, name: str, text: str, gpu: str | None = None) -> None:
        """Put a job with the config `text` at the end of the queue.

        Raises:
            ConfigError: `name` is no name of a run, or another job of this name waits.
            FolderInUseError: the run is training.
            DiskError: it cannot be written.
        """
        folder = self._workspace.run(name)
        with self._lock:
            _require_free(folder)
            waiting = [job.name for job in self.waiting()]
            if name in waiting and (self._folder / f"{name}.yaml").read_text(encoding="utf-8") != text:
                hint = "choose another name, or take the other job out of the queue"
                raise ConfigError(Problem(f"run {name}", "waits already with another config", hint, "job-waits"))
            atomic.write_text(self._folder / f"{name}.yaml", text)
            others = [job for job in self.waiting() if job.name != name]
            self._write_order([*others, WaitingJob(name, gpu)])

    def remove(self, name: str) -> None:
        """Take a waiting job out of the queue."""
        with self._lock:
            self._write_order([job for job in self.waiting() if job.name != name])
            atomic.remove(self._folder / f"{self._workspace.run(name).name}.yaml")

    def move_up(self, name: str) -> None:
        """Let a waiting job change places with the job before it."""
        with self._lock:
            jobs = self.waiting()
            index = next((number for number, job in enumerate(jobs) if job.name == name), 0)
            if index > 0:
                jobs[index - 1], jobs[index] = jobs[index], jobs[index - 1]
                self._write_order(jobs)

    def resume(self, name: str, gpu: str | None = None) -> None:
        """Queue a run again with the config that it had; it continues from its last checkpoint.

        Raises:
            DataError: the folder has no config.
            FolderInUseError: the run is training.
        """
        self.add(name, self.config_text(name), gpu)

    def config_text(self, name: str) -> str:
        """Return the config of a job or run: as it was written, or else with every setting, as a run has it.

        Raises:
            DataError: there is none.
        """
        folder = self._workspace.run(name)
        for path in (self._folder / f"{name}.yaml", folder / "job.yaml", folder / "config.yaml"):
            if path.exists():
                return path.read_text(encoding="utf-8")
        raise DataError(Problem(str(folder), "has no config", "choose another run", "missing-file"))

    def is_taken(self, name: str) -> bool:
        """Return whether there is a run or a waiting job of this name."""
        return (self._workspace.runs / name).exists() or any(job.name == name for job in self.waiting())

    def has_job(self, name: str) -> bool:
        """Return whether the config of a run is there as it was written, with comments."""
        return (self._workspace.run(name) / "job.yaml").exists() or (self._folder / f"{name}.yaml").exists()

    def stop(self, name: str) -> None:
        """Ask a run to save and stop; one that waits is taken out of the queue.

        Raises:
            DataError: the run is not training.
        """
        folder = self._workspace.run(name)
        if any(job.name == name for job in self.waiting()):
            self.remove(name)
            return
        process_id = locks.holder_process(folder) or self._worker_process(folder)
        if process_id is None:
            raise DataError(Problem(name, "is not training on this machine", "look at its log", "not-running"))
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process_id, signal.SIGTERM)

    def ask(self, name: str, request: RequestName) -> None:
        """Ask a run to save, or to draw its previews, after the step under way.

        Raises:
            DataError: the run is not training.
        """
        folder = self._workspace.run(name)
        if not locks.is_held(folder):
            raise DataError(Problem(name, "is not training", "look at its log", "not-running"))
        requests.ask(RunDir(folder, name), request)

    def delete(self, name: str) -> Path:
        """Move a run to the trash; return where it is now.

        Raises:
            FolderInUseError: the run is training.
            DiskError: it cannot be moved.
        """
        folder = self._workspace.run(name)
        with self._lock:
            self.remove(name)
            _require_free(folder)
            if not folder.exists():
                raise DataError(Problem(name, "is no run", "reload the page", "missing-file"))
            return atomic.move(folder, self._workspace.runs / TRASH / name)

    def trash_bytes(self) -> int:
        """Return the size of the trash."""
        return sum(path.stat().st_size for path in (self._workspace.runs / TRASH).rglob("*") if path.is_file())

    def empty_trash(self) -> None:
        """Delete the content of the trash for good."""
        atomic.remove_folder(self._workspace.runs / TRASH)

    def tick(self) -> None:
        """Start waiting jobs on GPUs that are free, and take note of processes that have ended."""
        with self._lock:
            for name, process in list(self._processes.items()):
                if process.poll() is not None:
                    del self._processes[name]
            if self.waiting():
                # Another page may serve the same runs: one of them starts a job.
                with contextlib.suppress(FolderInUseError), locks.lock_folder(self._folder):
                    self._start_on_free()

    def _start_on_free(self) -> None:
        busy = self.busy()
        for job in self.waiting():
            free = [slot for slot in self.slots if slot not in busy and job.gpu in (None, slot)]
            if free:
                self._start(job.name, free[0])
                busy[free[0]] = job.name

    def busy(self) -> dict[str, str]:
        """Return GPU -> the run that trains on it; a run from elsewhere counts on the first."""
        found: dict[str, str] = {}
        for state in run_state.list_runs(self._workspace.runs):
            if state.status in ("running", "starting"):
                gpu = run_state.read_json(state.folder / run_state.WORKER).get("gpu")
                found[gpu if gpu in self.slots else self.slots[0]] = state.name
        return found

    def _start(self, name: str, gpu: str) -> None:
        folder, waiting = self._workspace.run(name), self._folder / f"{name}.yaml"
        atomic.write_text(folder / "job.yaml", waiting.read_text(encoding="utf-8"))
        self.remove(name)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if gpu != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "zimage_train", "--json", "train", str(folder / "job.yaml")]
        with (folder / run_state.WORKER_LOG).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._processes[name] = process
        facts = {"pid": process.pid, "began": process_start(process.pid), "gpu": gpu}
        atomic.write_json(folder / run_state.WORKER, facts)

    def _worker_process(self, folder: Path) -> int | None:
        worker = run_state.read_json(folder / run_state.WORKER)
        return worker["pid"] if run_state.is_alive(worker) else None

    def _write_order(self, jobs: list[WaitingJob]) -> None:
        atomic.write_json(self._folder / "order.json", {job.name: job.gpu for job in jobs})


def _require_free(folder: Path) -> None:
    if folder.exists() and run_state.read_run(folder).status in ("running", "starting"):
        raise FolderInUseError(Problem(str(folder), "is training", "stop it first", "folder-in-use"))


def name_in(text: str) -> str:
    """Return the `name` of a config; ConfigError if it has none."""
    try:
        values = strict_yaml.parse(text).value
    except YamlError as error:
        raise ConfigError(Problem("the config", "is no YAML", error.message, "bad-yaml")) from None
    name = values.get("name") if isinstance(values, dict) else None
    if not isinstance(name, str):
        raise ConfigError(Problem("name", "is missing", "give the run a name", "missing-setting"))
    return name
