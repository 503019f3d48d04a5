"""Training data that the model generates: trajectories to be imitated in fewer steps, or its own images.

They are sampled once, before training, with the LoRA that training starts from, and cached under a digest of all
inputs.
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
    """The generated data of a run."""

    config: Config
    made_by: tuple[str, ...]
    """Digests and settings that identify the model that generates the data."""

    @property
    def imitates(self) -> bool:
        """Return whether the data are trajectories of a teacher, and not finished images."""
        return self.config.method.imitates_teacher

    def request(self, item: TrainItem) -> SamplingRequest:
        """Return the request by which the data of `item` are sampled."""
        seed = keyed_int(self.config.seed, "own", *item.identity())
        return teacher_request(self.config, item.image.prompts[0], item.size.width, item.size.height, seed)

    def key(self, item: TrainItem) -> str:
        """Return the cache key of the data of `item`."""
        return tensor_cache.generated_key(self.request(item).to_json(), self.config.train.method, *self.made_by)

    def num_bytes(self, item: TrainItem) -> int:
        """Return the size of the data of `item` in fp32."""
        positions = item.size.width * item.size.height // LATENT_STRIDE**2
        return 4 * LATENT_CHANNELS * positions * (len(self.student_sigmas) if self.imitates else 1)

    @property
    def student_sigmas(self) -> list[float]:
        """Return the sigmas of the student's sampler, with the final 0; the teacher's states are stored at these."""
        variant = VARIANTS[self.config.model.variant]
        return flow.sampling_sigmas(variant.steps, variant.shift)

    def generate(self, model: ZImageTransformer2DModel, item: TrainItem, embeds: Mapping[str, PromptEmbeds]) -> Tensor:
        """Return latents (16, h/8, w/8), or the teacher's states (9, 16, h/8, w/8) at `student_sigmas`."""
        request = self.request(item)
        was_training = model.training
        model.eval()
        try:
            if not self.imitates:
                return sampler.sample_latents(model, [request], embeds, lambda done, total: None)[0].cpu()
            sigmas = flow.sampling_sigmas_through(request.steps, request.shift, self.student_sigmas)
            states = []
            for sigma, x in sampler.sample_trajectory(model, [request], embeds, sigmas):
                if sigma in self.student_sigmas:  # exact: the grid above holds these very numbers
                    states.append(x[0].cpu())
            return torch.stack(states)
        finally:
            model.train(was_training)
