"""The frozen transformer, put together from a stream: place(merge(read(path), adapter)).

The same stream, without the adapter, gives true Turbo back for previews. Afterwards the training weights are merged
again: the same sums in the same order, so the same bits. Nothing is ever subtracted, since W + A - A is not W.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora.adapter import Adapter, Count, merge
from zimage_train.lora.attach import base_weight
from zimage_train.model import transformer, weights
from zimage_train.model.shapes import TransformerShape
from zimage_train.tensorfile import DTYPES


class NotRestored(WeightsError):
    """The training weights could not be put back after a preview: the model in memory is no longer the run's."""


@dataclass(frozen=True)
class Frozen:
    """A transformer for training, and what its weights were made of."""

    model: ZImageTransformer2DModel
    shape: TransformerShape
    path: Path
    adapter: Adapter | None
    adapter_matched: int


def assemble(path: Path, adapter: Adapter | None, dtype: str, device: torch.device) -> Frozen:
    """Build the transformer of `path` on `device` with `adapter` merged; all of it frozen.

    Raises:
        WeightsError: tensors are missing, left over or misshapen, or the adapter does not match in full.
    """
    shape, tensors = transformer.read(path)
    model = transformer.empty(shape)
    count = Count()
    merged = merge(tensors, adapter, device, count) if adapter else tensors
    weights.fill(model, merged, str(path), device, DTYPES[dtype])
    return Frozen(model, shape, path, adapter, len(count.matched))


@contextlib.contextmanager
def without_adapter(frozen: Frozen) -> Iterator[None]:
    """Within the block the model's weights are the original ones; after it, bit for bit the training ones.

    Raises:
        NotRestored: the files cannot be read a second time; nothing may be trained on this model any more.
    """
    if frozen.adapter is None:
        yield
        return
    try:
        _store(frozen, _changed(frozen))
        yield
    finally:
        _restore(frozen, frozen.adapter)


def _restore(frozen: Frozen, adapter: Adapter) -> None:
    device = next(frozen.model.parameters()).device
    try:
        _store(frozen, merge(_changed(frozen), adapter, device, Count()))
    except Exception as error:
        what = f"the adapter cannot be merged back after a preview ({error})"
        todo = "the same command continues from the last checkpoint"
        raise NotRestored(Problem(str(frozen.path), what, todo)) from error


def _changed(frozen: Frozen) -> Iterator[tuple[str, Tensor]]:
    names = frozen.adapter.weights() if frozen.adapter else set()
    return transformer.read_some(frozen.path, names)


@torch.no_grad()
def _store(frozen: Frozen, tensors: weights.Stream) -> None:
    for name, tensor in tensors:
        base_weight(frozen.model, name).copy_(tensor)
