"""The functions of `regions` as operations of torch's dispatcher, each under its name: `zimage_train::swiglu`.

An operation is a single kernel on a GPU and plain torch everywhere else. Whoever counts the work of a step sees it as
one operation on any device.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from zimage_train.models import regions

NAMES = (
    "modulated_norm",
    "modulated_norm_backward",
    "gated_residual",
    "gated_residual_backward",
    "residual_norm",
    "residual_norm_backward",
    "rotated_norm",
    "rotated_norm_backward",
    "swiglu",
    "swiglu_backward",
    "unpack",
    "to_fp8",
    "transpose",
)
LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPU with bf16."""


def has_kernels(device: torch.device) -> bool:
    """Return whether every operation is a single kernel on `device`, so that fused blocks are faster than modules."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def _with_triton(name: str) -> Callable[..., None]:
    def run(*args: Any, **results: Any) -> None:
        from zimage_train.models import triton_regions  # Triton is not installed everywhere

        getattr(triton_regions, name)(*args, **results)

    return run


for _name in NAMES:
    _plain = getattr(regions, _name)
    _results = inspect.getfullargspec(inspect.unwrap(_plain)).kwonlyargs
    torch.library.define(f"zimage_train::{_name}", torch.library.infer_schema(_plain, mutates_args=_results))
    torch.library.impl(f"zimage_train::{_name}", "CompositeExplicitAutograd", _plain)
    torch.library.impl(f"zimage_train::{_name}", "CUDA", _with_triton(_name))

_ops = torch.ops.zimage_train
modulated_norm = _ops.modulated_norm.default
modulated_norm_backward = _ops.modulated_norm_backward.default
gated_residual = _ops.gated_residual.default
gated_residual_backward = _ops.gated_residual_backward.default
residual_norm = _ops.residual_norm.default
residual_norm_backward = _ops.residual_norm_backward.default
rotated_norm = _ops.rotated_norm.default
rotated_norm_backward = _ops.rotated_norm_backward.default
swiglu = _ops.swiglu.default
swiglu_backward = _ops.swiglu_backward.default
unpack = _ops.unpack.default
to_fp8 = _ops.to_fp8.default
transpose = _ops.transpose.default
