"""The training adapter: a LoRA merged into the frozen weights during training, and left out of previews and results.

Turbo is distilled to 8 steps, and training on it directly undoes the distillation. The adapter undoes it beforehand, so
that the trained LoRA does not learn to, and Turbo without the adapter still takes 8 steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import lora_file
from zimage_train.lora.deltas import Lora
from zimage_train.models.arch import TransformerShape
from zimage_train.models.loading import NamedTensors


@dataclass(frozen=True)
class TrainingAdapter:
    """A training adapter, and the strength with which it is merged."""

    path: Path
    lora: Lora
    strength: float

    def parameter_names(self) -> set[str]:
        """Return the names of the parameters that the adapter changes."""
        return {f"{module}.weight" for module in self.lora}

    def delta_of(self, name: str, device: torch.device) -> torch.Tensor | None:
        """Return `strength * scale * B @ A` in fp32 for the parameter `name`, or None if the adapter has none."""
        if not name.endswith(".weight"):
            return None
        factors = self.lora.get(name.removesuffix(".weight"))
        if factors is None:
            return None
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
    return TrainingAdapter(path, lora, strength)


def merge_adapter(
    tensors: NamedTensors, adapter: TrainingAdapter, device: torch.device, count: MergeCount
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `tensors` with `strength * scale * B @ A` added, in fp32.

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
