"""What is asked of a GPU, as far as a machine without a GPU can tell."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from zimage_train.commands import train
from zimage_train.planning import devices
from zimage_train.training import loop


def test_gpu_sums_are_deterministic():
    """On a GPU, sums have a fixed order until the block ends."""
    with pytest.raises(KeyError), devices.reproducible(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with warnings alone attention stays as it is
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with devices.reproducible(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_rehearsal_and_loop_are_within_it(make_config, monkeypatch):
    inside: list[str] = []
    active: torch.device | None = None

    @contextlib.contextmanager
    def watched(device: torch.device):
        nonlocal active
        active = device
        yield
        active = None

    def watch(name: str, real):
        def run(*args):
            assert active == torch.device("cpu"), name
            inside.append(name)
            return real(*args)

        return run

    monkeypatch.setattr(devices, "reproducible", watched)
    monkeypatch.setattr(train, "dry_run", watch("dry_run", train.dry_run))
    monkeypatch.setattr(loop, "train", watch("train", loop.train))
    train.run_training(make_config(train={"steps": 1}), fresh=False)
    assert inside == ["dry_run", "train"] and active is None

    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(devices, "reproducible", asked.append)
    train.run_training(make_config(name="free", train={"steps": 1, "reproducible": False}), fresh=False)
    assert asked == []


def test_cublas_is_configured_at_start():
    """The program asks cuBLAS for a fixed order before anything is multiplied."""
    code = (
        "import atexit, os, sys; sys.argv = ['zimage-train', '--help']; from zimage_train.__main__ import main;"
        "atexit.register(lambda: print('asked', os.environ.get('CUBLAS_WORKSPACE_CONFIG'))); main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "asked :4096:8"
