"""Stopping on signals: the first signal asks to save and stop, the same signal again ends the process at once.

Launchers complicate this. Some forward a signal that the terminal has sent to the process already, so the same signal
within `ECHO_SECONDS` counts once. `accelerate launch` forwards nothing to its single child and dies, so the child asks
the kernel for SIGTERM when its parent dies. After Ctrl-C that is a different signal, so it does not count as a repeat.
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
"""The same signal within this time is an echo of the first, not a second request."""
BEFORE_TRAINING = "before training began"
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables that accelerate and torchrun set for the processes that they start."""


class StopRequest:
    """Records whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.since = 0.0

    def take(self, number: int) -> bool:
        """Record the signal `number`; return whether it is the second request, upon which the process ends at once."""
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self.since = number, now
            return False
        return number == self.signal_number and now - self.since > ECHO_SECONDS

    def check(self) -> None:
        """Raise if a stop was requested. For work that has no state to save, such as filling a cache.

        Raises:
            Stopped: a stop was requested.
        """
        if self.signal_number is not None:
            raise self.error(BEFORE_TRAINING)

    def error(self, when: str) -> Stopped:
        """Return the error for the signal that was received; `when` completes its message."""
        number = self.signal_number or int(signal.SIGTERM)
        name = signal.Signals(number).name
        return Stopped(number, Problem(f"stopped by {name}", when, "the same command continues", "stopped"))


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record stop signals in the request that the block gets, and restore the earlier handlers after it."""
    request = StopRequest()
    # Python installs signal handlers in the main thread alone.
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
