"""Stopping in good order: the first signal is a request, the second one is obeyed at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from zimage_train.errors import Problem, Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

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
    """Turn SIGINT, SIGTERM and SIGHUP into a request within the block; handlers are put back after it."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal_number = number

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
