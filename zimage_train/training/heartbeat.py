"""Heartbeats between the processes of a run: all of them end if one has been silent for too long.

A process that ends closes its connections, which the others notice at once. A machine that loses its power or its
network closes nothing, and the others would wait for the sum of gradients as long as a preview may take: for hours.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from zimage_train.errors import Problem, WorkerLostError
from zimage_train.training.distributed import World

BEAT_SECONDS = 5.0
LOST_SECONDS = 120.0
"""Silence after which a process counts as lost."""
STORE_SECONDS = 30.0
"""Longest time to wait for a store to connect, or to take the last beat."""
DONE = "done"


@contextlib.contextmanager
def watch_processes(world: World, run: str) -> Iterator[None]:
    """Within the block, end this process with the code of `WorkerLostError` if another one falls silent.

    All processes must enter the block, each as often as the others, with the same `run`.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    beats, leaving = Beats(_store, run, world.rank, world.world_size), threading.Event()

    def talk() -> None:
        while not leaving.wait(BEAT_SECONDS):
            beats.exchange(str(time.monotonic_ns()))
        beats.exchange(DONE)

    def listen() -> None:
        # In a thread of its own: an answer of a machine that has vanished may be waited for without end.
        before = time.monotonic()
        while not leaving.wait(BEAT_SECONDS):
            before, passed = time.monotonic(), time.monotonic() - before
            beats.wait(passed)
            if silent := beats.silent():
                _end(silent)

    threads = [threading.Thread(target=work, name="heartbeat", daemon=True) for work in (talk, listen)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leaving.set()
        for thread in threads:
            thread.join(STORE_SECONDS)


class Beats:
    """Beats of the other processes, through the store by which all found each other."""

    def __init__(self, connect: Callable[[], TCPStore], run: str, rank: int, world_size: int) -> None:
        self._connect, self._store = connect, None
        self._own_key = f"zimage-train/{run}/{rank}"
        self._keys = {other: f"zimage-train/{run}/{other}" for other in range(world_size) if other != rank}
        self._last_beats: dict[int, str] = {}
        self._silence = dict.fromkeys(self._keys, 0.0)

    def wait(self, seconds: float) -> None:
        """Let time pass in which nothing was heard.

        A process that was suspended itself, as by Ctrl-Z, has not listened, so little of that time counts.
        """
        for rank in self._silence:
            self._silence[rank] += min(seconds, 2 * BEAT_SECONDS)

    def exchange(self, beat: str) -> None:
        """Write the beat of this process and read those of the others; a store that does not answer is silence."""
        try:
            if self._store is None:
                self._store = self._connect()
            self._store.set(self._own_key, beat)
            for rank, key in self._keys.items():
                if self._store.check([key]):
                    self._hear(rank, self._store.get(key).decode())
        except RuntimeError:  # every error of a store is one
            self._store = None

    def silent(self) -> list[int]:
        """Return the processes that have begun, have not said that they are done, and are silent for too long."""
        return [
            rank for rank, beat in list(self._last_beats.items()) if beat != DONE and self._silence[rank] > LOST_SECONDS
        ]

    def _hear(self, rank: int, beat: str) -> None:
        if self._last_beats.get(rank) != beat:
            self._last_beats[rank] = beat
            self._silence[rank] = 0.0


def _store() -> TCPStore:
    """Connect to the store of torchrun or of the first process, at the address that each process is given."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))


def _end(silent: list[int]) -> None:
    """End this process, whose main thread waits within a collective that cannot be interrupted."""
    what = f"nothing was heard of process {', '.join(map(str, silent))} for {LOST_SECONDS:.0f} s"
    todo = "its machine or the network may be down; the same command continues from the last checkpoint"
    print(Problem("launch", what, todo, "worker-lost"), file=sys.stderr, flush=True)
    os._exit(WorkerLostError.exit_code)
