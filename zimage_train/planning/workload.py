"""The workload of a run: sizes, batches and passes, from which memory and time are predicted (torch-free)."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zimage_train.config.lora import LoraSettings
from zimage_train.config.optimizers import OptimizerName
from zimage_train.config.schema import Config
from zimage_train.config.slider import slider_passes
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.sample_order import SampleOrder, TrainItem
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora.kronecker_shapes import KroneckerShape, shapes_of
from zimage_train.lora.module_shapes import NO_COSTS, ModuleCosts, module_costs, module_parameters
from zimage_train.lora.targets import ranks_of
from zimage_train.models.arch import MAX_PROMPT_TOKENS, TransformerShape, image_tokens, padded_tokens

VAE_CHANNELS = 128
"""Width of the published VAE at full resolution."""
TEMPLATE_TOKENS = 16
"""Tokens of the chat template around a prompt, on the high side."""
BYTES_PER_TOKEN = 3
"""Lower bound on the bytes of UTF-8 per token of prose; English has more than 4."""


@dataclass(frozen=True)
class Workload:
    """The properties of a run that determine its memory and time."""

    shape: TransformerShape
    dtype: str
    trained: int
    """Number of parameters of the LoRA or LoKr."""
    optimizer: OptimizerName
    sizes: Counter[Bucket]
    """Number of items of each size in an epoch."""
    batch_size: int
    """Largest number of samples in a batch, unless `largest_batches` is given."""
    caption_tokens: int
    """Tokens of the longest caption, estimated from its length."""
    previews: tuple[SamplingRequest, ...]
    gpu: bool
    """Whether it runs on a GPU, which takes memory for CUDA and for fragmentation."""
    is_fused: bool = True
    """Whether the blocks of a step are fused; see `fuses_blocks`."""
    vae_channels: int = VAE_CHANNELS
    ema: bool = False
    pissa: bool = False
    """Whether the LoRA has as many fixed values as parameters, in `dtype`, and is exported with both."""
    extra_steps: int = 0
    """Additional forward and backward passes on each batch, in sequence, as for preservation."""
    extra_forwards: float = 0.0
    """Additional passes without a backward on each batch, on average."""
    rank: int = 16
    """Rank of a LoRA; 0 for one of several ranks, and for a LoKr, whose capacity is not a rank."""
    lokr: tuple[KroneckerShape, ...] = ()
    """Shapes of a LoKr's matrices, of each module in `layers`; a LoRA has none."""
    module_costs: ModuleCosts = NO_COSTS
    """Costs of an adapter whose layers run as modules."""
    largest_batches: Mapping[Bucket, int] | None = None
    """Samples of the largest batch of each size, where data entries have batch sizes of their own."""
    batch_weights: Mapping[Bucket, float] | None = None
    """Relative number of batches of each size, where regularization images have a share of their own."""
    held_out: Bucket | None = None
    """Size of the largest validation image."""
    previews_at_once: int = 1
    generated: tuple[SamplingRequest, ...] = ()
    """Images that the model draws before training, to be trained on."""
    preview_lora_bytes: int = 0
    """Bytes of the LoRAs of `sample.extra_loras` and `train.beside`, which previews load besides the run's own."""

    def batch(self, size: Bucket) -> int:
        """Return the number of samples in the largest batch of `size`, which never exceeds the samples of that size."""
        if self.largest_batches is not None:
            return self.largest_batches[size]
        return min(self.sizes[size], self.batch_size)

    def shares(self) -> Mapping[Bucket, float]:
        """Return which fraction of all batches has each size."""
        weights = self.batch_weights
        if not weights:
            weights = {size: count / self.batch(size) for size, count in self.sizes.items() if count}
        total = math.fsum(weights.values())
        return {size: weight / total for size, weight in weights.items()}

    def tokens(self, size: Bucket) -> int:
        """Return the tokens of the largest batch of `size`, image and caption together."""
        return (image_tokens(size.width, size.height) + padded_tokens(self.caption_tokens)) * self.batch(size)

    @property
    def max_tokens(self) -> int:
        """Return the tokens of the largest batch of all sizes."""
        return max(map(self.tokens, self.sizes), default=0)


def make_workload(
    config: Config,
    shape: TransformerShape,
    modules: list[str],
    order: SampleOrder,
    previews: list[SamplingRequest],
    gpu: bool,
    held_out: Iterable[TrainItem] = (),
) -> Workload:
    """Return the workload of training on the items of `order`, with a LoRA on `modules` of a transformer of `shape`."""
    items = order.items
    largest_batches, batch_weights, prior_share = _batch_statistics(order)
    preserves = config.preserve.kind is not None
    slider_steps, slider_forwards = slider_passes(len(config.slider_prompts("")))

    # Captions of a batch are padded to the longest, so the longest of all decides. The same text belongs to an item of
    # each resolution, hence the set.
    texts: set[str] = set()
    for item in items:
        sample = order.longest_sample(item)
        texts.update(filter(None, (sample.prompt, sample.preserve_prompt, *config.slider_prompts(sample.prompt))))
    longest_caption = TEMPLATE_TOKENS if items else MAX_PROMPT_TOKENS
    if texts:
        longest_caption = max(map(caption_tokens, texts))

    return Workload(
        shape=shape,
        dtype=config.model.dtype,
        trained=adapter_parameters(config.lora, shape, modules),
        optimizer=config.optimizer.name,
        sizes=Counter(item.size for item in items),
        batch_size=max(largest_batches.values(), default=config.train.batch_size),
        caption_tokens=longest_caption,
        previews=tuple(previews),
        gpu=gpu,
        is_fused=fuses_blocks(config, modules, gpu),
        ema=config.ema.decay is not None,
        pissa=config.lora.start == "pissa",
        rank=0 if config.lora.type in ("lokr", "oft") or config.lora.ranks else config.lora.rank or 0,
        lokr=tuple(_lokr_shapes(config.lora, shape, modules)),
        module_costs=module_costs(config.lora, shape.linears, modules),
        # Preservation has a batch of its own with a backward, and a forward of the frozen model as its target.
        extra_steps=preserves + slider_steps + config.method.has_pairs,
        extra_forwards=preserves + (config.guidance.contrastive is not None) + prior_share + slider_forwards,
        largest_batches=largest_batches,
        batch_weights=batch_weights,
        held_out=max((item.size for item in held_out), key=lambda size: size.width * size.height, default=None),
    )


def fuses_blocks(config: Config, modules: list[str], gpu: bool) -> bool:
    """Return whether the blocks of a training step are fused (`lora.fused_block`) and do not run as modules.

    Not with dropout, a LoRA on the modulations, or a kind of adapter that has no fused form; and on a GPU with Triton
    only, which torch brings along on Linux.
    """
    has_kernels = not gpu or sys.platform == "linux"
    is_fusible = config.lora.is_fusible and not config.lora.draws_masks
    return has_kernels and is_fusible and not any("adaLN" in module for module in modules)


def _batch_statistics(order: SampleOrder) -> tuple[dict[Bucket, int], dict[Bucket, float], float]:
    """Return the largest batch of each size, the share of batches of each size, and the share that needs a prior.

    A prior is a forward pass without the LoRA, for `regularization: prior` and `mask_prior`.
    """
    largest_batches: dict[Bucket, int] = {}
    batch_weights: dict[Bucket, float] = {}
    prior_share = 0.0
    regularization_share = order.effective_regularization_share
    streams = ((order.concept, 1.0 - regularization_share), (order.regularization, regularization_share))
    for stream, stream_share in streams:
        if stream is None or not stream.items:
            continue
        # A batch holds items of equal size and batch size.
        groups = Counter((item.size, order.batch_size_of(item)) for item in stream.items)
        for (size, batch_size), count in groups.items():
            batches = -(-count // batch_size)
            largest_batches[size] = max(largest_batches.get(size, 0), min(count, batch_size))
            weight = stream_share * batches / stream.micro_batches_per_epoch
            batch_weights[size] = batch_weights.get(size, 0.0) + weight
        with_prior = 0
        for item in stream.items:
            entry = order.entries[item.entry]
            with_prior += entry.regularization == "prior" or entry.mask_prior > 0
        prior_share += stream_share * with_prior / len(stream.items)
    return largest_batches, batch_weights, prior_share


def caption_tokens(prompt: str) -> int:
    """Return the estimated tokens of a prompt with its template, on the high side for prose."""
    # An estimate, because the tokenizer may not be downloaded yet and takes seconds to load.
    return min(TEMPLATE_TOKENS + len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN, MAX_PROMPT_TOKENS)


def adapter_parameters(settings: LoraSettings, shape: TransformerShape, modules: list[str]) -> int:
    """Return the number of parameters of the adapter that `settings` describe, on `modules`."""
    if settings.type == "lokr":
        return sum(kronecker.numel for kronecker in shapes_of(settings, shape.linears, modules).values())
    if settings.type != "lora":
        return module_parameters(settings, shape.linears, modules)
    return sum(lora_parameters(shape, [module], rank) for module, rank in ranks_of(settings, modules).items())


def _lokr_shapes(settings: LoraSettings, shape: TransformerShape, modules: list[str]) -> list[KroneckerShape]:
    if settings.type != "lokr":
        return []
    return list(shapes_of(settings, shape.linears, [name for name in modules if name.startswith("layers.")]).values())


def lora_parameters(shape: TransformerShape, modules: Iterable[str], rank: int) -> int:
    """Return the number of parameters of a LoRA on `modules`: A is (rank, in) and B is (out, rank)."""
    return rank * sum(sum(shape.linears[module]) for module in modules)
