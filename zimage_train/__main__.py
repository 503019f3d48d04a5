"""`zimage-train`, `python -m zimage_train` and `accelerate launch -m zimage_train`: all of them begin here.

A Ctrl-C while modules are imported, which takes seconds, would show tracebacks of whatever was half imported; nothing
is begun then that could be lost.
"""

import logging
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    # For `accelerator.reproducible`: cuBLAS reads it at the first product of the process, which may come before that.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a kernel that nobody misses
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, interrupt)
    from zimage_train.cli import app

    app.main()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Leave at once from within an import; else as usual.

    Raises:
        KeyboardInterrupt: nothing is being imported.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\nstopped\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
