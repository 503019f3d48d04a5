"""The queue of images to draw, and the one process that draws them (`sampling_worker`).

Images and their settings are kept in `.samples`, in the folder of the runs, so that a page that starts again shows
them.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from zimage_train.errors import DataError, Problem, ZImageTrainError
from zimage_train.io import atomic
from zimage_train.io.json_text import parse_json
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.sample_request import Drawing, SampleRequest, resolve
from zimage_train.ui.sampling_memory import sampling_slot
from zimage_train.ui.sampling_worker import DrawJob, problem_values
from zimage_train.ui.workspace import Workspace

SAMPLES, LOG = ".samples", "worker.log"
SAMPLE_ID = re.compile(r"\d{8}-\d{6}-\d{6}")
SampleStatus = Literal["waiting", "drawing", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")
LOG_LINES = 20
MAX_REMEMBERED = 200
"""How many failed or cancelled images are remembered; those that were drawn are on disk."""
CLOSE_SECONDS = 5.0


@dataclass
class Sample:
    """An image that was asked for, and how far it is."""

    id: str
    asked: SampleRequest
    drawing: Drawing
    status: SampleStatus = "waiting"
    phase: str = ""
    """The task of the worker: text, loading, drawing."""
    done: int = 0
    total: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    attempts: int = 0


class Sampler:
    """Draws images one after another.

    Args:
        queue: the trainings, beside which images are drawn.
    """

    def __init__(self, workspace: Workspace, queue: JobQueue) -> None:
        self._workspace, self._queue = workspace, queue
        self._lock = threading.RLock()
        self._samples: dict[str, Sample] = {}
        """Those of this page by id, the oldest first; a sample that is done is also on disk."""
        self._earlier: dict[str, Sample] = {}
        """Those of earlier pages that were read."""
        self._waiting: list[Sample] = []
        self._current: Sample | None = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._slot = ""
        """The GPU of the process."""

    @property
    def folder(self) -> Path:
        return self._workspace.runs / SAMPLES

    @property
    def slot(self) -> str:
        """The GPU that the next image is drawn on, "cpu" without one."""
        return self._slot if self._process is not None else sampling_slot(self._queue)

    def submit(self, asked: SampleRequest) -> Sample:
        """Put an image at the end of the queue.

        Raises:
            ZImageTrainError: a run or a LoRA does not exist, or is outside the folders of the page.
        """
        drawing = resolve(asked, self._workspace)
        atomic.require_writable_folder(self.folder)
        with self._lock:
            sample = Sample(self._new_id(), asked, drawing)
            self._samples[sample.id] = sample
            self._waiting.append(sample)
            self._forget()
            self._advance()
        return sample

    def get(self, sample_id: str) -> Sample:
        """Return an image of this page, or one that an earlier page has drawn.

        Raises:
            DataError: there is none.
        """
        with self._lock:
            sample = self._samples.get(sample_id)
        if sample is None and SAMPLE_ID.fullmatch(sample_id):
            sample = self._read_earlier(sample_id)
        if sample is None:
            raise DataError(Problem(f"sample {sample_id}", "does not exist", "ask for it again", "missing-file"))
        return sample

    def place(self, sample: Sample) -> int | None:
        """Return how many images are drawn before this one; None if it does not wait."""
        with self._lock:
            if sample not in self._waiting:
                return None
            return self._waiting.index(sample) + (self._current is not None)

    def active(self) -> list[Sample]:
        """Return the image that is drawn now and those that wait, in this order."""
        with self._lock:
            current = [self._current] if self._current is not None and self._current.status == "drawing" else []
            return [*current, *self._waiting]

    def finished(self, count: int) -> list[Sample]:
        """Return the last images, the newest first: those that are on disk, and those that have failed here."""
        with self._lock:
            recent = {sample.id: sample for sample in self._samples.values() if sample.status in ("done", "failed")}
        names = {path.stem for path in self.folder.glob("*.json") if SAMPLE_ID.fullmatch(path.stem)}
        last: list[Sample] = []
        for sample_id in sorted(names | set(recent), reverse=True)[:count]:
            sample = recent.get(sample_id) or self._read_earlier(sample_id)
            if sample is not None:
                last.append(sample)
        return last

    def _read_earlier(self, sample_id: str) -> Sample | None:
        sample = self._earlier.get(sample_id) or _read_sample(self.folder / f"{sample_id}.json")
        if sample is not None:
            self._earlier[sample_id] = sample
        return sample

    def image_path(self, sample: Sample, is_base: bool = False) -> Path:
        """Return where the image of a sample is, or will be; `is_base`: the one without LoRAs."""
        return self.folder / f"{sample.id}{'-base' if is_base else ''}.png"

    def cancel(self, sample_id: str) -> Sample:
        """Take an image out of the queue, or stop drawing it; one that has ended stays as it is.

        Raises:
            DataError: there is none.
        """
        sample = self.get(sample_id)
        with self._lock:
            if sample.status in FINISHED:
                return sample
            sample.status = "cancelled"
            if sample in self._waiting:
                self._waiting.remove(sample)
            else:
                self._write({"cancel": sample.id})
        return sample

    def remove(self, sample_id: str) -> None:
        """Delete the images of a sample that has ended, and forget it.

        Raises:
            DataError: there is none.
        """
        sample = self.get(sample_id)
        if sample.status not in FINISHED:
            self.cancel(sample_id)
            return
        with self._lock:
            for known in (self._samples, self._earlier):
                known.pop(sample_id, None)
        for path in (self.folder / f"{sample.id}.json", self.image_path(sample), self.image_path(sample, True)):
            atomic.remove(path)

    def tick(self) -> None:
        """Give back the memory of a GPU on which a run has begun to train, if no image is drawn there."""
        with self._lock:
            is_idle = self._process is not None and self._current is None
            if is_idle and self._slot != "cpu" and self._slot in self._queue.busy():
                self._close_process()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._waiting.clear()
            self._current = None
            self._close_process()
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.join(CLOSE_SECONDS)

    def _new_id(self) -> str:
        """Return the time as an id, by which samples are in their order."""
        while True:
            now = time.time_ns() // 1000
            sample_id = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now // 1_000_000))}-{now % 1_000_000:06d}"
            if sample_id not in self._samples:
                return sample_id

    def _advance(self) -> None:
        """Let the worker draw the next image if it draws none."""
        if self._current is None and self._waiting:
            self._current = self._waiting.pop(0)
            self._current.status = "drawing"
            self._send(self._current)

    def _send(self, sample: Sample) -> None:
        sample.attempts += 1
        if self._process is None or self._process.poll() is not None:
            self._start()
        job = DrawJob(
            id=sample.id,
            model=sample.drawing.settings,
            loras=sample.drawing.loras,
            request=sample.drawing.sampling,
            image=self.image_path(sample),
            base=self.image_path(sample, is_base=True) if sample.asked.base else None,
            is_beside_run=self._slot != "cpu" and self._slot in self._queue.busy(),
        )
        self._write(job.to_values())

    def _write(self, values: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.write(json.dumps(values) + "\n")
            process.stdin.flush()
        except (OSError, ValueError):
            return  # it has just ended, which `_read` will find

    def _start(self) -> None:
        self._slot = sampling_slot(self._queue)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self._slot != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = self._slot
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "zimage_train.ui.sampling_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                encoding="utf-8",
                start_new_session=True,
            )
        assert process.stdout is not None
        self._process = process
        self._reader = threading.Thread(target=self._read, args=(process, process.stdout), name="sampler", daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str], output: IO[str]) -> None:
        """Take the events of a process until it ends."""
        with output:
            for line in output:
                with self._lock:
                    self._take(parse_json(line))
        code = process.wait()
        if process.stdin is not None:
            process.stdin.close()
        with self._lock:
            if self._process is process:
                self._process = None
                self._lose(code)

    def _take(self, event: dict[str, Any]) -> None:
        sample = self._current
        if sample is None or event["id"] != sample.id:
            return
        if event["event"] == "progress":
            sample.phase, sample.done, sample.total = event["phase"], event["done"], event["total"]
            return
        if sample.status == "drawing":
            sample.status = event["event"]
            sample.problems = event.get("problems", [])
        if sample.status == "done":
            self._record(sample)
        elif event["event"] == "done":  # cancelled when it was all but drawn
            atomic.remove(self.image_path(sample))
            atomic.remove(self.image_path(sample, is_base=True))
        self._current = None
        self._advance()

    def _lose(self, code: int) -> None:
        """Take note that the process has ended."""
        sample, self._current = self._current, None
        if sample is not None and sample.status == "drawing":
            if code == 0 and not sample.phase and sample.attempts < 2:
                # It had been idle for so long that it ended as the job came.
                self._waiting.insert(0, sample)
            else:
                sample.status = "failed"
                what = f"the process that draws has ended (exit code {code})"
                sample.problems = [problem_values(Problem("sampling", what, self._log_tail(), "worker-lost"))]
        self._advance()

    def _log_tail(self) -> str:
        try:
            lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LOG_LINES:])

    def _record(self, sample: Sample) -> None:
        values = {"asked": sample.asked.model_dump(mode="json"), "drawing": sample.drawing.model_dump(mode="json")}
        try:
            atomic.write_json(self.folder / f"{sample.id}.json", values)
        except ZImageTrainError as error:
            sample.problems = [problem_values(problem) for problem in error.problems]

    def _forget(self) -> None:
        ended = [sample.id for sample in self._samples.values() if sample.status in FINISHED]
        for sample_id in ended[:-MAX_REMEMBERED]:
            del self._samples[sample_id]

    def _close_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _read_sample(path: Path) -> Sample | None:
    """Return a sample that is on disk, or None if its file cannot be read."""
    try:
        values = parse_json(path.read_bytes())
        asked = SampleRequest.model_validate(values["asked"])
        return Sample(path.stem, asked, Drawing.model_validate(values["drawing"]), status="done")
    except (OSError, ValueError, KeyError, TypeError):
        return None
