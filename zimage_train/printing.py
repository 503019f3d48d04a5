"""What commands are there to print."""

import os
import sys

from zimage_train.errors import DiskError, Problem


def silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_lines(lines: list[str]) -> None:
    """Print what a command is there to print; who closes the pipe has seen enough.

    Raises:
        DiskError: it can be written nowhere.
    """
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        silence()
        if not isinstance(error, BrokenPipeError):
            raise DiskError(Problem("standard output", f"cannot be written ({error.strerror})")) from error
