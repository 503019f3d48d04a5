"""Frozen weights in 8 or 4 bits, and back: blocks of a row share one scale.

fp8 is e4m3, int8 is symmetric, nf4 is bitsandbytes' table of 16 values. A kind is known by its storage type, so packed
tensors need no label. Relative error of a Gaussian weight (root mean square): int8 0.6 %, fp8 2.5 %, nf4 9.2 %.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.config.types import Quantization

SCALE_BLOCK = 64
"""Weights that share a scale; fewer where a row is no multiple of it."""
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
SCALE_DTYPE = torch.bfloat16


@dataclass
class QuantizationStats:
    """What quantising costs, summed over tensors as they stream by: of the weights, and of what was merged into them.

    A change that is smaller than a step of the grid does not vanish: it decides on which side of it a weight comes to
    lie. So all of it arrives on average, with an error that may be larger than the change.
    """

    weight: float = 0.0
    weight_error: float = 0.0
    change: float = 0.0
    change_error: float = 0.0
    adapter_retained: float = 0.0

    def add(self, weight: Tensor, change: Tensor | None, kind: Quantization) -> None:
        """Count `weight` (rows, columns), into which `change` of the same shape was merged."""
        dense = weight.float()
        stored = unpack(*pack(dense, kind), torch.float32)
        self.weight += float(dense.square().sum())
        self.weight_error += float((stored - dense).square().sum())
        if change is not None:
            seen = stored - unpack(*pack(dense - change, kind), torch.float32)
            self.change += float(change.square().sum())
            self.change_error += float((seen - change).square().sum())
            self.adapter_retained += float((seen * change).sum())

    def facts(self) -> dict[str, float]:
        """Relative errors, root mean square; `adapter_arrived` is the share of its change in its own direction."""
        found = {"weight_error": math.sqrt(self.weight_error / self.weight)} if self.weight else {}
        if self.change:
            found["adapter_error"] = math.sqrt(self.change_error / self.change)
            found["adapter_arrived"] = self.adapter_retained / self.change
        return {name: round(value, 5) for name, value in found.items()}


def block_size_for(columns: int) -> int:
    """The length of a block in rows of `columns` weights: 64, or the largest power of two below that fits."""
    return math.gcd(columns, SCALE_BLOCK)


def empty_quantized(rows: int, columns: int, kind: Quantization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for a packed weight of (rows, columns): the numbers, and one scale per row and block."""
    width = columns // 2 if kind == "nf4" else columns
    data = torch.empty(rows, width, dtype=STORED[kind], device=device)
    return data, torch.empty(rows, columns // block_size_for(columns), dtype=SCALE_DTYPE, device=device)


def pack(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Quantise `weight` (rows, columns) of any float type; of fp8 and int8 the scales are rounded first."""
    block = block_size_for(weight.shape[1])
    if kind == "nf4":
        return _pack_nf4(weight.float(), block)
    blocks = weight.float().unflatten(1, (-1, block))
    scales = (blocks.abs().amax(-1) / LARGEST[kind]).to(SCALE_DTYPE)
    divisors = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    numbers = blocks / divisors
    if kind == "int8":
        numbers = numbers.round().clamp(-LARGEST[kind], LARGEST[kind])
    return numbers.to(STORED[kind]).flatten(1), scales


def unpack(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (rows, columns) that `pack` stored, in `dtype`."""
    if data.dtype == torch.uint8:
        return _unpack_nf4(data, scales, dtype)
    weight = data.to(dtype)
    weight.unflatten(1, (scales.shape[1], -1)).mul_(scales.to(dtype).unsqueeze(-1))
    return weight


def _pack_nf4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weight.contiguous(), blocksize=block, quant_type="nf4")
    rows = weight.shape[0]
    return data.view(rows, -1), state.absmax.view(rows, -1).to(SCALE_DTYPE)


def _unpack_nf4(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    rows, columns = data.shape[0], data.shape[1] * 2
    if data.device.type == "meta":
        return torch.empty(rows, columns, dtype=dtype, device="meta")
    state = QuantState(
        absmax=scales.float().flatten(),
        shape=torch.Size((rows, columns)),
        code=_nf4_code(data.device),
        blocksize=columns // scales.shape[1],
        quant_type="nf4",
        dtype=dtype,
    )
    return dequantize_4bit(data.view(-1, 1), state)


def _nf4_code(device: torch.device) -> Tensor:
    if device not in _codes:
        from bitsandbytes.functional import get_4bit_type

        _codes[device] = get_4bit_type("nf4", device=device)
    return _codes[device]


_codes: dict[torch.device, Tensor] = {}
