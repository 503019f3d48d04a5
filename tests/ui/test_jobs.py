"""The queue on disk, and the states of runs, with a real training of the miniature."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zimage_train.errors import ConfigError, DataError, FolderInUseError
from zimage_train.io import locks
from zimage_train.ui import run_state
from zimage_train.ui.jobs import TRASH, JobQueue
from zimage_train.ui.site import run_address
from zimage_train.ui.workspace import Workspace

from mini_config import mini_text

FAILED_SECONDS = 10

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def make_queue(tmp_path: Path) -> Iterator[Callable[[], JobQueue]]:
    """`make_queue()`: a queue of the same folder, whose processes have ended when the test has."""
    queues: list[JobQueue] = []

    def make() -> JobQueue:
        queues.append(JobQueue(Workspace(tmp_path / "runs", (tmp_path,)), []))
        return queues[-1]

    yield make
    for queue in queues:
        for process in queue._processes.values():
            process.wait(timeout=60)


@pytest.fixture
def queue(make_queue: Callable[[], JobQueue]) -> JobQueue:
    return make_queue()


def until(met: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def status(queue: JobQueue, name: str) -> str:
    queue.tick()
    return run_state.read_run(queue._workspace.run(name)).status


def steps(queue: JobQueue, name: str) -> int:
    return run_state.read_run(queue._workspace.run(name)).step


def test_waiting_jobs_are_on_disk(queue: JobQueue, tmp_path: Path):
    for name in ("a", "b", "c"):
        queue.add(name, mini_text(tmp_path, name))
    queue.move_up("c")
    queue.remove("a")
    again = JobQueue(queue._workspace, [])
    assert [job.name for job in again.waiting()] == ["c", "b"]
    again.add("b", mini_text(tmp_path, "b"))  # the same once more
    with pytest.raises(ConfigError, match="waits already with another config"):
        again.add("b", "name: b2\n")
    assert [job.name for job in again.waiting()] == ["c", "b"] and again.config_text("b") == mini_text(tmp_path, "b")
    assert again.is_taken("b") and not again.is_taken("a")
    with pytest.raises(DataError, match="has no config"):
        again.config_text("a")


def test_one_of_two_pages_starts_a_job(queue: JobQueue, make_queue: Callable[[], JobQueue], tmp_path: Path):
    """While another page has the queue, nothing is started; a damaged order loses no config."""
    queue.add("one", mini_text(tmp_path, "one"))
    with locks.lock_folder(tmp_path / "runs" / ".queue"):
        make_queue().tick()
        assert not (tmp_path / "runs" / "one").exists() and len(queue.waiting()) == 1
    (tmp_path / "runs" / ".queue" / "order.json").write_text("[1, {")
    assert queue.waiting() == [] and queue.config_text("one").startswith("name: one")


def test_names_fit_into_addresses():
    assert run_address("a b+1") == "/run/a%20b%2B1"


@pytest.mark.parametrize("name", ["..", "a/b", ".queue", "", "/etc", "a\\b", "a" * 200])
def test_names_stay_inside(queue: JobQueue, name: str):
    for act in (queue.remove, queue.delete, queue.stop, queue.config_text):
        with pytest.raises(ConfigError, match="is no name of a run"):
            act(name)


@pytest.mark.slow
def test_a_run_from_start_to_trash(queue: JobQueue, make_queue: Callable[[], JobQueue], tmp_path: Path):
    """A job is trained, stopped, continued by another queue, finished and thrown away."""
    queue.add("one", mini_text(tmp_path, "one", steps=400))
    queue.add("two", mini_text(tmp_path, "two", steps=2))
    assert status(queue, "one") == "starting"
    until(lambda: status(queue, "one") == "running" and steps(queue, "one") > 3)
    assert [job.name for job in queue.waiting()] == ["two"], "one at a time without GPUs"
    with pytest.raises(FolderInUseError, match="is training"):
        queue.delete("one")
    queue.stop("one")
    until(lambda: status(queue, "one") == "stopped")
    until(lambda: status(queue, "two") == "done")
    at = steps(queue, "one")
    assert 3 < at < 400
    other = make_queue()
    text = other.config_text("one").replace("steps: 400", f"steps: {at + 3}")
    other.add("one", text)
    until(lambda: status(other, "one") == "done")
    assert steps(other, "one") == at + 3
    moved = other.delete("one")
    assert moved.parent.name == TRASH and other.trash_bytes() > 1000 and not (tmp_path / "runs" / "one").exists()
    other.empty_trash()
    assert other.trash_bytes() == 0


@pytest.mark.slow
def test_a_killed_worker_has_failed(queue: JobQueue, tmp_path: Path):
    """Within seconds, with its last lines, and the lock of a dead process holds nothing."""
    queue.add("one", mini_text(tmp_path, "one", steps=4000))
    until(lambda: status(queue, "one") == "running" and steps(queue, "one") > 1)
    folder = tmp_path / "runs" / "one"
    os.kill(json.loads((folder / run_state.WORKER).read_text())["pid"], signal.SIGKILL)
    until(lambda: status(queue, "one") == "failed", FAILED_SECONDS)
    state = run_state.read_run(folder)
    lines = run_state.log_tail(folder, state.output)
    assert 3 < len(lines) <= run_state.LOG_LINES and any("matched 42/42" in line for line in lines)
    assert (folder / "run.holder").exists() and not locks.is_held(folder)


@pytest.mark.slow
def test_a_bad_config_has_failed(queue: JobQueue, tmp_path: Path):
    queue.add("one", mini_text(tmp_path, "one").replace("folder:", "foldr:"))
    until(lambda: status(queue, "one") == "failed")
    errors = run_state.read_run(tmp_path / "runs" / "one").output.errors
    assert errors[-1]["exit_code"] == 2 and "foldr" in run_state.text_of(errors[-1])
