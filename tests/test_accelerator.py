"""What is asked of a GPU, as far as a machine without one can tell."""

import contextlib

import pytest
import torch

from zimage_train import accelerator
from zimage_train.app import train as app


def test_on_a_gpu_sums_have_one_order_until_the_block_ends():
    with pytest.raises(KeyError), accelerator.reproducible(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with warnings alone attention stays as it is
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with accelerator.reproducible(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_rehearsal_and_loop_are_within_it(make_config, monkeypatch):
    inside: list[str] = []
    active = False

    @contextlib.contextmanager
    def watched(device: torch.device):
        nonlocal active
        active = True
        yield
        active = False

    def watch(name: str):
        real = getattr(app, name)

        def run(*args):
            assert active, name
            inside.append(name)
            return real(*args)

        return run

    monkeypatch.setattr(accelerator, "reproducible", watched)
    for name in ("rehearse", "run_loop"):
        monkeypatch.setattr(app, name, watch(name))
    app.train(make_config(train={"steps": 1}), fresh=False)
    assert inside == ["rehearse", "run_loop"] and not active
