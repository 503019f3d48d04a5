"""LoRAs that are merged into the frozen weights during training, and are no part of the result.

Turbo is distilled to 8 steps, and training on it directly undoes the distillation. The training adapter undoes it
beforehand, so that the trained LoRA does not learn to, and Turbo without the adapter still takes 8 steps.

The LoRAs of `train.beside` are merged in the same way, so that the trained LoRA learns beside them. Previews
have them, attached as layers, since the trained LoRA is going to be used with them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import lora_file
from zimage_train.lora.deltas import Deltas, Factors
from zimage_train.models.arch import TransformerShape
from zimage_train.models.loading import NamedTensors


@dataclass(frozen=True)
class TrainingAdapter:
    """A training adapter or a LoRA of `train.beside`, and the strength with which it is merged."""

    path: Path
    lora: Deltas
    strength: float

    def parameter_names(self) -> set[str]:
        """Return the names of the parameters that the adapter changes."""
        return {f"{module}.weight" for module in self.lora}

    def delta_of(self, name: str, device: torch.device) -> torch.Tensor | None:
        """Return `strength` times the change of the parameter `name`, in fp32, or None if there is none."""
        if not name.endswith(".weight"):
            return None
        factors = self.lora.get(name.removesuffix(".weight"))
        if factors is None:
            return None
        if not isinstance(factors, Factors):
            return self.strength * factors.delta().to(device)
        return self.strength * (factors.scale * (factors.b.to(device).float() @ factors.a.to(device).float()))


@dataclass
class MergeCount:
    """The modules of the adapter that have been merged into a weight."""

    matched: set[str] = field(default_factory=set)


def load_adapter(path: Path, strength: float, shape: TransformerShape) -> TrainingAdapter:
    """Read the adapter at `path`, and require that every module of it fits the model.

    Raises:
        WeightsError: the file is unreadable, or a module has no counterpart in the model.
    """
    lora = lora_file.read_lora(path)
    lora_file.require_modules(path, lora, shape.linears)
    return TrainingAdapter(path, {**lora}, strength)


def load_beside(path: Path, weight: float, shape: TransformerShape) -> TrainingAdapter:
    """Read a LoRA or LoKr of `train.beside`, and require that every module of it fits the model.

    Raises:
        WeightsError: the file is unreadable, or a module has no counterpart in the model.
    """
    deltas = lora_file.read_deltas(path)
    lora_file.require_modules(path, deltas, shape.linears)
    return TrainingAdapter(path, deltas, weight)


def merge_all(tensors: NamedTensors, adapters: Iterable[TrainingAdapter], device: torch.device) -> NamedTensors:
    """Return `tensors` with the change of each of `adapters` added, in their order and in fp32, as `merge_adapter`."""
    for adapter in adapters:
        tensors = merge_adapter(tensors, adapter, device, MergeCount())
    return tensors


def merge_adapter(
    tensors: NamedTensors, adapter: TrainingAdapter, device: torch.device, count: MergeCount
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `tensors` with `strength` times the change of `adapter` added, in fp32.

    Raises:
        WeightsError: `tensors` ended before every module of the adapter was merged.
    """
    for name, tensor in tensors:
        delta = adapter.delta_of(name, device)
        if delta is None:
            yield name, tensor
            continue
        count.matched.add(name.removesuffix(".weight"))
        # Left in fp32: the consumer casts or quantises the sum, and this is the only rounding. A sum rounded to bf16
        # first would lose most of a small delta, and be rounded again on quantisation.
        yield name, tensor.to(device).float() + delta
    unmatched = sorted(adapter.lora.keys() - count.matched)
    if unmatched:
        message = f"matched {len(count.matched)}/{len(adapter.lora)} modules; not matched: {unmatched[0]}"
        raise WeightsError(Problem(str(adapter.path), message, "nothing was trained", "other-modules"))
