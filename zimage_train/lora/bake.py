"""LoRAs into a checkpoint, and out of the difference between two."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import atomic, safetensors_format, tensorfile
from zimage_train.io.progress import StepProgress
from zimage_train.io.safetensors_format import TensorInfo
from zimage_train.lora import arithmetic
from zimage_train.lora.lora_file import Lora
from zimage_train.models import transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import TRANSFORMER_STEM
from zimage_train.models.native_keys import to_native


@dataclass
class ExtractedLora:
    """What the difference of two checkpoints holds, and how much of it a LoRA has."""

    lora: Lora = field(default_factory=dict)
    energy: float = 0.0
    total: float = 0.0
    others: list[str] = field(default_factory=list)
    """Tensors that differ and are no weights of linear modules, so that no LoRA can hold them."""


def extract_lora(
    tuned: Path, base: Path, rank: int | None, energy: float, device: torch.device, tick: StepProgress
) -> ExtractedLora:
    """The LoRA that leads from `base` to `tuned`, of `rank`, or of the lowest that keeps `energy` of each change.

    Raises:
        WeightsError: one of them is no Z-Image transformer, or they differ in shape.
    """
    found = ExtractedLora()
    with transformer.open_weights(tuned) as new, transformer.open_weights(base) as old:
        if new.shape.parameters != old.shape.parameters:
            what = f"has a width of {new.shape.dim} and {new.shape.n_layers} layers"
            todo = f"{base} has {old.shape.dim} and {old.shape.n_layers}: give the one that it was trained from"
            raise WeightsError(Problem(str(tuned), what, todo))
        for done, name in enumerate(sorted(new.shape.parameters), 1):
            change = new.get(name).to(device).float() - old.get(name).to(device).float()
            module = name.removesuffix(".weight")
            if not change.isfinite().all():
                raise WeightsError(Problem(f"{tuned}: {name}", "differs by values that are not finite"))
            if change.any() and module in new.shape.linears and name.endswith(".weight"):
                factors, kept, total = arithmetic.factorize(change, rank, energy, module)
                found.lora[module] = factors
                found.energy, found.total = found.energy + kept, found.total + total
            elif change.any():
                found.others.append(name)
            tick(done, len(new.shape.parameters))
    return found


@dataclass
class BakeResult:
    """What became of a LoRA whose change was added to weights of little precision."""

    changed: int = 0
    squared: float = 0.0
    lost: float = 0.0

    def add(self, before: Tensor, after: Tensor, change: Tensor) -> None:
        self.changed += 1
        self.squared += float(change.double().square().sum())
        self.lost += float((after.double() - before.double() - change.double()).square().sum())

    @property
    def share_lost(self) -> float:
        """Of the change's norm, what rounding the sum has cost."""
        return math.sqrt(self.lost / self.squared) if self.squared > 0 else 0.0


def bake_checkpoint(
    source: Path,
    lora: Lora,
    is_native: bool,
    dtype: str | None,
    output: Path,
    metadata: Mapping[str, str],
    tick: StepProgress,
) -> BakeResult:
    """Write the transformer at `source` with `lora` added, in `dtype`, or each tensor in the type that it has there.

    Native is one file with the names of ComfyUI's own model; otherwise `output` becomes a folder as diffusers has it.
    The sum is made in fp32 and rounded once. No more than one weight is in memory at a time.

    Raises:
        WeightsError: it is no Z-Image transformer.
        DiskError: it cannot be written.
    """
    baked, done = BakeResult(), 0
    with transformer.open_weights(source) as tensors:
        kinds = {info.dtype for info in tensors.infos.values()}
        if narrow := kinds - {"F64", "F32", "F16", "BF16"}:
            what = f"holds {', '.join(sorted(narrow))} tensors, in which a LoRA would be lost to rounding"
            raise WeightsError(Problem(str(source), what, "bake into a bf16 checkpoint"))
        parts: dict[str, list[str]] = {}
        for name in tensors.infos:
            parts.setdefault(to_native(name)[0] if is_native else name, []).append(name)

        def merged(name: str) -> Tensor:
            nonlocal done
            done += 1
            tick(done, len(tensors.infos))
            weight, factors = tensors.get(name), lora.get(name.removesuffix(".weight"))
            kind = tensorfile.TORCH_DTYPES[dtype] if dtype else weight.dtype
            if factors is None or not name.endswith(".weight"):
                return weight.to(kind)
            change = factors.delta()
            after = (weight.float() + change).to(kind)
            if not after.isfinite().all():
                raise WeightsError(Problem(name, "would not be finite with this LoRA", "nothing was written"))
            baked.add(weight, after, change)
            return after

        def data_of(name: str) -> bytes | memoryview:
            ordered = sorted(parts[name], key=lambda one: to_native(one)[1] or 0)
            return tensorfile.tensor_entry(
                torch.cat([merged(one) for one in ordered]) if is_native else merged(name)
            ).data

        infos = {name: _joined([tensors.infos[one] for one in names]) for name, names in parts.items()}
        if dtype:
            infos = {
                name: (tensorfile.DTYPE_NAMES[tensorfile.TORCH_DTYPES[dtype]], shape)
                for name, (_, shape) in infos.items()
            }
        target = output if is_native else output / f"{TRANSFORMER_STEM}.safetensors"
        safetensors_format.write_safetensors_of(target, infos, data_of, {"format": "pt", **metadata})
        if not is_native:
            atomic.write_json(output / "config.json", _config(tensors.shape))
    return baked


def _joined(infos: list[TensorInfo]) -> tuple[str, tuple[int, ...]]:
    """Type and shape of what is put together of these: the type that holds them all, as `torch.cat` chooses it."""
    kinds = (tensorfile.KINDS[info.dtype] for info in infos)
    dtype = tensorfile.DTYPE_NAMES[functools.reduce(torch.promote_types, kinds)]
    return dtype, (sum(info.shape[0] for info in infos), *infos[0].shape[1:])


def _config(shape: TransformerShape) -> dict[str, object]:
    return {"_class_name": "ZImageTransformer2DModel", **shape.config()}
