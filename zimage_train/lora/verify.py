"""Verification that diffusers and ComfyUI load the intended deltas from a LoRA file."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from diffusers.loaders import ZImageLoraLoaderMixin
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from zimage_train.errors import Problem, WeightsError, ZImageTrainError, collect_errors
from zimage_train.io import tensorfile
from zimage_train.lora import keys, qkv
from zimage_train.lora.deltas import (
    Delta,
    Deltas,
    Dora,
    Factors,
    Hadamard,
    Kronecker,
    Lora,
    Rotation,
    relative_error,
)
from zimage_train.lora.headers import Sizes
from zimage_train.lora.layers import ADAPTER_NAME
from zimage_train.lora.qkv import Change
from zimage_train.models.arch import TransformerShape
from zimage_train.models.loading import set_parameter

COMFYUI_PARTS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
"""Suffixes of A and B that ComfyUI knows, in the order in which it tries them."""
REPORT_HINT = "zimage-train lora convert FILE --to comfyui"
TOLERANCE = {"bf16": 2**-7, "fp32": 1e-6}
"""Largest relative error of a module's delta that rounding to the file's dtype can explain.

bf16 has 8 significant bits, so rounding costs A and B each at most 2^-8 of a value, and together 2^-7. The errors of
single values average out, so real files stay well below; a wrong scale, or q in place of k, is far above. In fp32 only
the folded scale is rounded.
"""


def verify_export(path: Path, trained: Mapping[str, Delta], dtype: str, shape: TransformerShape) -> float:
    """Return the largest relative error of a module's delta, after loading `path` as diffusers and as ComfyUI do.

    diffusers' own code adds its layers to a transformer of `shape`. It is left out for kinds that it does not read.

    Raises:
        WeightsError: a loader would leave out a module, or load another delta than the trained delta.
    """
    worst = 0.0
    errors: list[ZImageTrainError] = []
    if diffusers_reads(trained):
        with collect_errors(errors):
            worst = _compare(path, f"diffusers {diffusers.__version__}", as_diffusers(path, shape), trained, dtype)
    with collect_errors(errors):
        worst = max(worst, _compare(path, "ComfyUI", as_comfyui(path, shape.linears), trained, dtype))
    if errors:
        raise WeightsError(*(problem for error in errors for problem in error.problems))
    return worst


def diffusers_reads(deltas: Mapping[str, Delta]) -> bool:
    """Return whether the installed diffusers has layers for all `deltas`."""
    return all(isinstance(delta, Factors | Kronecker) for delta in deltas.values())


def _compare(path: Path, loader: str, loaded: Deltas, trained: Mapping[str, Delta], dtype: str) -> float:
    # A fused file gives q, k and v a delta even if only two were trained; the third is zero, and does no harm.
    loaded = {module: delta for module, delta in loaded.items() if module in trained or delta.norm() > 0}
    if loaded.keys() != trained.keys():
        message = f"{loader} would load {len(loaded.keys() & trained.keys())} of {len(trained)} modules"
        raise WeightsError(Problem(str(path), message, REPORT_HINT, "not-verified"))
    errors = {module: relative_error(delta, loaded[module]) for module, delta in trained.items()}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > TOLERANCE[dtype]:
        message = f"{loader} would load {worst} with a relative error of {errors[worst]:.1e}"
        raise WeightsError(Problem(str(path), message, REPORT_HINT, "not-verified"))
    return errors[worst]


def as_diffusers(path: Path, shape: TransformerShape) -> Deltas:
    """Return the deltas of the layers that the installed diffusers adds to a transformer of `shape` for this file.

    Raises:
        WeightsError: diffusers refuses the file.
    """
    model = _hollow_transformer(shape)
    try:
        with _quiet_diffusers():
            state, *_, metadata = ZImageLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
            ZImageLoraLoaderMixin.load_lora_into_transformer(
                state, model, adapter_name=ADAPTER_NAME, metadata=metadata, low_cpu_mem_usage=True
            )
    except Exception as error:  # noqa: BLE001  on an unknown layout its conversion raises KeyError, ValueError and others
        message = f"diffusers {diffusers.__version__} would not load it ({str(error)[:100]})"
        raise WeightsError(Problem(str(path), message, REPORT_HINT, "not-verified")) from None
    loaded: Deltas = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (getattr(layer, part)[ADAPTER_NAME].weight.detach() for part in ("lora_A", "lora_B"))
            loaded[name] = Factors(a, b, layer.scaling[ADAPTER_NAME])
        elif isinstance(layer, LoKrLayer):
            factors: list[tuple[Tensor, ...]] = []
            for names in (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")):
                found = [getattr(layer, part) for part in names]
                factors.append(tuple(matrix[ADAPTER_NAME].detach() for matrix in found if ADAPTER_NAME in matrix))
            loaded[name] = Kronecker(factors[0], factors[1], layer.scaling[ADAPTER_NAME])
    return loaded


def _hollow_transformer(shape: TransformerShape) -> ZImageTransformer2DModel:
    """Return a transformer whose weights are a single zero each, seen as many: they take no memory."""
    with init_empty_weights():
        model = ZImageTransformer2DModel(**shape.config())
    for name, parameter in list(model.named_parameters()):
        set_parameter(model, name, nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    return model


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Within the block, diffusers and peft print nothing: what they leave out is reported here."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # an error is logged before it is raised
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def as_comfyui(path: Path, linears: Sizes) -> Deltas:
    """Return the deltas as ComfyUI reads them; it takes alpha from `.alpha` tensors only, not from the header.

    Transcribed from ComfyUI's `load_lora`, `weight_adapter` and `model_lora_keys_unet`; see `keys.comfyui_targets`.

    Raises:
        WeightsError: ComfyUI would leave out a tensor.
    """
    tensors = tensorfile.load(path)[0]
    loaded: Deltas = {}
    for name, module in keys.comfyui_targets(linears).items():
        change = {part: tensors.pop(f"{name}.{part}") for part in keys.LOKR if f"{name}.{part}" in tensors}
        if change:
            if f"{name}.alpha" in tensors:
                change["alpha"] = tensors.pop(f"{name}.alpha")
            loaded[module] = _comfyui_lokr(change)
        change = {part: tensors.pop(f"{name}.{part}") for part in keys.LOHA if f"{name}.{part}" in tensors}
        if change:
            if f"{name}.alpha" in tensors:
                change["alpha"] = tensors.pop(f"{name}.alpha")
            loaded |= _comfyui_loha(module, change)
        if f"{name}.{keys.OFT}" in tensors:
            tensors.pop(f"{name}.alpha", None)  # a constraint, which files that are read here do not have
            loaded |= _comfyui_oft(module, tensors.pop(f"{name}.{keys.OFT}"))
        for a_suffix, b_suffix in COMFYUI_PARTS:
            if name + a_suffix in tensors and name + b_suffix in tensors:
                change = {"A": tensors.pop(name + a_suffix), "B": tensors.pop(name + b_suffix)}
                if f"{name}.alpha" in tensors:
                    change["alpha"] = tensors.pop(f"{name}.alpha")
                plain = _split_fused(module, change)
                magnitude = tensors.pop(f"{name}.dora_scale", None)
                loaded |= plain if magnitude is None else _comfyui_dora(plain, magnitude)
    # Each tensor that was used has been popped, so the rest is what ComfyUI logs as "lora key not loaded".
    if tensors:
        message = f"ComfyUI would report {len(tensors)} keys as not loaded, such as {sorted(tensors)[0]}"
        raise WeightsError(Problem(str(path), message, REPORT_HINT, "not-verified"))
    return loaded


def _comfyui_lokr(change: Change) -> Kronecker:
    factors: list[tuple[Tensor, ...]] = []
    rank = None
    for name in ("lokr_w1", "lokr_w2"):
        if name in change:
            factors.append((change[name],))
        else:
            factors.append((change[f"{name}_a"], change[f"{name}_b"]))
            rank = change[f"{name}_b"].shape[0]  # the last one counts
    scale = 1.0 if rank is None or "alpha" not in change else float(change["alpha"]) / rank
    return Kronecker(factors[0], factors[1], scale)


def _comfyui_loha(module: str, change: Change) -> Deltas:
    """Return module -> delta; the rows of a fused q, k, v module are divided into three."""
    rank = change["hada_w1_b"].shape[0]
    scale = float(change["alpha"]) / rank if "alpha" in change else 1.0
    b1, a1, b2, a2 = (change[part] for part in keys.LOHA)
    split = keys.split_qkv_names(module)
    if split is None:
        return {module: Hadamard((b1, a1), (b2, a2), scale)}
    thirds = zip(split, b1.chunk(3), b2.chunk(3), strict=True)
    return {name: Hadamard((first, a1), (second, a2), scale) for name, first, second in thirds}


def _comfyui_oft(module: str, blocks: Tensor) -> Deltas:
    """Return module -> delta; the rows of a fused q, k, v module are divided into three."""
    split = keys.split_qkv_names(module) or (module,)
    return {name: Rotation(part) for name, part in zip(split, blocks.chunk(len(split)), strict=True)}


def _comfyui_dora(lora: Lora, magnitude: Tensor) -> Deltas:
    parts = zip(lora.items(), magnitude.reshape(-1).chunk(len(lora)), strict=True)
    return {name: Dora(factors, part.float()) for (name, factors), part in parts}


def _split_fused(module: str, change: Change) -> Lora:
    """Return module -> factors; a fused q, k, v module gives three that share A."""
    split = keys.split_qkv_names(module)
    if split is None:
        return {module: Factors(change["A"], change["B"], qkv.scale_of(change))}
    thirds = change["B"].chunk(3)
    return {name: Factors(change["A"], b, qkv.scale_of(change)) for name, b in zip(split, thirds, strict=True)}
