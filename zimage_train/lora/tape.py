"""Which results of a block are kept from its forward to its backward, and the memory that they lie in."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_train.config.types import RecomputeMode

PRODUCTS = frozenset({"q", "k", "v", "y_attention", "y_feed_forward"})
WIDE_PRODUCTS = frozenset({"u", "w"})
ATTENTION = frozenset({"attention", "attention_rest"})
SMALL = frozenset({"inner_qkv", "inner_out", "inner_up", "inner_down", "inverse_down"})
"""The inputs of every B, which have the LoRA's rank as their width, and an inverse RMS."""
NORMS = frozenset(
    {"h_attention", "inverse_in", "q_rotated", "k_rotated", "inverse_q", "inverse_k", "x_middle", "h_feed_forward"}
) | {"inverse_attention", "inverse_middle", "activated"}
INPUTS = frozenset({"bias", "rope", "scale_attention", "gate_attention", "scale_feed_forward", "gate_feed_forward"})
"""What is always kept: it is small, or shared by all blocks."""
KEPT: dict[RecomputeMode, frozenset[str]] = {
    "none": PRODUCTS | WIDE_PRODUCTS | ATTENTION | SMALL | NORMS,
    "elementwise": PRODUCTS | WIDE_PRODUCTS | ATTENTION | SMALL,
    "w1w3": PRODUCTS | ATTENTION | SMALL,
    "attention": ATTENTION | {"inverse_down"},
    "full": frozenset({"inverse_down"}),
}
"""The results of a block that its backward finds again, by mode, beside its input x and `INPUTS`."""
IN_BUFFER = {mode: names - {"attention"} | {"output"} for mode, names in KEPT.items()}
IN_BUFFER["attention"] |= {"attention"}
"""The results that lie in the buffer of a block: those that are kept, and the output, which the next block keeps as its
input. Attention allocates its own result; that is copied where nothing large is kept beside it, since it would lie in
the middle of what is freed."""

Layout = dict[str, tuple[int, int]]
"""Name of a result -> its first byte in the buffer of a block, and its number of bytes."""
ALIGNMENT = 256
"""Every result in a buffer begins at a multiple of this many bytes."""


class Tape(dict[str, Any]):
    """The results of a block by name. Those of `layout` lie in one buffer, which is freed as a whole.

    So what the forward keeps leaves no gaps among what lives for a moment only, as in PyTorch's allocator it would.
    """

    def __init__(self, device: torch.device, layout: Layout | None = None) -> None:
        super().__init__()
        self._device, self._layout = device, layout or {}
        ends = [start + num_bytes for start, num_bytes in self._layout.values()]
        self._buffer = torch.empty(max(ends), dtype=torch.uint8, device=device) if ends else None
        self.allocated: list[str] = []
        """Names that `new` was called with."""

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory for the result `name`, and enter it."""
        self.allocated.append(name)
        if self._buffer is not None and name in self._layout:
            start, num_bytes = self._layout[name]
            self[name] = self._buffer[start : start + num_bytes].view(dtype).view(shape)
        else:
            self[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return self[name]

    def put(self, name: str, value: Tensor) -> None:
        """Enter `value` as the result `name`, in the buffer if it has a place there."""
        if name in self._layout:
            self.new(name, value.shape, value.dtype).copy_(value)
        else:
            self.allocated.append(name)
            self[name] = value

    def new_inverse(self, name: str, x: Tensor) -> Tensor:
        """Return memory for the inverse RMS of each row of x."""
        return self.new(name, (*x.shape[:-1], 1), torch.float32)

    def layout_of(self, kept: Collection[str]) -> Layout:
        """Return the layout of a buffer for those results of this tape that are `kept`."""
        layout, end = Layout(), 0
        for name in self.allocated:
            if name in kept:
                num_bytes = self[name].numel() * self[name].element_size()
                layout[name] = (end, num_bytes)
                end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return layout
