"""Quantisation of frozen weights to 8 or 4 bits: each block of weights within a row shares a bf16 scale.

fp8 is e4m3, int8 is symmetric, nf4 is bitsandbytes' table of 16 values. fp8_fast is e4m3 with a single scale, as
products in fp8 need it (`models.fp8`). The storage dtype and the shape of the scales identify the kind, so that packed
tensors need no label. Relative RMS error on Gaussian weights: int8 0.6 %, fp8 2.5 %, fp8_fast 2.6 %, nf4 9.2 %.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.config.types import Quantization
from zimage_train.models import fp8, region_ops
from zimage_train.models.arch import scale_block_size

STORAGE_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_fast": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}
MAX_STORED = {"fp8": 448.0, "fp8_fast": 448.0, "int8": 127.0}
"""Largest number that each kind can store."""
SCALE_DTYPE = torch.bfloat16


@dataclass
class QuantizationStats:
    """Sums of squares over all quantised tensors: of the weights, of the adapter's change in them, and of the errors.

    A change smaller than a quantisation step is not lost: it decides to which neighbour a weight near the middle is
    rounded. So the change is retained on average, though with an error that may exceed the change itself.
    """

    weight: float = 0.0
    weight_error: float = 0.0
    change: float = 0.0
    change_error: float = 0.0
    adapter_retained: float = 0.0
    """Inner product of the change before and after quantisation."""

    def add(self, weight: Tensor, change: Tensor | None, kind: Quantization) -> None:
        """Add `weight` (rows, columns) to the sums; `change`, of the same shape, has been merged into it already."""
        dense = weight.float()
        quantized = unpack(*pack(dense, kind), torch.float32)
        self.weight += float(dense.square().sum())
        self.weight_error += float((quantized - dense).square().sum())
        if change is not None:
            # What remains of the change is the difference between quantising with it and quantising without it.
            retained = quantized - unpack(*pack(dense - change, kind), torch.float32)
            self.change += float(change.square().sum())
            self.change_error += float((retained - change).square().sum())
            self.adapter_retained += float((retained * change).sum())

    def facts(self) -> dict[str, float]:
        """Return relative RMS errors, and as `adapter_arrived` the projection of the retained change on the change."""
        facts = {}
        if self.weight:
            facts["weight_error"] = math.sqrt(self.weight_error / self.weight)
        if self.change:
            facts["adapter_error"] = math.sqrt(self.change_error / self.change)
            facts["adapter_arrived"] = self.adapter_retained / self.change
        return {name: round(value, 5) for name, value in facts.items()}


def empty_quantized(rows: int, columns: int, kind: Quantization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate a packed weight of (rows, columns): the data, and the scales (rows, blocks), or () for fp8_fast."""
    width = columns // 2 if kind == "nf4" else columns  # nf4 packs two weights into a byte
    data = torch.empty(rows, width, dtype=STORAGE_DTYPES[kind], device=device)
    if kind == "fp8_fast":
        return data, torch.empty((), dtype=torch.float32, device=device)
    scales = torch.empty(rows, columns // scale_block_size(columns), dtype=SCALE_DTYPE, device=device)
    return data, scales


def pack(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Quantise `weight` (rows, columns) of any float dtype; return the data and the scales, see `empty_quantized`."""
    if kind == "fp8_fast":
        return fp8.scaled_rows(weight.float())
    block = scale_block_size(weight.shape[1])
    if kind == "nf4":
        return _pack_nf4(weight.float(), block)
    blocks = weight.float().unflatten(1, (-1, block))
    # Scales are rounded to bf16 before the division, so that `unpack` multiplies by exactly what was divided by. That
    # rounding is below 0.4 %: the largest number of a block stays under 450, which e4m3 rounds to 448 and not to NaN.
    scales = (blocks.abs().amax(-1) / MAX_STORED[kind]).to(SCALE_DTYPE)
    divisors = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    numbers = blocks / divisors
    if kind == "int8":
        numbers = numbers.round().clamp(-MAX_STORED[kind], MAX_STORED[kind])
    return numbers.to(STORAGE_DTYPES[kind]).flatten(1), scales


def unpack(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, columns) that `pack` stored, in `dtype`."""
    if data.dtype == torch.uint8:
        return _unpack_nf4(data, scales, dtype)
    if fp8.is_fp8_product(scales):
        return (data.float() * scales).to(dtype)
    # Every int8 and e4m3 number is exact in bf16, so the product with the scale is the only rounding.
    weight = data.to(dtype)
    weight.unflatten(1, (scales.shape[1], -1)).mul_(scales.to(dtype).unsqueeze(-1))
    return weight


def unpack_into(data: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write the weight (rows, columns) that `pack` stored to `out`, with the bits of `unpack`."""
    if data.dtype == torch.uint8:
        _unpack_nf4(data, scales, out.dtype, out)
    elif fp8.is_fp8_product(scales):
        out.copy_(unpack(data, scales, out.dtype))
    else:
        region_ops.unpack(data, scales, out=out)


def _pack_nf4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    # bitsandbytes divides by the fp32 maximum; rounding that to bf16 afterwards adds less than 0.4 %, little beside the
    # 9 % of nf4 itself. Scales cost 0.25 bit a weight so; double quantisation, which is not used, would halve that.
    data, state = quantize_4bit(weight.contiguous(), blocksize=block, quant_type="nf4")
    rows = weight.shape[0]
    return data.view(rows, -1), state.absmax.view(rows, -1).to(SCALE_DTYPE)


def _unpack_nf4(data: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    rows, columns = data.shape[0], data.shape[1] * 2
    if data.device.type == "meta":
        return torch.empty(rows, columns, dtype=dtype, device="meta") if out is None else out
    state = QuantState(
        absmax=scales.float().flatten(),
        shape=torch.Size((rows, columns)),
        code=_nf4_code(data.device),
        blocksize=columns // scales.shape[1],
        quant_type="nf4",
        dtype=dtype,
    )
    if out is None or data.device.type == "cpu":  # where bitsandbytes has no kernel that writes to `out`
        weight = dequantize_4bit(data.view(-1, 1), state)
        return weight if out is None else out.copy_(weight)
    return dequantize_4bit(data.view(-1, 1), state, out=out)


def _nf4_code(device: torch.device) -> Tensor:
    """Return the table of nf4's 16 values on `device`, copied there once."""
    if device not in _codes:
        from bitsandbytes.functional import get_4bit_type

        _codes[device] = get_4bit_type("nf4", device=device)
    return _codes[device]


_codes: dict[torch.device, Tensor] = {}
