"""What the model draws itself and is then trained on: trajectories to be imitated in fewer steps, or its own images.

Drawn once, before training, with the LoRA as it begins; found in the cache by all that they were made from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset import tensor_cache
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.diffusion import flow, sampler
from zimage_train.diffusion.request import SamplingRequest, teacher_request
from zimage_train.models.components import LATENT_CHANNELS, LATENT_STRIDE
from zimage_train.rng import keyed_int
from zimage_train.typing import PromptEmbeds


@dataclass(frozen=True)
class GeneratedData:
    """Which images, and by which model."""

    config: Config
    made_by: tuple[str, ...]
    """Digests and settings of all that the model is."""

    @property
    def imitates(self) -> bool:
        return self.config.method.imitates_teacher

    def request(self, item: TrainItem) -> SamplingRequest:
        seed = keyed_int(self.config.seed, "own", *item.identity())
        return teacher_request(self.config, item.image.prompts[0], item.size.width, item.size.height, seed)

    def key(self, item: TrainItem) -> str:
        return tensor_cache.generated_key(self.request(item).to_json(), self.config.train.method, *self.made_by)

    def num_bytes(self, item: TrainItem) -> int:
        pixels = item.size.width * item.size.height // LATENT_STRIDE**2
        return 4 * LATENT_CHANNELS * pixels * (len(self.student_sigmas) if self.imitates else 1)

    @property
    def student_sigmas(self) -> list[float]:
        """The sigmas at which the student is to be where the teacher is, with the 0 at the end."""
        variant = VARIANTS[self.config.model.variant]
        return flow.sampling_sigmas(variant.steps, variant.shift)

    def generate(self, model: ZImageTransformer2DModel, item: TrainItem, embeds: Mapping[str, PromptEmbeds]) -> Tensor:
        """Latents (16, h/8, w/8) of the image; or (9, 16, h/8, w/8), where the teacher is at each of `student`."""
        wanted = self.request(item)
        was_training = model.training
        model.eval()
        try:
            if not self.imitates:
                return sampler.sample_latents(model, [wanted], embeds, lambda done, total: None)[0].cpu()
            sigmas = flow.sampling_sigmas_through(wanted.steps, wanted.shift, self.student_sigmas)
            kept = [
                x[0].cpu()
                for sigma, x in sampler.sample_trajectory(model, [wanted], embeds, sigmas)
                if sigma in self.student_sigmas
            ]
            return torch.stack(kept)
        finally:
            model.train(was_training)
