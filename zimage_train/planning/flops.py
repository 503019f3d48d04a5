"""Arithmetic and memory traffic of a training step and of a preview, and the time that they take (torch-free).

A matrix product takes two operations per weight and token. Attention, taken as fused, takes 4 T^2 d operations forward
and 10 T^2 d backward per block, for T tokens of width d. Frozen weights need no gradient, so the backward of a product
costs as much as its forward and not twice as much, and nothing before the first LoRA has a backward.
tests/planning/test_flops.py compares the operations with those that torch counts on the real graph.

Time is a roofline: arithmetic and memory traffic in sequence, or kernel launches, or copies over PCIe, whichever takes
longest. `TIME_INTERVAL` says how far off it was; calibration.py corrects it by runs on the same machine.
"""

from functools import cache

from zimage_train.config.types import RecomputeMode
from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.models.arch import TransformerShape, image_tokens, padded_tokens
from zimage_train.models.pinned_memory import DEVICE_SLOTS
from zimage_train.planning.gpus import GpuSpec
from zimage_train.planning.memory import WeightPlacement, block_bytes, parameter_count
from zimage_train.planning.recompute_costs import MODULE_COSTS, recompute_costs
from zimage_train.planning.workload import Workload

CAPTION_TOKENS = 64
"""Length of a typical caption. Time depends on the average caption, memory on the longest."""
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.7, 0.45, 0.9
"""Fraction of a data sheet's arithmetic that matrix products reach, and attention's forward; and of its bandwidth that
other kernels reach. Chosen to give back the steps of docs/bench/repeat.json."""
OTHER_TRAFFIC_BYTES = {True: 130, False: 545}
"""Fused or not: bytes per token and unit of `dim`, as `RecomputeCost.traffic_bytes`, for embedders, refiners and the
final layer."""
UNPACK_BYTES = 3
"""Bytes moved to unpack a quantised weight to bf16: 1 read, 2 written."""
FP8_RATE, FP8_BYTES = 1.6, 56
"""How many times as fast as in bf16 products are in fp8, and what rounding their inputs to fp8 moves, in bytes per
token and unit of `dim`. An estimate: the data sheets say 2, and no card was measured."""
LOKR_BYTES = 18
"""Bytes that a LoKr's own products move in a step, per token and number between the two of a forward. Its small matrix
makes them wait for memory. Counted at full size (tests/measure/test_counting.py); no card was measured."""
FIXED_ORDER_SHARE, FREE_ORDER_SHARE = 0.25, 0.55
"""Fraction of a data sheet's arithmetic that attention's backward reaches with sums in a fixed order, and without.

From whole steps of both at 1024 px on an H100 (docs/bench/repeat.json), where the first was 0.17. Since then it runs on
groups of heads (`attention.head_groups`), which should take 9 units of time for 13. No other card was measured.
"""
LAUNCH_SECONDS = 40e-6
"""Time in which Python launches a kernel. Fitted to 17 runs on an H100, most of which waited for Python; leaving out
each of them gives the same (tests/planning/test_flops.py)."""
FORWARD_KERNELS = 102
"""Kernels of a block's forward as a module."""
TIME_INTERVAL = (0.55, 1.65)
"""Measured for predicted time of those runs, at the least and at the most; that of 13 of them is 0.8 to 1.15."""
MEASURED_CARDS = ("h100",)


def forward_flops(shape: TransformerShape, size: Bucket) -> float:
    """Return the operations of a forward pass on an image of `size` px."""
    linear, attention = _layer_flops(shape, size)
    return linear + attention + _refiner_flops(shape, size)


def step_flops(shape: TransformerShape, size: Bucket, mode: RecomputeMode) -> float:
    """Return the operations of forward and backward on a sample, without the LoRA's own, which are about 1 %."""
    linear, attention = _layer_flops(shape, size)
    recomputed = linear * _recomputed_share(shape, mode)
    if MODULE_COSTS[mode].recomputes_attention:
        recomputed += attention
    # Forward, backward of the products, backward of attention (five products of tokens by tokens where the forward has
    # two), and what is computed a second time.
    return forward_flops(shape, size) + linear + 2.5 * attention + recomputed


def step_seconds(
    workload: Workload, placement: WeightPlacement, mode: RecomputeMode, size: Bucket, card: GpuSpec
) -> float:
    """Return the seconds of a training step on a full batch of `size`, with the passes of preservation and priors."""
    forward = forward_seconds(workload, placement, size, workload.batch(size), card)
    forward_backward = _forward_backward_seconds(workload, placement, mode, size, card)
    return (1 + workload.extra_steps) * forward_backward + workload.extra_forwards * forward


def _forward_backward_seconds(
    workload: Workload, placement: WeightPlacement, mode: RecomputeMode, size: Bucket, card: GpuSpec
) -> float:
    shape, batch = workload.shape, workload.batch(size)
    tokens = (_image_tokens(size) + padded_tokens(CAPTION_TOKENS)) * batch
    cost = recompute_costs(workload.is_fused)[mode]
    moved = (shape.n_layers * cost.traffic_bytes + OTHER_TRAFFIC_BYTES[workload.is_fused]) * shape.dim * tokens
    if placement.quantization == "fp8_fast":
        # A byte read and one written: the weight is transposed for the backward.
        moved += 2 * shape.n_layers * _block_weights(shape) + FP8_BYTES * shape.n_layers * shape.dim * tokens
    elif placement.quantization is not None:
        # Weights are unpacked for the forward, for the backward, and for the products that are recomputed. Nothing
        # dense is kept in between.
        unpacked = 2.0 + _recomputed_share(shape, mode)
        moved += unpacked * UNPACK_BYTES * shape.n_layers * _block_weights(shape)
    _, attention = _layer_flops(shape, size)
    backward = 2.5 * attention
    recomputed = attention if cost.recomputes_attention else 0.0
    forward = attention + _refiner_attention(shape, size) + recomputed
    products = step_flops(shape, size, mode) - backward - forward
    # A LoKr's backward has two products for each of the forward's, and the smaller of the forward's once more.
    passes = 3.5 + _recomputed_share(shape, mode)
    products += passes * 2.0 * sum(kronecker.products for kronecker in workload.lokr) * tokens / batch
    moved += passes / 3.5 * LOKR_BYTES * sum(kronecker.between for kronecker in workload.lokr) * tokens
    own = workload.module_costs
    products += 2.0 * (own.products + _recomputed_share(shape, mode) * own.forward_products) * tokens / batch
    moved += own.moved + own.moved_for_token * tokens
    if placement.quantization == "fp8_fast":
        products /= FP8_RATE
    at_full_rate = products / PRODUCT_SHARE + forward / ATTENTION_SHARE + backward / FIXED_ORDER_SHARE
    computing = at_full_rate * batch / (card.tflops * 1e12)
    moving = moved / (BANDWIDTH_SHARE * card.gb_per_second * 1e9)
    # Python launches the kernels one by one, unless a CUDA graph does, as it can for fused blocks.
    is_launched = workload.gpu and not workload.is_fused
    launching = cost.kernels * shape.n_layers * LAUNCH_SECONDS * is_launched
    # Copies overlap with computing, in the forward and again in the backward.
    return max(computing + moving, launching, 2 * _streaming_seconds(workload, placement, card))


def reproducible_seconds(workload: Workload, size: Bucket, card: GpuSpec) -> float:
    """Return the seconds that a fixed order of sums adds to a step on a full batch of `size`; an estimate."""
    shape, batch = workload.shape, workload.batch(size)
    backward = 2.5 * _layer_flops(shape, size)[1] * batch * (1 + workload.extra_steps)
    return backward / (card.tflops * 1e12) * (1 / FIXED_ORDER_SHARE - 1 / FREE_ORDER_SHARE)


def preview_seconds(workload: Workload, placement: WeightPlacement, request: SamplingRequest, card: GpuSpec) -> float:
    """Return the seconds of sampling an image; decoding it takes less than a step and is left out."""
    batch = 2 if request.guidance > 0 else 1
    size = Bucket(request.width, request.height)
    return request.steps * forward_seconds(workload, placement, size, batch, card)


def forward_seconds(workload: Workload, placement: WeightPlacement, size: Bucket, batch: int, card: GpuSpec) -> float:
    """Return the seconds of a forward pass, without gradients, on a batch of images of `size`."""
    shape = workload.shape
    tokens = (_image_tokens(size) + padded_tokens(CAPTION_TOKENS)) * batch
    attention = _layer_flops(shape, size)[1] + _refiner_attention(shape, size)
    products = forward_flops(shape, size) - attention
    computing = (products / PRODUCT_SHARE + attention / ATTENTION_SHARE) * batch / (card.tflops * 1e12)
    # Previews run as modules. About a third of the traffic of their forward and backward belongs to the forward.
    traffic_bytes = MODULE_COSTS["none"].traffic_bytes / 3
    moving = traffic_bytes * shape.n_layers * shape.dim * tokens / (BANDWIDTH_SHARE * card.gb_per_second * 1e9)
    launching = FORWARD_KERNELS * shape.n_layers * LAUNCH_SECONDS * workload.gpu
    return max(computing + moving, launching, _streaming_seconds(workload, placement, card))


def _streaming_seconds(workload: Workload, placement: WeightPlacement, card: GpuSpec) -> float:
    """Return the seconds of copying the streamed blocks to the device once."""
    # Between forward and backward, the blocks in the slots are the next blocks needed, and are not copied again.
    copied = max(placement.streamed - DEVICE_SLOTS, 0)
    return copied * block_bytes(workload, placement.quantization) / (BANDWIDTH_SHARE * card.pcie_gb_per_second * 1e9)


def _layer_flops(shape: TransformerShape, size: Bucket) -> tuple[float, float]:
    """Return the operations of the products and of the attention in `layers`, where image and caption are joined."""
    tokens = _image_tokens(size) + padded_tokens(CAPTION_TOKENS)
    return _product_flops(shape, "layers", tokens), _attention_flops(shape, shape.n_layers, tokens)


def _refiner_flops(shape: TransformerShape, size: Bucket) -> float:
    """Return the operations of the refiners, which see image and caption apart, before `layers`."""
    total = 0.0
    for part, tokens in (("noise_refiner", _image_tokens(size)), ("context_refiner", padded_tokens(CAPTION_TOKENS))):
        total += _product_flops(shape, part, tokens) + _attention_flops(shape, shape.n_refiner_layers, tokens)
    return total


def _refiner_attention(shape: TransformerShape, size: Bucket) -> float:
    parts = (_image_tokens(size), padded_tokens(CAPTION_TOKENS))
    return sum(_attention_flops(shape, shape.n_refiner_layers, tokens) for tokens in parts)


def _product_flops(shape: TransformerShape, part: str, tokens: int) -> float:
    return 2.0 * _weight_count(shape, part) * tokens


def _attention_flops(shape: TransformerShape, blocks: int, tokens: int) -> float:
    return blocks * 4.0 * shape.dim * float(tokens) ** 2


@cache  # every placement and batch size asks for the same few values
def _weight_count(shape: TransformerShape, part: str) -> int:
    """Return the number of weights that multiply every token in `part`."""
    total = 0
    for name, size in shape.parameters.items():
        # Modulations are left out: they multiply a single vector per image.
        if name.startswith(f"{part}.") and len(size) == 2 and "adaLN" not in name:
            total += parameter_count(size)
    return total


def _block_weights(shape: TransformerShape) -> int:
    """Return the number of weights of a block: q, k, v and out, and the three products of the feed forward."""
    return 4 * shape.dim**2 + 3 * shape.dim * shape.ffn_dim


def _recomputed_share(shape: TransformerShape, mode: RecomputeMode) -> float:
    """Return the fraction of a block's products that `mode` computes a second time."""
    products = MODULE_COSTS[mode].recomputed_products
    if products == "none":
        return 0.0
    if products == "all":
        return 1.0
    return 2 * shape.dim * shape.ffn_dim / _block_weights(shape)  # w1 and w3


def _image_tokens(size: Bucket) -> int:
    return image_tokens(size.width, size.height)
