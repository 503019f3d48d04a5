"""The training adapter: merged into the frozen weights as they stream by, counted, and never left half done.

Turbo is distilled to 8 steps, and training on it undoes that. With the adapter merged the damage falls on the adapter,
which is left out again afterwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import lora_file
from zimage_train.lora.lora_file import Lora
from zimage_train.models.arch import TransformerShape
from zimage_train.models.loading import NamedTensors


@dataclass(frozen=True)
class TrainingAdapter:
    """A training adapter and how much of it is merged."""

    path: Path
    lora: Lora
    strength: float

    def weights(self) -> set[str]:
        """The names of the parameters that it changes."""
        return {f"{module}.weight" for module in self.lora}

    def delta_of(self, name: str, device: torch.device) -> torch.Tensor | None:
        """What is added to the parameter `name`, in fp32: `strength * scale * B @ A`; None: nothing."""
        factors = self.lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is None:
            return None
        return self.strength * (factors.scale * (factors.b.to(device).float() @ factors.a.to(device).float()))


@dataclass
class MergeCount:
    """How many modules of the adapter have met their weight."""

    matched: set[str] = field(default_factory=set)


def load_adapter(path: Path, strength: float, shape: TransformerShape) -> TrainingAdapter:
    """Read an adapter and require that all of it fits the model.

    Raises:
        WeightsError: unreadable, or some module matches nothing in the model.
    """
    lora = lora_file.read_lora(path)
    lora_file.require_modules(path, lora, shape.linears)
    return TrainingAdapter(path, lora, strength)


def merge_adapter(
    tensors: NamedTensors, adapter: TrainingAdapter, device: torch.device, count: MergeCount
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `tensors` with `strength * scale * B @ A` added in fp32; the sum is rounded only once, by who stores it.

    Raises:
        WeightsError: the stream ended before every module of the adapter met its weight.
    """
    for name, tensor in tensors:
        change = adapter.delta_of(name, device)
        if change is None:
            yield name, tensor
            continue
        count.matched.add(name.removesuffix(".weight"))
        yield name, tensor.to(device).float() + change
    lost = sorted(adapter.lora.keys() - count.matched)
    if lost:
        what = f"matched {len(count.matched)}/{len(adapter.lora)} modules; not matched: {lost[0]}"
        raise WeightsError(Problem(str(adapter.path), what, "nothing was trained"))
