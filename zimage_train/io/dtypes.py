"""The dtypes of tensors by name, and their sizes (torch-free; `tensorfile` has those of torch)."""

from typing import Literal

Precision = Literal["bf16", "fp32"]
"""A dtype by the name that settings and options have for it."""
PRECISIONS: dict[str, str] = {"bf16": "BF16", "fp32": "F32"}
"""Precision -> the name of that dtype in safetensors files."""
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of a number, by safetensors' name of its dtype."""
COMPUTE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The floats with which torch, diffusers and ComfyUI compute; those of 8 bits are for storage only."""


def bytes_per_number(precision: str) -> int:
    """Return the bytes of a number in `precision`, such as 2 for `bf16`."""
    return ITEM_BYTES[PRECISIONS[precision]]
