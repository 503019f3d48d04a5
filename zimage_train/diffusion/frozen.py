"""The frozen transformer, built from a stream of tensors: place(quantise(merge(read(path), adapter))).

The same stream without the training adapter restores the original weights for previews. Afterwards the training weights
are computed again from the file: the same sums in the same order give the same bits. The adapter is never subtracted,
since in floating point (W + A) - A is not W.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zimage_train.config.types import Quantization
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
    """The training weights could not be restored after a preview: nothing may be trained on the model in memory."""


@dataclass(frozen=True)
class FrozenTransformer:
    """A transformer with frozen weights, and the files and adapter from which these can be computed again."""

    model: ZImageTransformer2DModel
    shape: TransformerShape
    path: Path
    adapter: TrainingAdapter | None
    adapter_matched: int
    quantization: QuantizationStats
    """Errors of quantisation; all zero if nothing was quantised."""
    offloader: BlockOffloader | None
    """Streams some of the blocks from CPU memory; None if all of them are on the device."""

    def load_tensors(self, tensors: loading.NamedTensors) -> None:
        """Overwrite the parameters with `tensors` of the same names, quantised where the parameters are."""
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
    """Build the transformer of `path` on `device` with `adapter` merged, all of it frozen.

    `num_streamed` blocks stay in CPU memory. Tensors are read, merged and stored one at a time, so no second copy of
    the model is ever in memory.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape, or the adapter does not match in full.
    """
    shape, tensors = transformer.read_weights(path)
    model = transformer.empty_transformer(shape, TORCH_DTYPES[dtype], kind)
    blocks = [model.layers[index] for index in streamed_blocks(shape.n_layers, num_streamed)]
    # Before `allocate_transformer`: it leaves alone the parameters that the offloader has pointed into its slots.
    offloader = BlockOffloader(blocks, device) if blocks else None
    transformer.allocate_transformer(model, device)
    count, stats = MergeCount(), QuantizationStats()
    merged = merge_adapter(tensors, adapter, device, count) if adapter else tensors

    def store(name: str, tensor: Tensor) -> None:
        # Rounding to `dtype` or quantising to `kind` happens here, once, after the merge in higher precision.
        _store(model, offloader, name, tensor)
        if kind is not None and name.removesuffix(".weight") in shape.linears and IN_A_BLOCK.match(name):
            stats.add(tensor.to(device), adapter.delta_of(name, device) if adapter else None, kind)

    loading.store_tensors(shape.parameters, merged, store, str(path), type(model).__name__)
    return FrozenTransformer(model, shape, path, adapter, len(count.matched), stats, offloader)


@contextlib.contextmanager
def original_weights(frozen: FrozenTransformer, second_model: Path | None = None) -> Iterator[None]:
    """Within the block, the weights are those of the file without the adapter, or those of `second_model`.

    After the block the training weights are restored bit for bit. Only tensors that differ are read: those that the
    adapter changes, or all of them for another model.

    Raises:
        WeightsError: a file cannot be read.
        NotRestoredError: the training weights cannot be read again; nothing may be trained on this model any more.
    """
    if second_model is not None:
        names = set(frozen.shape.parameters)
    elif frozen.adapter is not None:
        names = frozen.adapter.parameter_names()
    else:
        names = set[str]()
    if not names:
        yield
        return
    try:
        frozen.load_tensors(transformer.read_selected_weights(second_model or frozen.path, names))
        yield
    finally:
        _restore(frozen, names)


def _restore(frozen: FrozenTransformer, names: set[str]) -> None:
    device = next(frozen.model.parameters()).device
    try:
        tensors = transformer.read_selected_weights(frozen.path, names)
        # As in `load_frozen`: the same merge on the same device, in the same order, and so the same bits.
        frozen.load_tensors(merge_adapter(tensors, frozen.adapter, device, MergeCount()) if frozen.adapter else tensors)
    except Exception as error:
        what = f"the training weights cannot be restored after a preview ({error})"
        hint = "the same command continues from the last checkpoint"
        raise NotRestoredError(Problem(str(frozen.path), what, hint, "not-restored")) from error


@torch.no_grad()
def _store(model: ZImageTransformer2DModel, offloader: BlockOffloader | None, name: str, tensor: Tensor) -> None:
    """Copy `tensor` into the parameter `name`, packed if the layer is quantised."""
    module_name, _, leaf = name.rpartition(".")
    # With a LoRA attached, peft's layer stands at this name and the frozen layer is inside.
    module = base_layer(model, module_name)
    if isinstance(module, FrozenLinear):
        # Quantised on the device even if the block is offloaded: faster, and the bits do not depend on the placement.
        source = tensor if module.kind is None else tensor.to(module.weight.device)
        targets, values = module.stored_parameters(), module.pack(source)
    else:
        targets, values = [getattr(module, leaf)], [tensor]
    for parameter, value in zip(targets, values, strict=True):
        cpu_buffer = offloader.cpu_buffer(parameter) if offloader is not None else None
        # The slot that an offloaded parameter points into now may belong to another block a moment later.
        (parameter if cpu_buffer is None else cpu_buffer).copy_(value)
