"""The Triton kernels without a GPU: by the interpreter against their plain regions, and compiled for five of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_train.models import region_ops

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(script: str, *words: str, **environment: str) -> list[str]:
    path = ROOT / "tests" / "support" / script
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, str(path), *words], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_kernels_equal_plain_regions():
    """Every kernel gives what its plain region gives, in fp32 and bf16, at odd sizes, with and without modulation."""
    assert run("interpreted_regions.py") == [f"500 comparisons of {len(region_ops.NAMES)} regions"]


def test_a_wrong_kernel_is_noticed():
    *differing, _ = run("interpreted_regions.py", "--fault")
    assert len(differing) == 100


def test_kernels_compile(tmp_path: Path):
    """Every kernel compiles for GPUs from the A100 to the 50 series."""
    lines = [line.split() for line in run("compiled_regions.py", TRITON_CACHE_DIR=str(tmp_path))]
    assert {words[0] for words in lines} == {"80", "86", "89", "90", "120"}
    assert len(lines) == 5 * (2 + 2 + 4 + 4 + 1 + 1 + 1 + 1 + 1 + 1) + 3 and all(
        int(words[-1]) > 1000 for words in lines
    )
