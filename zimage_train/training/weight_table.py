"""Loss weights fitted to a model and its images: the inverse of the loss at each noise level, as AI Toolkit's table is.

Each noise level then has the same share in the loss before training begins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_train.dataset.sample_order import Sample, SampleOrder
from zimage_train.dataset.tensor_cache import CachedDataset
from zimage_train.diffusion.frozen import FrozenTransformer
from zimage_train.training.batches import sample_noise
from zimage_train.training.context import RunContext
from zimage_train.training.validation import errors_by_sigma

NUM_SIGMAS = 25
"""Noise levels of a table, evenly from 0 to 1."""
MAX_SAMPLES = 32
SMALLEST_LOSS = 1e-6
"""Added to each loss, as in AI Toolkit, so that no weight is without bounds."""


@dataclass(frozen=True)
class MeasuredLosses:
    """The losses of a model without training, by sigma."""

    sigmas: list[float]
    losses: list[float]
    """Mean over the samples at each sigma."""
    error: float
    """Largest standard error of these means, relative to the mean."""
    num_samples: int

    def weights(self) -> list[list[float]]:
        """Return [sigma, weight] with weight = 1 / loss, divided by its mean over all sigmas."""
        inverse = torch.tensor(self.losses, dtype=torch.float64).add(SMALLEST_LOSS).reciprocal()
        mean = torch.trapezoid(inverse, torch.tensor(self.sigmas, dtype=torch.float64))
        return [
            [round(sigma, 4), round(float(weight / mean), 4)]
            for sigma, weight in zip(self.sigmas, inverse, strict=True)
        ]


@torch.no_grad()
def measure_losses(context: RunContext, frozen: FrozenTransformer, dataset: CachedDataset) -> MeasuredLosses:
    """Return the losses on the first samples of the concept that a training would see, with their prompts and noise."""
    sigmas = [index / (NUM_SIGMAS - 1) for index in range(NUM_SIGMAS)]
    samples = _first_samples(context.spec.order)
    rows: list[Tensor] = []
    frozen.model.eval()  # lora.dropout is for training
    for number, sample in enumerate(samples):
        latents = dataset.latents(sample.item).float()
        noise = sample_noise(context.config, sample, latents.shape)
        device = context.world.device
        embeds = dataset.embeds(sample.prompt).to(device, frozen.model.dtype)
        x0, noise = latents.unsqueeze(0).to(device), noise.unsqueeze(0).to(device)
        rows.append(errors_by_sigma(frozen.model, x0, noise, embeds, sigmas).cpu())
        context.report_progress("measuring the loss", number + 1, len(samples))
    table = torch.stack(rows)
    means = table.mean(dim=0)
    spread = table.std(dim=0) / len(samples) ** 0.5 if len(samples) > 1 else torch.zeros_like(means)
    return MeasuredLosses(sigmas, means.tolist(), float((spread / means).max()), len(samples))


def _first_samples(order: SampleOrder) -> list[Sample]:
    """Return the first samples of the first epoch of the concept, at most one for each item."""
    samples: list[Sample] = []
    for index in range(order.concept.micro_batches_per_epoch):
        samples += order.concept.micro_batch(index)
        if len(samples) >= MAX_SAMPLES:
            break
    return samples[:MAX_SAMPLES]
