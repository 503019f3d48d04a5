"""Types of the callbacks that report progress (torch-free)."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(task, done, total)`, such as `Console.progress`."""
StepProgress = Callable[[int, int], None]
"""Called as `progress(done, total)` where the caller knows the name of the task."""


def no_progress(task: str, done: int, total: int) -> None:
    """Report nothing."""
