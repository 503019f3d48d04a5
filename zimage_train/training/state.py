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
from zimage_train.dataset import masks
from zimage_train.dataset import tensor_cache as caching
from zimage_train.dataset.sample_order import Item, MicroBatch, Plan
from zimage_train.dataset.tensor_cache import Cache
from zimage_train.diffusion.drift import Meter
from zimage_train.diffusion.frozen import Frozen
from zimage_train.lora import arithmetic, swap
from zimage_train.lora.layers import Attached
from zimage_train.lora.lora_file import Lora
from zimage_train.optim.ema import Ema
from zimage_train.planning import planner as memory_planner
from zimage_train.report.console import Console
from zimage_train.report.trackers import Trackers
from zimage_train.training.distributed import World
from zimage_train.training.loss import Batch, Extras, make_batch, mask_weights, outside_weights
from zimage_train.training.preview_sets import View
from zimage_train.training.run_dir import RunFolder
from zimage_train.training.self_distill import Own, imitation_batch
from zimage_train.training.signals import StopRequest
from zimage_train.training.step_timer import Pace


@dataclass(frozen=True)
class Digests:
    """Contents of the model's parts."""

    model: str
    adapter: str | None
    text_encoder: str
    vae: str
    init_from: str | None = None
    """Of the LoRA that the training begins with."""


@dataclass(frozen=True)
class Inputs:
    """Cached latents and embeddings, found by content."""

    cache: Cache
    digests: Digests
    dtype: str
    own: Own | None = None
    """What the model draws itself, where that is trained on in place of pictures."""
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def latents(self, item: Item) -> Tensor:
        """What `item` is trained on."""
        if self.own is not None:
            return caching.require(self.cache, self.own.key(item), str(item.picture.path))
        return self.picture(item)

    def picture(self, item: Item) -> Tensor:
        """The latents of its picture."""
        key = caching.latent_key(item.picture, item.size, item.flip, self.digests.vae)
        return caching.require(self.cache, key, str(item.picture.path))

    def embeds(self, prompt: str) -> Tensor:
        key = caching.prompt_key(prompt, self.digests.text_encoder, self.dtype)
        return caching.require(self.cache, key, f"prompt {prompt[:40]!r}")

    def mask(self, item: Item) -> Tensor | None:
        """(1, h/8, w/8) in [0, 1]; made once and kept as bytes."""
        picture = item.picture
        if picture.mask is None:
            return None
        key = (picture.digest, picture.mask.digest, item.size, item.flip)
        if key not in self.masks:
            made = masks.on_latents(picture.mask, item.size, item.flip, picture.digest)
            self.masks[key] = (torch.from_numpy(made) * 255.0).round().to(torch.uint8)
        return self.masks[key].unsqueeze(0).float() / 255.0


@dataclass(frozen=True)
class Run:
    """One run of one process."""

    config: Config
    folder: RunFolder
    identity: Mapping[str, Any]
    """What makes this run itself; see `run_folder.identity`."""
    world: World
    plan: Plan
    memory: memory_planner.Plan
    """How it fits the device."""
    inputs: Inputs
    frozen: Frozen
    attached: Attached
    ema: Ema | None
    optimizer: Optimizer
    held_out: list[Item]
    """What validation looks at."""
    extras: Path
    views: list[View]
    extra_loras: list[tuple[Lora, float]]
    """What previews have besides the LoRA that is trained, with their weights."""
    preview_embeds: Mapping[str, Tensor]
    meter: Meter | None
    """Of the drift from Turbo's own steps; None where there are none to drift from, or no previews."""
    export_metadata: Mapping[str, str]
    warnings: list[str]
    start: int
    """The last step that is done."""
    console: Console
    trackers: Trackers
    stop: StopRequest
    pace: Pace

    def previewed(self, trained: Lora) -> AbstractContextManager[None]:
        """Within the block the model has `trained` and the LoRAs that previews have besides, and nothing else."""
        return swap.instead(self.frozen.model, arithmetic.stack([(trained, 1.0), *self.extra_loras]))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this process trains on in `step`."""
        return self.plan.step(step)[self.world.process :: self.world.processes]

    def load(self, samples: MicroBatch) -> Batch:
        """Read, draw and put together one micro-batch, on the CPU."""
        latents = [self.inputs.latents(sample.item) for sample in samples]
        embeds = [self.inputs.embeds(sample.prompt) for sample in samples]
        extras = self._extras(samples, latents[0].shape)
        if self.inputs.own is not None and self.inputs.own.imitates:
            return imitation_batch(self.inputs.own, samples, latents, embeds, extras)
        return make_batch(self.config, samples, latents, embeds, extras)

    def _extras(self, samples: MicroBatch, shape: torch.Size) -> Extras:
        entries = [self.config.data[sample.item.entry] for sample in samples]
        masks = [self.inputs.mask(sample.item) for sample in samples]
        to_prior = [entry.regularisation == "prior" for entry in entries]
        held = [self.inputs.embeds(sample.held) for sample in samples if sample.held is not None]
        return Extras(
            mask=mask_weights(masks, [entry.mask_floor for entry in entries], shape),
            outside=outside_weights(masks, [entry.mask_prior for entry in entries], shape),
            to_prior=torch.tensor(to_prior) if any(to_prior) else None,
            held_embeds=held or None,
            empty_embeds=self.inputs.embeds("") if self.config.guidance.contrastive is not None else None,
        )


def due(every: int | None, step: int, last: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`; if on at all, the last step counts."""
    return every is not None and (step % every == 0 or step == last)
