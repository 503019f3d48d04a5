"""The loss and the gradient of a step, against diffusers' model and peft's layers in eager mode."""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor

from zimage_train.config.lora import LoraSettings
from zimage_train.config.schema import Config
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.lora import targets
from zimage_train.lora.adapters import attach_adapter
from zimage_train.measure.models import RANK, build_model, random_batch, workload_of
from zimage_train.measure.peers import set_weights
from zimage_train.measure.proofs.claims import Claim, largest, not_tried
from zimage_train.measure.proofs.encoders import FINER, ROUNDING, relative
from zimage_train.measure.proofs.subject import Subject
from zimage_train.measure.speed import CAPTION_TOKENS, plan_without_limits, without_padding
from zimage_train.models import transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import devices, memory
from zimage_train.planning.memory import WeightPlacement
from zimage_train.training.batches import Batch
from zimage_train.training.step_runner import StepRunner

LOSS = "the loss of a step is that of diffusers and peft"
GRADIENT = "the gradient of every LoRA matrix is that of diffusers and peft"
QUICK_BLOCKS = 6
"""Blocks that the quick form compares, since the finer reference may run on the processor."""
Factors = dict[str, tuple[Tensor, Tensor]]
"""Module -> A and B of its LoRA."""
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class ReferenceStep:
    """A step of the reference."""

    loss: float
    residual: Tensor
    """The velocity less its target, (b, 16, h/8, w/8)."""
    gradients: Gradients


def step_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on a step at the model's own weights, without a training adapter, with a LoRA that is not zero."""
    side, dtype, finer = subject.side, TORCH_DTYPES[subject.dtype], FINER[subject.dtype]
    shape = blocks_to_compare(subject)
    if shape is None:
        for promise in (LOSS, GRADIENT):
            yield not_tried(promise, "not even one block of the reference fits")
        return
    batch = random_batch(shape, dtype, side, side, CAPTION_TOKENS)
    factors = random_factors(shape)
    loss, gradients = our_step(subject, shape, batch, factors)
    rounded = peft_step(subject, shape, batch, factors, dtype, subject.device)
    fits_device = exact_bytes(subject, shape) <= subject.device_bytes
    exact_device = subject.device if fits_device else torch.device("cpu")
    exact = peft_step(subject, shape, batch, factors, finer, exact_device)
    is_cut_short = subject.is_quick and shape.n_layers == QUICK_BLOCKS
    blocks = subject.blocks_note(shape, "in the quick form") if is_cut_short else subject.blocks_note(shape)
    note = f"{side} px in {subject.dtype}{blocks}"
    # The loss is |residual|^2, so a residual that is off by a share of it changes the loss by about twice that at the
    # most. The rounding of the reference's loss is no bound: it may be 0 by chance.
    residual_rounding = relative(rounded.residual, exact.residual)
    bound = (1 + ROUNDING * residual_rounding) ** 2 - 1 + torch.finfo(torch.float32).eps
    yield Claim(LOSS, abs(loss / exact.loss - 1), "of the loss", bound, "own rounding", note)
    error, rounding = largest_distance(gradients, exact.gradients), largest_distance(rounded.gradients, exact.gradients)
    note = f"{len(exact.gradients)} matrices, {note}"
    yield Claim(GRADIENT, error, "of the norm", ROUNDING * rounding, "own rounding", note)


def blocks_to_compare(subject: Subject) -> TransformerShape | None:
    """Return the shape with as many blocks as the reference can have, in both precisions; a few in the quick form."""
    in_dtype = subject.first_blocks(lambda shape: reference_bytes(subject, shape, subject.dtype), subject.device_bytes)
    available = max(subject.device_bytes, subject.host_bytes)
    exact = subject.first_blocks(lambda shape: exact_bytes(subject, shape), available)
    if in_dtype is None or exact is None:
        return None
    most = QUICK_BLOCKS if subject.is_quick else subject.shape.n_layers
    return replace(subject.shape, n_layers=min(in_dtype.n_layers, exact.n_layers, most))


def exact_bytes(subject: Subject, shape: TransformerShape) -> float:
    """Return the bytes of the reference's step in the finer precision."""
    wider = FINER[subject.dtype].itemsize / torch.float32.itemsize  # the planner knows nothing of fp64
    return wider * reference_bytes(subject, shape, "fp32")


def reference_bytes(subject: Subject, shape: TransformerShape, dtype: str, side: int | None = None) -> float:
    """Return the bytes of a step of diffusers and peft, which recompute nothing."""
    workload = replace(workload_of(shape, side or subject.side, dtype, subject.device.type == "cuda"), is_fused=False)
    return memory.step_memory(workload, WeightPlacement(), "none", workload.max_tokens).total


def random_factors(shape: TransformerShape) -> Factors:
    """Return factors of a LoRA whose change is not zero, the same each time."""
    draw = torch.Generator().manual_seed(3)
    factors: Factors = {}
    for module in targets.select_modules(["attention", "feed_forward"], shape.linears):
        outputs, inputs = shape.linears[module]
        a = torch.randn(RANK, inputs, generator=draw) / inputs**0.5
        factors[module] = (a, 0.01 * torch.randn(outputs, RANK, generator=draw))
    return factors


def our_step(subject: Subject, shape: TransformerShape, batch: Batch, factors: Factors) -> tuple[float, Gradients]:
    """Return the loss and the gradients of A and B as `train` computes them."""
    plan = plan_without_limits(shape, subject.side, subject.dtype, subject.device.type == "cuda")
    tensors = transformer.read_selected_weights(subject.paths.transformer, set(shape.parameters))
    frozen = build_model(shape, WeightPlacement(), TORCH_DTYPES[subject.dtype], subject.device, tensors)
    attached: Any = attach_adapter(frozen.model, LoraSettings(rank=RANK), list(factors), 1)
    with torch.no_grad():
        for module, (a, b) in factors.items():
            attached.a[module].copy_(a)
            attached.b[module].copy_(b)
    config = Config.model_validate({"name": "proved", "data": [{"folder": "nowhere"}]})
    frozen.model.train()
    with devices.reproducible(subject.device):
        values = StepRunner(config, frozen, attached, plan, None)(batch, 1.0)
    gradients: Gradients = {}
    for name, gradient in attached.name_views(attached.flat.grads).items():
        gradients[name] = gradient.detach().cpu().clone()
    loss = float(values[0])
    del frozen, attached
    gc.collect()
    return loss, gradients


def peft_step(
    subject: Subject, shape: TransformerShape, batch: Batch, factors: Factors, dtype: torch.dtype, device: torch.device
) -> ReferenceStep:
    """Return a step of diffusers' model and peft's layers in `dtype`, by autograd; nothing here is ours."""
    with init_empty_weights():
        model: Any = ZImageTransformer2DModel(**shape.config())
    set_weights(model, stored_tensors(subject.paths.transformer, set(shape.parameters)), dtype, device)
    model.train()
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(factors)), model)
    trained: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        layer = model.get_submodule(module)
        for letter, value in (("A", a), ("B", b)):
            parameter = getattr(layer, f"lora_{letter}")["default"].weight
            parameter.data = value.to(device, dtype)
            trained[f"lora.{module}.{letter}"] = parameter.requires_grad_(True)
    sigma = batch.sigma.to(device, torch.float64).view(-1, 1, 1, 1)
    x0, noise = batch.x0.to(device, torch.float64), batch.noise.to(device, torch.float64)
    noisy = (x0 + sigma * (noise - x0)).to(dtype)
    prompts = [without_padding(prompt).to(device, dtype) for prompt in batch.prompts]
    time = (1 - sigma.flatten()).to(dtype if dtype != torch.bfloat16 else torch.float32)
    output = model(list(noisy.unsqueeze(2)), time, prompts, return_dict=False)[0]
    velocity = -torch.stack([image.to(torch.promote_types(dtype, torch.float32)) for image in output]).squeeze(2)
    residual = velocity - (noise - x0)
    loss = residual.square().mean()
    loss.backward()
    gradients: Gradients = {}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.cpu()
    del model, output
    gc.collect()
    return ReferenceStep(float(loss.detach()), residual.detach().cpu(), gradients)


def stored_tensors(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors `names` of a transformer; those of diffusers' folder without the reader of this project."""
    if not path.is_dir():
        yield from transformer.read_selected_weights(path, names)
        return
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(names & set(opened.keys())):
                yield name, opened.get_tensor(name)


def largest_distance(found: Gradients, exact: Gradients) -> float:
    """Return the largest relative distance of a matrix; infinite if names or sizes differ."""
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in exact.items()}:
        return math.inf
    return largest(
        float((found[name].double() - value.double()).norm() / value.double().norm()) for name, value in exact.items()
    )
