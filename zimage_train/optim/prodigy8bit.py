"""Prodigy whose moments are held in 8 bits between steps, by bitsandbytes' blockwise dynamic quantisation.

They are unpacked for a step, when the activations that make up the peak of memory are gone.
"""

from functools import cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
from prodigyopt import Prodigy
from torch import Tensor

PACKED = {"exp_avg": True, "exp_avg_sq": False, "s": True}
"""State that is packed, and whether it has a sign."""
LEAST_ELEMENTS = 4096
"""Smaller tensors stay as they are, as in bitsandbytes' own optimizers."""
BLOCK = 256


class Prodigy8bit(Prodigy):
    """`prodigyopt.Prodigy`, with `exp_avg`, `exp_avg_sq` and `s` packed after each step."""

    def step(self, closure: Any = None) -> Any:
        """One step on the unpacked state."""
        for state in self.state.values():
            _unpack(state)
        result = super().step(closure)
        for state in self.state.values():
            _pack(state)
        return result


def _pack(state: dict[str, Any]) -> None:
    for name, is_signed in PACKED.items():
        value = state.get(name)
        if isinstance(value, Tensor) and value.numel() >= LEAST_ELEMENTS:
            packed, scales = bnb.quantize_blockwise(value, code=_code(is_signed, value.device), blocksize=BLOCK)
            state[f"{name}.packed"], state[f"{name}.scales"] = packed, scales.absmax
            del state[name]


def _unpack(state: dict[str, Any]) -> None:
    for name, is_signed in PACKED.items():
        packed = state.pop(f"{name}.packed", None)
        if packed is not None:
            scales = state.pop(f"{name}.scales")
            code = _code(is_signed, packed.device)
            state[name] = bnb.dequantize_blockwise(packed, absmax=scales, code=code, blocksize=BLOCK)


@cache
def _code(is_signed: bool, device: torch.device) -> Tensor:
    return bnb.create_dynamic_map(signed=is_signed).to(device)
