"""How much arithmetic and memory traffic a training step and a preview take, and how long that is (torch-free).

Matrix products count two operations per weight and token; attention, taken as fused, 4 T^2 d forward and 10 T^2 d
backward per block. Frozen weights need no gradient, so the backward of their products costs as much as the forward, and
nothing before the first LoRA has a backward. Tests count the same on the real graph.
"""

from functools import cache

from zimage_train.config.types import RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.models.arch import TransformerShape, image_tokens, padded_tokens
from zimage_train.planning.gpus import GpuSpec
from zimage_train.planning.memory import WeightPlacement, Workload, block_bytes, parameter_count
from zimage_train.planning.recompute_costs import RECOMPUTE_COSTS

CAPTION_TOKENS = 64
"""A typical caption."""
REACHED_SHARE = 0.9
"""Of a card's arithmetic and bandwidth, by kernels that have enough to do."""
TRAFFIC_AROUND = 545
"""The same for all that is not a layer."""
UNPACKING = 7
"""Bytes moved to unpack one weight: one read, two written, two read, two written."""
LAUNCH_SECONDS = 6e-6


def forward_flops(shape: TransformerShape, size: Bucket) -> float:
    """Operations of one forward pass on one image of `size` px."""
    linear, attention = _layers(shape, size)
    return linear + attention + _before_the_layers(shape, size)


def step_flops(shape: TransformerShape, size: Bucket, mode: RecomputeMode) -> float:
    """Operations of forward and backward on one sample; the LoRA's own, about 1 %, are left out."""
    linear, attention = _layers(shape, size)
    again = linear * _recomputed_share(shape, mode)
    if RECOMPUTE_COSTS[mode].recomputes_attention:
        again += attention
    return forward_flops(shape, size) + linear + 2.5 * attention + again


def step_seconds(job: Workload, form: WeightPlacement, mode: RecomputeMode, size: Bucket, card: GpuSpec) -> float:
    """Seconds of one training step on a full batch of `size`, with all that preservation and priors add to it."""
    more = job.extra_forwards * forward_seconds(job, form, size, job.batch(size), card)
    return (1 + job.extra_steps) * _pass_seconds(job, form, mode, size, card) + more


def _pass_seconds(job: Workload, form: WeightPlacement, mode: RecomputeMode, size: Bucket, card: GpuSpec) -> float:
    """Seconds of one pass forward and backward."""
    shape, batch = job.shape, job.batch(size)
    tokens = (_tokens(size) + padded_tokens(CAPTION_TOKENS)) * batch
    moved = (shape.n_layers * RECOMPUTE_COSTS[mode].traffic_bytes + TRAFFIC_AROUND) * shape.dim * tokens
    if form.kind is not None:
        unpacked = 2.0 + _recomputed_share(shape, mode)  # forward, backward, and what is computed again
        moved += unpacked * UNPACKING * shape.n_layers * _block_weights(shape)
    computing = step_flops(shape, size, mode) * batch / (REACHED_SHARE * card.tflops * 1e12)
    moving = moved / (REACHED_SHARE * card.gb_per_second * 1e9)
    launching = RECOMPUTE_COSTS[mode].kernels * shape.n_layers * LAUNCH_SECONDS
    return max(computing + moving, launching, 2 * _streaming_seconds(job, form, card))


def preview_seconds(job: Workload, form: WeightPlacement, recipe: SamplingRequest, card: GpuSpec) -> float:
    """Seconds of sampling one image; decoding takes less than one of its steps."""
    batch = 2 if recipe.guidance > 0 else 1
    return recipe.steps * forward_seconds(job, form, Bucket(recipe.width, recipe.height), batch, card)


def forward_seconds(job: Workload, form: WeightPlacement, size: Bucket, batch: int, card: GpuSpec) -> float:
    """Seconds of one pass forward, which keeps nothing, on so many images of `size`."""
    tokens = (_tokens(size) + padded_tokens(CAPTION_TOKENS)) * batch
    computing = forward_flops(job.shape, size) * batch / (REACHED_SHARE * card.tflops * 1e12)
    moving = (
        RECOMPUTE_COSTS["none"].traffic_bytes
        / 3
        * job.shape.n_layers
        * job.shape.dim
        * tokens
        / (REACHED_SHARE * card.gb_per_second * 1e9)
    )
    return max(computing + moving, _streaming_seconds(job, form, card))


def _streaming_seconds(job: Workload, form: WeightPlacement, card: GpuSpec) -> float:
    """Seconds of copying in one pass; the blocks that the ring holds across a turn are not copied again."""
    return max(form.streamed - 2, 0) * block_bytes(job, form.kind) / (REACHED_SHARE * card.pcie_gb_per_second * 1e9)


def _layers(shape: TransformerShape, size: Bucket) -> tuple[float, float]:
    tokens = _tokens(size) + padded_tokens(CAPTION_TOKENS)
    return _products(shape, "layers", tokens), _attention(shape, shape.n_layers, tokens)


def _before_the_layers(shape: TransformerShape, size: Bucket) -> float:
    parts = (
        ("noise_refiner", _tokens(size)),
        ("context_refiner", padded_tokens(CAPTION_TOKENS)),
    )
    return sum(
        _products(shape, name, tokens) + _attention(shape, shape.n_refiner_layers, tokens) for name, tokens in parts
    )


def _products(shape: TransformerShape, part: str, tokens: int) -> float:
    return 2.0 * _weights(shape, part) * tokens


@cache
def _weights(shape: TransformerShape, part: str) -> int:
    """Modulations are left out: they see one vector an image and not one a token."""
    return sum(
        parameter_count(parameter)
        for name, parameter in shape.parameters.items()
        if name.startswith(f"{part}.") and len(parameter) == 2 and "adaLN" not in name
    )


def _block_weights(shape: TransformerShape) -> int:
    return 4 * shape.dim**2 + 3 * shape.dim * shape.ffn_dim


def _recomputed_share(shape: TransformerShape, mode: RecomputeMode) -> float:
    """Return the share of a block's products that `mode` computes a second time."""
    products = RECOMPUTE_COSTS[mode].recomputed_products
    if products == "wide":
        return _wide_share(shape)
    return 1.0 if products == "all" else 0.0


def _wide_share(shape: TransformerShape) -> float:
    """Of a block's weights, those of w1 and w3."""
    return 2 * shape.dim * shape.ffn_dim / _block_weights(shape)


def _attention(shape: TransformerShape, blocks: int, tokens: int) -> float:
    return blocks * 4.0 * shape.dim * float(tokens) ** 2


def _tokens(size: Bucket) -> int:
    return image_tokens(size.width, size.height)
