"""Serves the page for a browser test: `images_server.py WORKSPACE PORT`, with the captioner of `fake_captioner.py`."""

import sys
from pathlib import Path

from zimage_train.ui import caption_job, server

if __name__ == "__main__":
    workspace, port = Path(sys.argv[1]), int(sys.argv[2])
    caption_job.PROGRAM[:] = [sys.executable, str(Path(__file__).with_name("fake_captioner.py"))]
    server.serve(workspace / "runs", [workspace], "127.0.0.1", port, opens_browser=False)
