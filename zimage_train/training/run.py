"""Everything that one run works with, in one frozen place; the loop passes it on and changes none of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from zimage_train import planner as memory_planner
from zimage_train.assemble import Frozen
from zimage_train.config.schema import Config
from zimage_train.data import cache as caching
from zimage_train.data.cache import Cache
from zimage_train.data.plan import MicroBatch, Plan, Sample
from zimage_train.distributed import World
from zimage_train.lora.attach import Attached
from zimage_train.report.console import Console
from zimage_train.report.trackers import Trackers
from zimage_train.training.objectives import Batch, make_batch
from zimage_train.training.pace import Pace
from zimage_train.training.run_folder import RunFolder
from zimage_train.training.stopping import StopRequest
from zimage_train.training.views import View


@dataclass(frozen=True)
class Digests:
    """Contents of the model's parts."""

    model: str
    adapter: str | None
    text_encoder: str
    vae: str


@dataclass(frozen=True)
class Inputs:
    """Cached latents and embeddings, found by content."""

    cache: Cache
    digests: Digests
    dtype: str

    def latents(self, sample: Sample) -> Tensor:
        key = caching.latent_key(sample.item.picture, sample.item.size, self.digests.vae)
        return caching.require(self.cache, key, str(sample.item.picture.path))

    def embeds(self, prompt: str) -> Tensor:
        key = caching.prompt_key(prompt, self.digests.text_encoder, self.dtype)
        return caching.require(self.cache, key, f"prompt {prompt[:40]!r}")


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
    optimizer: Optimizer
    extras: Path
    views: list[View]
    preview_embeds: Mapping[str, Tensor]
    export_metadata: Mapping[str, str]
    warnings: list[str]
    start: int
    """The last step that is done."""
    console: Console
    trackers: Trackers
    stop: StopRequest
    pace: Pace

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this process trains on in `step`."""
        return self.plan.step(step)[self.world.process :: self.world.processes]

    def load(self, samples: MicroBatch) -> Batch:
        """Read, draw and put together one micro-batch, on the CPU."""
        latents = [self.inputs.latents(sample) for sample in samples]
        embeds = [self.inputs.embeds(sample.prompt) for sample in samples]
        return make_batch(self.config, samples, latents, embeds)


def due(every: int | None, step: int, last: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`; if on at all, the last step counts."""
    return every is not None and (step % every == 0 or step == last)
