"""The frozen transformer, built from a stream of tensors: place(quantise(merge(read(path), adapters))).

The same stream without the training adapter restores the original weights for previews. The training weights wait in
main memory meanwhile, and the original weights between previews; where main memory is too small for that, both are
computed from the file again each time: the same sums in the same order give the same bits. The adapter is never
subtracted, since in floating point (W + A) - A is not W.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from zimage_train.config.types import Quantization
from zimage_train.errors import Problem, Stopped, WeightsError
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.lora.layers import base_layer
from zimage_train.lora.training_adapter import MergeCount, TrainingAdapter, merge_adapter, merge_all
from zimage_train.models import loading, quantize, transformer
from zimage_train.models.arch import IN_A_BLOCK, TransformerShape
from zimage_train.models.host_copy import HostCopy
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
    beside: tuple[TrainingAdapter, ...] = ()
    """The LoRAs of `train.beside`, which are merged too."""
    spare_bytes: float = 0.0
    """Main memory that may hold other weights for previews."""
    waiting: dict[Path | None, HostCopy] = field(default_factory=dict)
    """The weights that wait in main memory: the original ones, or by path those of a second model. While they are in
    use, the training weights wait in their place."""

    @property
    def merged(self) -> tuple[TrainingAdapter, ...]:
        """All that is merged into the weights for the training, in the order of the sums."""
        return (*((self.adapter,) if self.adapter is not None else ()), *self.beside)

    def load_tensors(self, tensors: loading.NamedTensors) -> None:
        """Overwrite the parameters with `tensors` of the same names, quantised where the parameters are."""
        for name, tensor in tensors:
            _store(self.model, self.offloader, name, tensor)
        if self.offloader is not None:
            self.offloader.invalidate()

    def stored_tensors(self, name: str) -> list[Tensor]:
        """Return the tensors that hold the parameter `name`: where it is streamed, those in CPU memory."""
        stored = []
        for parameter in _parameters_of(self.model, name):
            cpu_buffer = self.offloader.cpu_buffer(parameter) if self.offloader is not None else None
            stored.append(parameter.data if cpu_buffer is None else cpu_buffer)
        return stored

    def dense_weight(self, module: str) -> Tensor:
        """Return the weight (out, in) of a linear layer in a block, on the device, unpacked if it is quantised."""
        device = next(self.model.parameters()).device
        weight, *scales = [tensor.to(device) for tensor in self.stored_tensors(f"{module}.weight")]
        return quantize.unpack(weight, scales[0], self.model.dtype) if scales else weight

    def exchange(self, second_model: Path | None) -> None:
        """Exchange the weights in use with those that wait for `second_model`."""
        self.waiting[second_model].exchange()
        if self.offloader is not None:
            self.offloader.invalidate()


def load_frozen(
    path: Path,
    adapter: TrainingAdapter | None,
    dtype: str,
    device: torch.device,
    kind: Quantization | None = None,
    num_streamed: int = 0,
    spare_bytes: float = 0.0,
    beside: Sequence[TrainingAdapter] = (),
) -> FrozenTransformer:
    """Build the transformer of `path` on `device` with `adapter` and the LoRAs `beside` merged, all of it frozen.

    `num_streamed` blocks stay in CPU memory, and `spare_bytes` of it may hold weights for previews. Tensors are read,
    merged and stored one at a time, so no second copy of the model is ever in memory.

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
    merged = merge_all(merge_adapter(tensors, adapter, device, count) if adapter else tensors, beside, device)

    def store(name: str, tensor: Tensor) -> None:
        # Rounding to `dtype` or quantising to `kind` happens here, once, after the merge in higher precision.
        _store(model, offloader, name, tensor)
        if kind is not None and name.removesuffix(".weight") in shape.linears and IN_A_BLOCK.match(name):
            stats.add(tensor.to(device), adapter.delta_of(name, device) if adapter else None, kind)

    loading.store_tensors(shape.parameters, merged, store, str(path), type(model).__name__)
    return FrozenTransformer(
        model, shape, path, adapter, len(count.matched), stats, offloader, tuple(beside), spare_bytes
    )


@contextlib.contextmanager
def original_weights(frozen: FrozenTransformer, second_model: Path | None = None) -> Iterator[None]:
    """Within the block, the weights are those of the file without anything merged, or those of `second_model`.

    After the block the training weights are restored bit for bit, unless a signal stopped the run in it. Only tensors
    that differ are read: those that the adapter changes, or all of them for another model. With main memory to spare
    they are read for the first block only.

    Raises:
        WeightsError: a file cannot be read.
        NotRestoredError: the training weights cannot be restored; nothing may be trained on this model any more.
    """
    if second_model is not None:
        names = set(frozen.shape.parameters)
    else:
        names = set[str]().union(*(adapter.parameter_names() for adapter in frozen.merged))
    if not names:
        yield
        return
    if second_model in frozen.waiting:
        frozen.exchange(second_model)
    else:
        _keep_training_weights(frozen, second_model, names)
        try:
            frozen.load_tensors(transformer.read_selected_weights(second_model or frozen.path, names))
        except BaseException:
            _restore(frozen, second_model, names)
            frozen.waiting.pop(second_model, None)  # it holds what was read so far, and is not complete
            raise
    try:
        yield
    except Stopped:
        raise  # nothing is trained any more, and a rented machine may be gone before the weights are back
    except BaseException:
        _restore(frozen, second_model, names)
        raise
    _restore(frozen, second_model, names)


def _keep_training_weights(frozen: FrozenTransformer, second_model: Path | None, names: set[str]) -> None:
    """Copy the training weights to main memory if there is enough to spare."""
    stored: list[Tensor] = []
    for name in sorted(names):
        stored.extend(frozen.stored_tensors(name))
    taken = sum(copy.num_bytes for copy in frozen.waiting.values())
    if HostCopy.bytes_for(stored) + taken <= frozen.spare_bytes:
        frozen.waiting[second_model] = HostCopy(stored)


def _restore(frozen: FrozenTransformer, second_model: Path | None, names: set[str]) -> None:
    try:
        if second_model in frozen.waiting:
            frozen.exchange(second_model)
            return
        device = next(frozen.model.parameters()).device
        tensors = transformer.read_selected_weights(frozen.path, names)
        # As in `load_frozen`: the same merge on the same device, in the same order, and so the same bits.
        frozen.load_tensors(merge_all(tensors, frozen.merged, device))
    except Exception as error:
        what = f"the training weights cannot be restored after a preview ({error})"
        hint = "the same command continues from the last checkpoint"
        raise NotRestoredError(Problem(str(frozen.path), what, hint, "not-restored")) from error


@torch.no_grad()
def _store(model: ZImageTransformer2DModel, offloader: BlockOffloader | None, name: str, tensor: Tensor) -> None:
    """Copy `tensor` into the parameter `name`, packed if the layer is quantised."""
    module = base_layer(model, name.rpartition(".")[0])
    values = [tensor]
    if isinstance(module, FrozenLinear):
        # Quantised on the device even if the block is offloaded: faster, and the bits do not depend on the placement.
        source = tensor if module.kind is None else tensor.to(module.weight.device)
        values = module.pack(source)
    for parameter, value in zip(_parameters_of(model, name), values, strict=True):
        cpu_buffer = offloader.cpu_buffer(parameter) if offloader is not None else None
        # The slot that an offloaded parameter points into now may belong to another block a moment later.
        (parameter if cpu_buffer is None else cpu_buffer).copy_(value)


def _parameters_of(model: ZImageTransformer2DModel, name: str) -> list[nn.Parameter]:
    """Return the parameters that hold `name`; where the layer is quantised, its packed data and the scales."""
    module_name, _, leaf = name.rpartition(".")
    # With a LoRA attached, peft's layer stands at this name and the frozen layer is inside.
    module = base_layer(model, module_name)
    return module.stored_parameters() if isinstance(module, FrozenLinear) else [getattr(module, leaf)]
