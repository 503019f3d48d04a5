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
def original(frozen: Frozen, also: Path | None = None) -> Iterator[None]:
    """Within the block the weights are those of the file, without the adapter, or those of the model at `also`.

    After it they are the training ones, bit for bit. Only tensors that differ are read: those that the adapter changes,
    or all of them for another model.

    Raises:
        WeightsError: a file cannot be read.
        NotRestored: the training weights cannot be read a second time; nothing may be trained on this model any more.
    """
    names = set(frozen.shape.parameters) if also else frozen.adapter.weights() if frozen.adapter else set()
    if not names:
        yield
        return
    try:
        _store(frozen, transformer.read_some(also or frozen.path, names))
        yield
    finally:
        _restore(frozen, names)


def _restore(frozen: Frozen, names: set[str]) -> None:
    device = next(frozen.model.parameters()).device
    try:
        tensors = transformer.read_some(frozen.path, names)
        _store(frozen, merge(tensors, frozen.adapter, device, Count()) if frozen.adapter else tensors)
    except Exception as error:
        what = f"the training weights cannot be put back after a preview ({error})"
        todo = "the same command continues from the last checkpoint"
        raise NotRestored(Problem(str(frozen.path), what, todo)) from error


@torch.no_grad()
def _store(frozen: Frozen, tensors: weights.Stream) -> None:
    for name, tensor in tensors:
        base_weight(frozen.model, name).copy_(tensor)
