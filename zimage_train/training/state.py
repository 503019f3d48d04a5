"""Everything that one run works with, in one frozen place; the loop passes it on and changes none of it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zimage_train.config.schema import Config
from zimage_train.dataset import masks, tensor_cache
from zimage_train.dataset.sample_order import MicroBatch, SampleOrder, TrainItem
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.diffusion.drift import DriftMeter
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.lora import arithmetic, swap
from zimage_train.lora.layers import LoraLayers
from zimage_train.lora.lora_file import Lora
from zimage_train.optim.ema import Ema
from zimage_train.planning import planner
from zimage_train.report.console import Console
from zimage_train.report.trackers import Trackers
from zimage_train.training.distributed import World
from zimage_train.training.loss import Batch, BatchExtras, make_batch, mask_weights, outside_weights
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.run_dir import RunDir
from zimage_train.training.self_distill import GeneratedData, imitation_batch
from zimage_train.training.signals import StopRequest
from zimage_train.training.step_timer import SlowStepDetector


@dataclass(frozen=True)
class ModelDigests:
    """Contents of the model's parts."""

    model: str
    adapter: str | None
    text_encoder: str
    vae: str
    init_from: str | None = None
    """Of the LoRA that the training begins with."""


@dataclass(frozen=True)
class CachedDataset:
    """Cached latents and embeddings, found by content."""

    cache: TensorCache
    digests: ModelDigests
    dtype: str
    generated: GeneratedData | None = None
    """What the model draws itself, where that is trained on in place of images."""
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def latents(self, item: TrainItem) -> Tensor:
        """What `item` is trained on."""
        if self.generated is not None:
            return tensor_cache.read_required(self.cache, self.generated.key(item), str(item.image.path))
        return self.image(item)

    def image(self, item: TrainItem) -> Tensor:
        """The latents of its image."""
        key = tensor_cache.latent_key(item.image, item.size, item.flip, self.digests.vae)
        return tensor_cache.read_required(self.cache, key, str(item.image.path))

    def embeds(self, prompt: str) -> Tensor:
        key = tensor_cache.prompt_key(prompt, self.digests.text_encoder, self.dtype)
        return tensor_cache.read_required(self.cache, key, f"prompt {prompt[:40]!r}")

    def mask(self, item: TrainItem) -> Tensor | None:
        """(1, h/8, w/8) in [0, 1]; made once and kept as bytes."""
        image = item.image
        if image.mask is None:
            return None
        key = (image.digest, image.mask.digest, item.size, item.flip)
        if key not in self.masks:
            made = masks.mask_on_latents(image.mask, item.size, item.flip, image.digest)
            self.masks[key] = (torch.from_numpy(made) * 255.0).round().to(torch.uint8)
        return self.masks[key].unsqueeze(0).float() / 255.0


@dataclass(frozen=True)
class TrainState:
    """One run of one process."""

    config: Config
    folder: RunDir
    identity: Mapping[str, Any]
    """What makes this run itself; see `run_folder.identity`."""
    world: World
    order: SampleOrder
    memory_plan: planner.MemoryPlan
    """How it fits the device."""
    dataset: CachedDataset
    frozen: FrozenTransformer
    lora: LoraLayers
    ema: Ema | None
    optimizer: Optimizer
    held_out: list[TrainItem]
    """What validation looks at."""
    extras: Path
    preview_sets: list[PreviewSet]
    extra_loras: list[tuple[Lora, float]]
    """What previews have besides the LoRA that is trained, with their weights."""
    preview_embeds: Mapping[str, Tensor]
    drift_meter: DriftMeter | None
    """Of the drift from Turbo's own steps; None where there are none to drift from, or no previews."""
    export_metadata: Mapping[str, str]
    warnings: list[str]
    start_step: int
    """The last step that is done."""
    console: Console
    trackers: Trackers
    stop: StopRequest
    slow_steps: SlowStepDetector

    def with_preview_loras(self, trained: Lora) -> AbstractContextManager[None]:
        """Within the block the model has `trained` and the LoRAs that previews have besides, and nothing else."""
        return swap.replaced_lora(self.frozen.model, arithmetic.stack_loras([(trained, 1.0), *self.extra_loras]))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this process trains on in `step`."""
        return self.order.step_batches(step)[self.world.rank :: self.world.world_size]

    def load(self, samples: MicroBatch) -> Batch:
        """Read, draw and put together one micro-batch, on the CPU."""
        latents = [self.dataset.latents(sample.item) for sample in samples]
        embeds = [self.dataset.embeds(sample.prompt) for sample in samples]
        extras = self._extras(samples, latents[0].shape)
        if self.dataset.generated is not None and self.dataset.generated.imitates:
            return imitation_batch(self.dataset.generated, samples, latents, embeds, extras)
        return make_batch(self.config, samples, latents, embeds, extras)

    def _extras(self, samples: MicroBatch, shape: torch.Size) -> BatchExtras:
        entries = [self.config.data[sample.item.entry] for sample in samples]
        masks = [self.dataset.mask(sample.item) for sample in samples]
        to_prior = [entry.regularization == "prior" for entry in entries]
        held = [self.dataset.embeds(sample.preserve_prompt) for sample in samples if sample.preserve_prompt is not None]
        return BatchExtras(
            mask=mask_weights(masks, [entry.mask_floor for entry in entries], shape),
            outside=outside_weights(masks, [entry.mask_prior for entry in entries], shape),
            to_prior=torch.tensor(to_prior) if any(to_prior) else None,
            preserve_embeds=held or None,
            empty_embeds=self.dataset.embeds("") if self.config.guidance.contrastive is not None else None,
        )


def is_due(every: int | None, step: int, last: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`; if on at all, the last step counts."""
    return every is not None and (step % every == 0 or step == last)
