"""Shapes in signatures are checked while the tests run; here, that they are."""

import inspect
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from zimage_train.diffusion import flow
from zimage_train.lora.deltas import Factors
from zimage_train.training.batches import Batch

from typecheck import MODULES

IMAGES = torch.zeros(2, 16, 8, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: flow.interpolate(IMAGES, IMAGES, torch.zeros(3)),
        lambda: flow.interpolate(IMAGES, IMAGES[:1], torch.zeros(2)),
        lambda: flow.interpolate(IMAGES, IMAGES, torch.zeros(2, 1)),
        lambda: flow.target_velocity(IMAGES, IMAGES.int()),
        lambda: Factors(torch.zeros(4, 8), torch.zeros(8, 3), 1.0).delta(),
        lambda: Batch(IMAGES, IMAGES, torch.zeros(2), torch.zeros(2), [torch.zeros(7)]),
    ],
)
def test_a_wrong_shape_or_kind_is_noticed(wrong):
    with pytest.raises(TypeCheckError):
        wrong()


@pytest.mark.parametrize("module", MODULES)
def test_every_listed_module_is_checked(module: str):
    __import__(module)
    functions = [
        one for _, one in inspect.getmembers(sys.modules[module], inspect.isfunction) if one.__module__ == module
    ]
    assert functions and all(hasattr(one, "__wrapped__") for one in functions)
