"""A group of commands that ends as programs do that a signal ended, when one of its questions or commands is."""

import contextlib
import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup


class Interruptible(TyperGroup):
    """Ctrl-C and Ctrl-D exit with 130 and without a traceback, wherever no command sees to it itself."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError, typer.Abort):
            with contextlib.suppress(OSError, AttributeError):  # nobody has to listen
                print("\nstopped", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None
