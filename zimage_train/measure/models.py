"""Models and batches of random numbers, for whatever measures a step: time and memory do not depend on values."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.config.lora import LoraSettings
from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import targets
from zimage_train.lora.adapters import attach_adapter
from zimage_train.lora.layers import AdapterLayers
from zimage_train.models import transformer
from zimage_train.models.arch import TransformerShape
from zimage_train.models.offload import BlockOffloader, streamed_blocks
from zimage_train.models.quantize import QuantizationStats
from zimage_train.models.transformer import pad_prompt
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.workload import Workload, caption_tokens
from zimage_train.training.batches import Batch
from zimage_train.training.device_plan import apply_recompute_plan

RANK = 16
CAPTION = "a photo of zchar in a sunlit garden, half body, warm light, shallow depth of field"
MEDIUM = TransformerShape(dim=768, n_layers=8, n_heads=6, n_kv_heads=6)
"""Small enough for a CPU, and large enough that its products take most of the time."""


def workload_of(shape: TransformerShape, side: int, dtype: str, gpu: bool) -> Workload:
    """Return the workload of an image of `side` px a step, with a preview of that size."""
    modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
    preview = SamplingRequest(
        prompt=CAPTION, negative="", seed=1, width=side, height=side, steps=8, guidance=0.0, shift=3.0
    )
    return Workload(
        shape=shape,
        dtype=dtype,
        trained=RANK * sum(sum(shape.linears[module]) for module in modules),
        optimizer="adamw",
        sizes=Counter({Bucket(side, side): 1}),
        batch_size=1,
        caption_tokens=caption_tokens(CAPTION),
        previews=(preview,),
        gpu=gpu,
    )


def build_model(
    shape: TransformerShape,
    placement: WeightPlacement,
    dtype: torch.dtype,
    device: torch.device,
    tensors: Iterator[tuple[str, Tensor]],
) -> FrozenTransformer:
    """Return a frozen transformer with the weights `tensors`, quantised and streamed as `placement` says."""
    model = transformer.empty_transformer(shape, dtype, placement.quantization)
    blocks = [model.layers[index] for index in streamed_blocks(shape.n_layers, placement.streamed)]
    ring = BlockOffloader(blocks, device) if blocks else None
    transformer.allocate_transformer(model, device)
    frozen = FrozenTransformer(model, shape, Path("measured"), None, 0, QuantizationStats(), ring)
    frozen.load_tensors(tensors)
    return frozen


def random_tensors(shape: TransformerShape, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights of a transformer, in fp32 and by diffusers' names, the same each time."""
    draw = torch.Generator(device).manual_seed(1)
    for name, size in shape.parameters.items():
        tensor = torch.randn(size, generator=draw, device=device)
        yield name, tensor / size[-1] ** 0.5 if len(size) > 1 else 1.0 + 0.02 * tensor


def random_pair(
    shape: TransformerShape, plan: MemoryPlan, device: torch.device, lora: LoraSettings | None = None
) -> tuple[FrozenTransformer, AdapterLayers]:
    """Return a random model as `plan` has it, and the adapter that is attached to it, by default a LoRA of `RANK`."""
    dtype = torch.bfloat16 if plan.workload.dtype == "bf16" else torch.float32
    frozen = build_model(shape, plan.placement, dtype, device, random_tensors(shape, device))
    modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
    attached = attach_adapter(frozen.model, lora or LoraSettings(rank=RANK), modules, 1)
    apply_recompute_plan(frozen, attached, plan, draws_masks=False)
    return frozen, attached


def random_batch(
    shape: TransformerShape, dtype: torch.dtype, width: int, height: int, tokens: int, seed: int = 2, size: int = 1
) -> Batch:
    """Return a batch of `size` images of width x height px with captions of `tokens` tokens, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    latents = (size, 16, height // 8, width // 8)
    prompts = [torch.randn(tokens, shape.cap_feat_dim, generator=draw).to(dtype) for _ in range(size)]
    return Batch(
        x0=torch.randn(latents, generator=draw),
        noise=torch.randn(latents, generator=draw),
        sigma=torch.rand(size, generator=draw),
        weight=torch.ones(size),
        prompts=[pad_prompt(prompt) for prompt in prompts],
    )
