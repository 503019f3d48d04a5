"""Stopping in good order: the first signal is a request, the second one is obeyed at once.

Launchers stand in between. Some pass a signal on to a process that the terminal has told already, so the same signal
within `ECHO_SECONDS` is the same request. `accelerate launch` tells its single child nothing and dies, so the child
asks the kernel to be told of that; and being told so is no second request either, since the signal is another one.
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
"""Variables by which a process knows that accelerate or torchrun started it."""


class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.since = 0.0

    def take(self, number: int) -> bool:
        """Note a signal; return whether it is the second of its kind, and so not a request any more."""
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self.since = number, now
            return False
        return number == self.signal_number and now - self.since > ECHO_SECONDS

    def check(self) -> None:
        """Leave what has no state to save, such as filling a cache.

        Raises:
            Stopped: a stop was requested.
        """
        if self.signal_number is not None:
            raise self.error("before training began")

    def error(self, when: str) -> Stopped:
        """The exit that the signal asks for."""
        number = self.signal_number or int(signal.SIGTERM)
        name = signal.Signals(number).name
        return Stopped(number, Problem(f"stopped by {name}", when, "the same command continues"))


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request within the block; handlers are put back after it."""
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
