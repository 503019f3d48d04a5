"""Where the time of a start goes, by the stages that the forecast predicts."""

import contextlib
import time
from collections.abc import Iterator

from zimage_train.planning.run_times import STAGES, Stage


class StageClock:
    """Adds up the seconds of each stage; it begins with the checks. A stage within another is not counted twice."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._stage: Stage = "checks"
        self._since = time.monotonic()

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Count the time of the block as that of `name`."""
        outer = self._stage
        self._change_to(name)
        try:
            yield
        finally:
            self._change_to(outer)

    def seconds(self) -> dict[Stage, float]:
        """Return the seconds of each stage up to now."""
        self._change_to(self._stage)
        return dict(self._seconds)

    def _change_to(self, stage: Stage) -> None:
        now = time.monotonic()
        self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
