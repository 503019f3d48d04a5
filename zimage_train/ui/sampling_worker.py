"""The process that draws the images of the page: `python -m zimage_train.ui.sampling_worker`.

It reads a JSON object per line from stdin: a job (see `DrawJob`), or `{"cancel": ID}`. It writes JSON objects to
stdout, each with the `id` of the job and an `event`: `progress` (phase: text, loading, drawing; done, total), and at
the end `done`, `cancelled` or `failed` (problems). Output of libraries goes to stderr. The model stays loaded until a
job needs another one. The process ends when stdin is closed, or after `IDLE_SECONDS` without a job.
"""

import json
import os
import queue
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import Problem, ZImageTrainError

IDLE_SECONDS = 600.0


@dataclass(frozen=True)
class DrawJob:
    """An image to draw, with everything that determines it."""

    id: str
    model: ModelSettings
    loras: list[tuple[str, float]]
    """(file, weight), in the order in which their changes are added."""
    request: SamplingRequest
    image: Path
    base: Path | None
    """Where the image without LoRAs goes; None draws none."""
    is_beside_run: bool
    """Whether a run trains on the same device, so that only what is free of its memory may be used."""

    def to_values(self) -> dict[str, Any]:
        """Return the job as values for JSON."""
        paths = {"image": str(self.image), "base": None if self.base is None else str(self.base)}
        return {
            "id": self.id,
            "model": self.model.model_dump(mode="json"),
            "loras": self.loras,
            "request": asdict(self.request),
            "is_beside_run": self.is_beside_run,
            **paths,
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "DrawJob":
        """Return the job that `to_values` has given."""
        return cls(
            id=values["id"],
            model=ModelSettings.model_validate(values["model"]),
            loras=[(file, weight) for file, weight in values["loras"]],
            request=SamplingRequest.from_json(json.dumps(values["request"])),
            image=Path(values["image"]),
            base=None if values["base"] is None else Path(values["base"]),
            is_beside_run=values["is_beside_run"],
        )


class Cancelled(Exception):
    """The page has cancelled the job that is being drawn."""


def problems_of(error: BaseException) -> list[dict[str, str]]:
    """Return an error as problems for JSON; any other exception is named with its type and place."""
    if isinstance(error, ZImageTrainError):
        return [problem_values(problem) for problem in error.problems]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return [problem_values(Problem("sampling", found, "worker.log in the folder .samples has all of it", "bug"))]


def problem_values(problem: Problem) -> dict[str, str]:
    return {
        "where": str(problem.location),
        "found": problem.message,
        "todo": problem.hint,
        "code": problem.code,
    }


class Worker:
    """Reads jobs in a thread, and draws them one after another in the main thread."""

    def __init__(self, source: IO[str], sink: IO[str]) -> None:
        from zimage_train.commands.image_renderer import ImageRenderer  # loads torch, for which the page must not wait

        self._source, self._sink = source, sink
        self._jobs: queue.Queue[DrawJob] = queue.Queue()
        self._cancelled: set[str] = set()
        self._writing = threading.Lock()
        """Held while an image is written, so that the end of the page never leaves half a file."""
        self._renderer = ImageRenderer(self._writing)

    def run(self) -> None:
        """Work until stdin is closed or no job has come for long."""
        threading.Thread(target=self._read, name="stdin", daemon=True).start()
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                return
            self._send(job.id, **self._work(job))

    def _read(self) -> None:
        for line in self._source:
            values = json.loads(line)
            if "cancel" in values:
                self._cancelled.add(values["cancel"])
            else:
                self._jobs.put(DrawJob.from_values(values))
        with self._writing:
            os._exit(0)  # whoever asked is gone, and loading a model cannot be interrupted otherwise

    def _work(self, job: DrawJob) -> dict[str, Any]:
        """Draw a job; return the event of its end."""

        def report(phase: str, done: int, total: int) -> None:
            if job.id in self._cancelled:
                raise Cancelled
            self._send(job.id, event="progress", phase=phase, done=done, total=total)

        try:
            outputs = (job.image, job.base)
            self._renderer.draw(job.model, job.loras, job.request, outputs, report, job.is_beside_run)
        except Cancelled:
            return {"event": "cancelled"}
        except Exception as error:  # noqa: BLE001  the page shows it, and the next job may succeed
            traceback.print_exc()
            return {"event": "failed", "problems": problems_of(error)}
        return {"event": "done"}

    def _send(self, job_id: str, **event: Any) -> None:
        self._sink.write(json.dumps({"id": job_id, **event}) + "\n")
        self._sink.flush()


def main() -> None:
    """Work on jobs from stdin; stdout is kept for events, and output of libraries goes to stderr."""
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Worker(os.fdopen(os.dup(0), encoding="utf-8"), sink).run()


if __name__ == "__main__":
    main()
