"""Prodigy whose moments are kept in 8 bits between steps, with bitsandbytes' blockwise dynamic quantisation.

A step unpacks them all to fp32. It runs after the backward, when the activations that set the peak of memory have been
freed.
"""

from functools import cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
from prodigyopt import Prodigy
from torch import Tensor

PACKED = {"exp_avg": True, "exp_avg_sq": False, "s": True}
"""State that is quantised -> whether it is signed. `p0`, the initial weights, stays exact: d is estimated from the
distance to it."""
MIN_QUANTIZED_SIZE = 4096
"""Tensors with fewer elements stay in fp32, as in bitsandbytes' own 8-bit optimizers."""
BLOCK_SIZE = 256
"""Elements that share a scale, as in bitsandbytes' own 8-bit optimizers."""


class Prodigy8bit(Prodigy):
    """`prodigyopt.Prodigy`, with `exp_avg`, `exp_avg_sq` and `s` packed after each step."""

    def step(self, closure: Any = None) -> Any:
        """Take a step on the unpacked state."""
        # Packed tensors have their own names (`exp_avg.packed`, `exp_avg.scales`), so a checkpoint stores them as they
        # are, and a resumed run continues from the same bits.
        for state in self.state.values():
            _unpack(state)
        result = super().step(closure)
        for state in self.state.values():
            _pack(state)
        return result


def _pack(state: dict[str, Any]) -> None:
    for name, is_signed in PACKED.items():
        value = state.get(name)
        if isinstance(value, Tensor) and value.numel() >= MIN_QUANTIZED_SIZE:
            packed, scales = bnb.quantize_blockwise(value, code=_code(is_signed, value.device), blocksize=BLOCK_SIZE)
            state[f"{name}.packed"], state[f"{name}.scales"] = packed, scales.absmax
            del state[name]


def _unpack(state: dict[str, Any]) -> None:
    for name, is_signed in PACKED.items():
        packed = state.pop(f"{name}.packed", None)
        if packed is not None:
            scales = state.pop(f"{name}.scales")
            code = _code(is_signed, packed.device)
            state[name] = bnb.dequantize_blockwise(packed, absmax=scales, code=code, blocksize=BLOCK_SIZE)


@cache
def _code(is_signed: bool, device: torch.device) -> Tensor:
    """Return the 256 quantisation levels."""
    return bnb.create_dynamic_map(signed=is_signed).to(device)
