"""Stopping on signals: the first one asks to save and stop, the second one ends the process at once.

Launchers complicate this. Some forward a signal that the terminal has sent to the process already, so the same signal
within `ECHO_SECONDS` counts once. `accelerate launch` forwards nothing to its single child and dies, so the child asks
the kernel for a signal when its parent dies; that one is another signal, so it does not count as the second either.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from zimage_train.errors import Problem, Stopped
from zimage_train.io import operating_system

SIGNALS = operating_system.stop_signals()

ECHO_SECONDS = 0.5
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables that accelerate and torchrun set for the processes that they start."""


class StopRequest:
    """Records whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.since = 0.0

    def take(self, number: int) -> bool:
        """Record a signal; return whether it repeats the first one, so that the process has to end at once."""
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self.since = number, now
            return False
        return number == self.signal_number and now - self.since > ECHO_SECONDS

    def check(self) -> None:
        """Stop work that has no state to save, such as filling a cache.

        Raises:
            Stopped: a stop was requested.
        """
        if self.signal_number is not None:
            raise self.error("before training began")

    def error(self, when: str) -> Stopped:
        """Return the error that ends the process as the signal asked."""
        number = self.signal_number or int(signal.SIGTERM)
        name = signal.Signals(number).name
        return Stopped(number, Problem(f"stopped by {name}", when, "the same command continues", "stopped"))


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request within the block, and restore the handlers after it."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.take(number):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if any(name in os.environ for name in LAUNCHERS):
        operating_system.signal_when_parent_dies(signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
