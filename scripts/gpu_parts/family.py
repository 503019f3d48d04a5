"""The miniature's family, made on a GPU: does every stage run there, and how long does it take."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "make_miniature.py"


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Make the family with little effort in a process of its own; return its seconds and the stages it made."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        words = ["--work", f"{place}/work", "--output", f"{place}/family", "--effort", case.removeprefix("effort ")]
        command = [sys.executable, str(SCRIPT), *words, *(["--device", "cpu"] if dry else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        made = sorted(path.name for path in Path(place, "work").iterdir())
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-600:]}")
    stages = re.findall(r"^(\S+): made in (\d+) s", done.stdout, re.MULTILINE)
    return {"seconds": round(time.monotonic() - began, 1), "made": made, "stage_seconds": dict(stages)}
