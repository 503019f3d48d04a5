"""The entry point of `zimage-train`, `python -m zimage_train` and `accelerate launch -m zimage_train`.

Imports take seconds. A Ctrl-C within an import would print the traceback of that import, and perhaps be swallowed by
it, so the process then ends at once: no work has begun that could be lost.
"""

import logging
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    # `planning.devices.reproducible` needs it, and cuBLAS reads it only once, at the first matrix product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # warns of an optional kernel
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored under nohup, and stays so
        signal.signal(signal.SIGINT, interrupt)
    from zimage_train.cli import app

    app.main()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: end the process at once if a module is being imported, else raise.

    Raises:
        KeyboardInterrupt: no module is being imported.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\nstopped\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
