"""Baking LoRAs into a checkpoint, and extracting a LoRA from the difference of two checkpoints."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.errors import Problem, WeightsError
from zimage_train.io import atomic, safetensors_format, tensorfile
from zimage_train.io.dtypes import COMPUTE_DTYPES, PRECISIONS
from zimage_train.io.progress import StepProgress
from zimage_train.lora import arithmetic
from zimage_train.lora.deltas import Deltas, Lora
from zimage_train.models import transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.models.native_keys import to_native
from zimage_train.models.stored_weights import STEMS, StoredWeight


@dataclass
class ExtractedLora:
    """The difference of two checkpoints as a LoRA, and how much of it the LoRA keeps."""

    lora: Lora = field(default_factory=dict)
    kept_energy: float = 0.0
    """Squared norm that the LoRA keeps."""
    total_energy: float = 0.0
    """Squared norm of the difference, over the linear weights."""
    other_tensors: list[str] = field(default_factory=list)
    """Tensors that differ but are not weights of linear modules, so that no LoRA can hold the difference."""


def extract_lora(
    tuned: Path, base: Path, rank: int | None, energy: float, device: torch.device, tick: StepProgress
) -> ExtractedLora:
    """Return the LoRA that leads from checkpoint `base` to `tuned`.

    Args:
        rank: the rank of each module; None takes the lowest that keeps `energy` of its squared difference.

    Raises:
        WeightsError: either is not a Z-Image transformer, their shapes differ, or a difference is not finite.
    """
    extracted = ExtractedLora()
    with transformer.open_weights(tuned) as new, transformer.open_weights(base) as old:
        if new.shape.parameters != old.shape.parameters:
            message = f"has a width of {new.shape.dim} and {new.shape.n_layers} layers"
            hint = f"{base} has {old.shape.dim} and {old.shape.n_layers}: give the checkpoint that it was trained from"
            raise WeightsError(Problem(str(tuned), message, hint, "other-model"))
        for done, name in enumerate(sorted(new.shape.parameters), 1):
            delta = new.get(name).to(device).float() - old.get(name).to(device).float()
            module = name.removesuffix(".weight")
            if not delta.isfinite().all():
                raise WeightsError(
                    Problem(f"{tuned}: {name}", "differs by values that are not finite", code="not-finite")
                )
            if delta.any():
                if module in new.shape.linears and name.endswith(".weight"):
                    factors, kept, total = arithmetic.factorize(delta, rank, energy, module)
                    extracted.lora[module] = factors
                    extracted.kept_energy += kept
                    extracted.total_energy += total
                else:
                    extracted.other_tensors.append(name)
            tick(done, len(new.shape.parameters))
    return extracted


@dataclass
class BakeResult:
    """How many weights were changed, and how much of the change was lost to rounding."""

    changed: int = 0
    squared_delta: float = 0.0
    squared_error: float = 0.0

    def add(self, before: Tensor, after: Tensor, delta: Tensor) -> None:
        """Count the weight `before` that became `after`, when `delta` was meant to be added."""
        self.changed += 1
        self.squared_delta += float(delta.double().square().sum())
        self.squared_error += float((after.double() - before.double() - delta.double()).square().sum())

    @property
    def rounding_error(self) -> float:
        """The norm of the rounding error over the norm of the change."""
        return math.sqrt(self.squared_error / self.squared_delta) if self.squared_delta > 0 else 0.0


def bake_checkpoint(
    source: Path,
    lora: Deltas,
    is_native: bool,
    dtype: str | None,
    output: Path,
    metadata: Mapping[str, str],
    tick: StepProgress,
) -> BakeResult:
    """Write the transformer at `source` with `lora` added to its weights.

    Only the weights of a single output tensor are in memory at a time.

    Args:
        is_native: write a single file with the names of ComfyUI's own model; otherwise `output` is a diffusers folder.
        dtype: the precision of the output; None keeps that of each tensor.

    Raises:
        WeightsError: `source` is not a Z-Image transformer, is quantised and `dtype` None, or a sum is not finite.
        DiskError: the output cannot be written.
    """
    result, done = BakeResult(), 0
    with transformer.open_weights(source) as tensors:
        dtypes = {weight.dtype for weight in tensors.weights.values()}
        # In 8 bits a step between two values is larger than most changes, so the sum would round back to the weight.
        if dtype is None and (narrow := dtypes - COMPUTE_DTYPES):
            message = f"holds {', '.join(sorted(narrow))} tensors, in which a LoRA would be lost to rounding"
            hint = "give --dtype bf16, or bake into a bf16 checkpoint"
            raise WeightsError(Problem(str(source), message, hint, "unsupported-dtype"))

        def bake_tensor(name: str) -> Tensor:
            nonlocal done
            done += 1
            tick(done, len(tensors.weights))
            weight, factors = tensors.get(name), lora.get(name.removesuffix(".weight"))
            torch_dtype = tensorfile.TORCH_DTYPES[dtype] if dtype else weight.dtype
            delta = factors.change(weight) if factors is not None and name.endswith(".weight") else None
            # Summed in fp32 and rounded once: a delta rounded to bf16 beforehand would add an error of its own.
            baked = (weight if delta is None else weight.float() + delta).to(torch_dtype)
            if not baked.isfinite().all():
                is_source = not weight.isfinite().all()
                what = "holds values that are not finite" if is_source else "would not be finite with this LoRA"
                raise WeightsError(Problem(f"{source}: {name}", what, "nothing was written", "not-finite"))
            if delta is not None:
                result.add(weight, baked, delta)
            return baked

        parts = _parts_by_output_name(tensors.weights, is_native)

        def entry_data(output_name: str) -> bytes | memoryview:
            if is_native:
                tensor = torch.cat([bake_tensor(name) for name in parts[output_name]])
            else:
                tensor = bake_tensor(output_name)
            return tensorfile.tensor_entry(tensor).data

        infos: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, names in parts.items():
            infos[name] = _joined_info([tensors.weights[part] for part in names], dtype)
        path = output if is_native else output / f"{STEMS['transformer']}.safetensors"
        safetensors_format.write_safetensors_of(path, infos, entry_data, {"format": "pt", **metadata})
        if not is_native:
            atomic.write_json(output / "config.json", _diffusers_config(tensors.shape))
    return result


def _parts_by_output_name(names: Iterable[str], is_native: bool) -> dict[str, list[str]]:
    """Return name in the output -> names of the tensors that are concatenated there: q, k and v, or a single tensor."""
    if not is_native:
        return {name: [name] for name in names}
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(to_native(name)[0], []).append(name)
    for fused in parts.values():
        fused.sort(key=lambda name: to_native(name)[1] or 0)
    return parts


def _joined_info(weights: list[StoredWeight], dtype: str | None) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of the concatenated tensors; for None, the dtype is promoted as `torch.cat` does."""
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    if dtype is not None:
        return PRECISIONS[dtype], shape
    dtypes = (tensorfile.STORED_DTYPES[weight.dtype] for weight in weights)
    return tensorfile.DTYPE_NAMES[functools.reduce(torch.promote_types, dtypes)], shape


def _diffusers_config(shape: TransformerShape) -> dict[str, object]:
    return {"_class_name": "ZImageTransformer2DModel", **shape.config()}
