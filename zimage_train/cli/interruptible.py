"""A group of commands that exits with 130, as after SIGINT, when a command or a question is interrupted."""

import contextlib
import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup


class Interruptible(TyperGroup):
    """Exits with 130 and without a traceback on Ctrl-C and Ctrl-D, unless a command handles them itself."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError, typer.Abort):
            with contextlib.suppress(OSError, AttributeError):  # stderr may be closed
                print("\nstopped", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None
