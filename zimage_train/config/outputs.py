"""Settings of the files that a run saves, and of its loggers."""

from pydantic import Field

from zimage_train.config.types import EverySteps, MetadataLevel, Section
from zimage_train.io.dtypes import Precision


class SaveSettings(Section):
    every: EverySteps = 250
    """Steps between saves; null: only at the end."""
    checkpoint_minutes: float | None = Field(default=None, gt=0.0, le=10_000.0)
    """Write a checkpoint, and nothing else, when so many minutes have passed since the last one. A rented machine that
    vanishes takes no more than these along. null: only when a save is due."""
    keep: int = Field(default=8, ge=1, le=100_000)
    """Number of exported LoRA files that are kept, namely the latest; of the checkpoints, the two latest are kept."""
    dtype: Precision = "bf16"
    """Precision of the exported LoRA."""
    metadata: MetadataLevel = "minimal"
    """What the header of the exported LoRA says. minimal: trigger, base model, rank, resolution and hashes; full: the
    tags of the captions and the training settings too; none: nothing. It never holds a path."""


class LogSettings(Section):
    tensorboard: bool = True
    """Write loss and learning rate for TensorBoard."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project on Weights & Biases, which needs `pip install wandb`; WANDB_MODE=offline logs to disk only; null: off."""
