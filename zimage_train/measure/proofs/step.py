"""The loss and the gradient of a step, against diffusers' model and peft's layers in eager mode."""

import gc
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from zimage_train.config.lora import LoraSettings
from zimage_train.config.schema import Config
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.tensorfile import TORCH_DTYPES
from zimage_train.lora import targets
from zimage_train.lora.adapters import attach_adapter
from zimage_train.measure.models import RANK, random_batch
from zimage_train.measure.proofs.claims import Claim, not_tried
from zimage_train.measure.proofs.encoders import FINER, ROUNDING
from zimage_train.measure.proofs.subject import Subject
from zimage_train.measure.speed import CAPTION_TOKENS, plan_without_limits
from zimage_train.planning import devices
from zimage_train.training.batches import Batch
from zimage_train.training.step_runner import StepRunner

LOSS, GRADIENT = "the loss of a step is that of diffusers and peft", "so is the gradient of every LoRA matrix"
SHARE_OF_MEMORY = 0.7
Factors = dict[str, tuple[Tensor, Tensor]]
"""Module -> A and B of its LoRA."""
Gradients = dict[str, Tensor]


def step_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on a step at the model's own weights, without a training adapter, with a LoRA that is not zero."""
    finer = FINER[subject.dtype]
    count = sum(math.prod(size) for size in subject.shape.parameters.values())
    if count * finer.itemsize > SHARE_OF_MEMORY * main_memory_bytes() or not subject.paths.transformer.is_dir():
        for promise in (LOSS, GRADIENT):
            yield not_tried(promise, "the reference in higher precision needs diffusers' folder and more main memory")
        return
    side = 64 if subject.is_miniature else 512
    batch = random_batch(subject.shape, TORCH_DTYPES[subject.dtype], side, side, CAPTION_TOKENS)
    factors = random_factors(subject)
    own_loss, own = our_step(subject, batch, side, factors)
    rounded_loss, rounded = peft_step(subject, batch, factors, TORCH_DTYPES[subject.dtype], subject.device)
    exact_loss, exact = peft_step(subject, batch, factors, finer, torch.device("cpu"))
    note = f"{side} px in {subject.dtype}"
    loss_bound = ROUNDING * abs(rounded_loss / exact_loss - 1) + torch.finfo(torch.float32).eps
    yield Claim(LOSS, abs(own_loss / exact_loss - 1), "of the loss", loss_bound, "own rounding", note)
    error, rounding = overall(own, exact), overall(rounded, exact)
    yield Claim(GRADIENT, error, "of the norm", ROUNDING * rounding, "own rounding", f"{len(exact)} matrices, {note}")


def random_factors(subject: Subject) -> Factors:
    """Return factors of a LoRA whose change is not zero, the same each time."""
    draw = torch.Generator().manual_seed(3)
    factors: Factors = {}
    for module in targets.select_modules(["attention", "feed_forward"], subject.shape.linears):
        outputs, inputs = subject.shape.linears[module]
        a = torch.randn(RANK, inputs, generator=draw) / inputs**0.5
        factors[module] = (a, 0.01 * torch.randn(outputs, RANK, generator=draw))
    return factors


def our_step(subject: Subject, batch: Batch, side: int, factors: Factors) -> tuple[float, Gradients]:
    """Return the loss and the gradients of A and B as `train` computes them."""
    plan = plan_without_limits(subject.shape, side, subject.dtype, subject.device.type == "cuda")
    frozen = load_frozen(subject.paths.transformer, None, subject.dtype, subject.device)
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
    subject: Subject, batch: Batch, factors: Factors, dtype: torch.dtype, device: torch.device
) -> tuple[float, Gradients]:
    """Return the same of diffusers' model and peft's layers in `dtype`, by autograd; nothing here is ours."""
    model: Any = ZImageTransformer2DModel.from_pretrained(
        subject.paths.transformer, torch_dtype=dtype, local_files_only=True
    )
    model = model.to(device).requires_grad_(False)
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
    prompts = [prompt.embeds[~prompt.is_padding].to(device, dtype) for prompt in batch.prompts]
    time = (1 - sigma.flatten()).to(dtype if dtype != torch.bfloat16 else torch.float32)
    output = model(list(noisy.unsqueeze(2)), time, prompts, return_dict=False)[0]
    velocity = -torch.stack([image.to(torch.promote_types(dtype, torch.float32)) for image in output]).squeeze(2)
    loss = (velocity - (noise - x0)).square().mean()
    loss.backward()
    gradients: Gradients = {}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.cpu()
    return float(loss.detach()), gradients


def overall(found: Gradients, exact: Gradients) -> float:
    """Return the largest relative distance of a matrix; infinite if names or sizes differ."""
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in exact.items()}:
        return math.inf
    return max(
        float((found[name].double() - value.double()).norm() / value.double().norm()) for name, value in exact.items()
    )
