"""The frozen transformer, put together from a stream: place(quantise(merge(read(path), adapter))).

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

from zimage_train.config.values import Quantization
from zimage_train.errors import Problem, WeightsError
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.lora.layers import base_layer
from zimage_train.lora.training_adapter import MergeCount, TrainingAdapter, merge_adapter
from zimage_train.models import loading, transformer
from zimage_train.models.arch import IN_A_BLOCK, TransformerShape
from zimage_train.models.linear import FrozenLinear
from zimage_train.models.offload import BlockOffloader, streamed_blocks
from zimage_train.models.quantize import QuantizationStats


class NotRestoredError(WeightsError):
    """The training weights could not be put back after a preview: the model in memory is no longer the run's."""


@dataclass(frozen=True)
class FrozenTransformer:
    """A transformer for training, and what its weights were made of."""

    model: ZImageTransformer2DModel
    shape: TransformerShape
    path: Path
    adapter: TrainingAdapter | None
    adapter_matched: int
    quantization: QuantizationStats
    """What quantising has cost; empty where nothing was quantised."""
    offloader: BlockOffloader | None
    """Streams some of the blocks; None: all of them are on the device."""

    def load_tensors(self, tensors: loading.NamedTensors) -> None:
        """Put `tensors` where the parameters of their names are, quantised if those are."""
        for name, tensor in tensors:
            _store(self.model, self.offloader, name, tensor)
        if self.offloader is not None:
            self.offloader.invalidate()


def load_frozen(
    path: Path,
    adapter: TrainingAdapter | None,
    dtype: str,
    device: torch.device,
    kind: Quantization | None = None,
    num_streamed: int = 0,
) -> FrozenTransformer:
    """Build the transformer of `path` on `device` with `adapter` merged; all of it frozen.

    Weights are rounded or quantised to `kind` once, after the merge. So many blocks are streamed.

    Raises:
        WeightsError: tensors are missing, left over or misshapen, or the adapter does not match in full.
    """
    shape, tensors = transformer.read_weights(path)
    model = transformer.empty_transformer(shape, TORCH_DTYPES[dtype], kind)
    blocks = [model.layers[index] for index in streamed_blocks(shape.n_layers, num_streamed)]
    ring = BlockOffloader(blocks, device) if blocks else None
    loading.allocate_parameters(model, device)
    count, rounding = MergeCount(), QuantizationStats()
    merged = merge_adapter(tensors, adapter, device, count) if adapter else tensors

    def store(name: str, tensor: Tensor) -> None:
        _store(model, ring, name, tensor)
        if kind is not None and name.removesuffix(".weight") in shape.linears and IN_A_BLOCK.match(name):
            rounding.add(tensor.to(device), adapter.delta_of(name, device) if adapter else None, kind)

    loading.store_tensors(shape.parameters, merged, store, str(path), type(model).__name__)
    return FrozenTransformer(model, shape, path, adapter, len(count.matched), rounding, ring)


@contextlib.contextmanager
def original_weights(frozen: FrozenTransformer, also: Path | None = None) -> Iterator[None]:
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
        frozen.load_tensors(transformer.read_selected_weights(also or frozen.path, names))
        yield
    finally:
        _restore(frozen, names)


def _restore(frozen: FrozenTransformer, names: set[str]) -> None:
    device = next(frozen.model.parameters()).device
    try:
        tensors = transformer.read_selected_weights(frozen.path, names)
        frozen.load_tensors(merge_adapter(tensors, frozen.adapter, device, MergeCount()) if frozen.adapter else tensors)
    except Exception as error:
        what = f"the training weights cannot be put back after a preview ({error})"
        todo = "the same command continues from the last checkpoint"
        raise NotRestoredError(Problem(str(frozen.path), what, todo)) from error


@torch.no_grad()
def _store(model: ZImageTransformer2DModel, ring: BlockOffloader | None, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = base_layer(model, owner)
    if isinstance(module, FrozenLinear):
        device = module.weight.device
        targets, values = module.stored_parameters(), module.pack(tensor if module.kind is None else tensor.to(device))
    else:
        targets, values = [getattr(module, leaf)], [tensor]
    for parameter, value in zip(targets, values, strict=True):
        home = ring.cpu_buffer(parameter) if ring is not None else None
        (parameter if home is None else home).copy_(value)
