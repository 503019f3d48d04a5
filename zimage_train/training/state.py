"""Everything that the loop works with. Of what is trained, only the LoRA, its average and the optimizer change."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from zimage_train.config.schema import Config
from zimage_train.config.types import AttentionName
from zimage_train.dataset.sample_order import Sample, SampleOrder, TrainItem
from zimage_train.dataset.tensor_cache import CachedDataset
from zimage_train.diffusion.drift import DriftMeter
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.lora import arithmetic, swap
from zimage_train.lora.deltas import Deltas
from zimage_train.lora.layers import AdapterLayers
from zimage_train.optim.ema import Ema
from zimage_train.optim.optimizers import averaged_weights
from zimage_train.planning.planner import MemoryPlan
from zimage_train.report.console import Console
from zimage_train.report.trackers import Trackers
from zimage_train.training.device_plan import block_path
from zimage_train.training.distributed import World
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.run_dir import RunDir
from zimage_train.training.signals import StopRequest
from zimage_train.training.stage_clock import StageClock
from zimage_train.training.step_runner import StepRunner
from zimage_train.training.step_timer import SlowStepDetector


@dataclass
class LastSave:
    """The newest checkpoint of a run."""

    step: int
    at: float
    """When it was written or loaded, by `time.monotonic`."""


@dataclass(frozen=True)
class TrainState:
    """A run in a process."""

    config: Config
    folder: RunDir
    identity: Mapping[str, Any]
    """The settings and inputs that shape the weights; see `run_dir.run_identity`."""
    world: World
    order: SampleOrder
    memory_plan: MemoryPlan
    dataset: CachedDataset
    frozen: FrozenTransformer
    lora: AdapterLayers
    run_step: StepRunner
    ema: Ema | None
    optimizer: Optimizer
    held_out: list[TrainItem]
    """The validation images."""
    vae_path: Path
    """The folder or the file of the VAE."""
    preview_sets: list[PreviewSet]
    extra_loras: list[tuple[Deltas, float]]
    """LoRAs and their weights that previews use beside the trained LoRA."""
    preview_embeds: Mapping[str, Tensor]
    drift_meter: DriftMeter | None
    """None if no previews are drawn on Turbo."""
    export_metadata: Mapping[str, str]
    warnings: list[str]
    start_step: int
    """The step of the checkpoint that this start continues from; 0 without a checkpoint."""
    last_save: LastSave
    attention: AttentionName
    """What `model.attention` stands for on this machine."""
    keeps_path: bool
    """Whether the blocks must be computed by `path`, as in the steps before this start."""
    console: Console
    trackers: Trackers
    stop: StopRequest
    slow_steps: SlowStepDetector
    clock: StageClock

    @property
    def path(self) -> str:
        """Return what computes the blocks of a step; a checkpoint is continued by the same."""
        return block_path(self.memory_plan, self.world.device, self.attention)

    def heed_stop(self) -> None:
        """Give up work that the next start can do as well, if a signal asked to stop.

        Among several processes the work goes on, since others wait for it, and all of them stop after the next step.

        Raises:
            Stopped: a signal came.
        """
        if self.world.world_size == 1:
            self.stop.check()

    def report_progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of work that the next start can do as well.

        Raises:
            Stopped: as `heed_stop`.
        """
        self.heed_stop()
        self.console.progress(what, done, total)

    def with_preview_loras(self, trained: Deltas, weight: float = 1.0) -> AbstractContextManager[None]:
        """Within the block, replace the LoRA of the model by `trained` and the extra LoRAs of previews together."""
        return swap.replaced_lora(self.frozen.model, arithmetic.sum_deltas([(trained, weight), *self.extra_loras]))

    def with_result(self) -> AbstractContextManager[None]:
        """Within the block, the LoRA holds the weights that are exported: the average that the optimizer keeps, if any.

        The optimizer must not be saved or used there.
        """
        return averaged_weights(self.config.optimizer.name, self.optimizer, self.lora.flat)

    def micro_batches(self, step: int) -> list[tuple[Sample, ...]]:
        """Return the samples of this process in `step`, a tuple for each micro-batch."""
        return self.order.step_batches(step)[self.world.rank :: self.world.world_size]


def is_due(every: int | None, step: int, last: int) -> bool:
    """Return whether something done every `every` steps is due after `step`; it always is after the last step.

    None: it is never done.
    """
    return every is not None and (step % every == 0 or step == last)
