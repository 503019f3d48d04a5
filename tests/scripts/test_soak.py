"""The soak: two minutes of runs that are killed, damaged and cut off from their disk."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"
MINUTES = "2"


@pytest.mark.slow
def test_two_minutes_of_soak():
    """Kills come in every stage, disks fail and bits flip, and every LoRA ends with the bytes of an undisturbed run."""
    command = [sys.executable, str(SOAK), "--minutes", MINUTES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    killed, happened, ended = done.stdout.splitlines()[-3:]
    assert len(re.findall(r"[a-z]+ [1-9]\d*", killed)) == 9, killed
    assert all(fault in happened for fault in ("a flipped bit", "a full disk", "a failing disk")), happened
    assert int(re.search(r"complete (\d+)", ended)[1]) >= 3, ended
