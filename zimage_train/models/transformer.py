"""The frozen S3-DiT: building it without storage, reading its weights, and the only function that calls it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from zimage_train.config.types import Quantization
from zimage_train.models import linear, loading
from zimage_train.models.arch import IN_A_BLOCK, TransformerShape, padded_tokens
from zimage_train.models.linear import FrozenLinear
from zimage_train.models.loading import WeightReader, stream_tensors
from zimage_train.models.locate import transformer_tensors
from zimage_train.models.stored_weights import StoredWeight
from zimage_train.typing import LatentBatch, PerSample, PromptEmbeds


def empty_transformer(
    shape: TransformerShape, dtype: torch.dtype, kind: Quantization | None
) -> ZImageTransformer2DModel:
    """Return a transformer of `shape` in `dtype` on the meta device; attention and feed forward are stored as `kind`.

    Embedders, modulations, norms and the final layer are never quantised: they are 2 % of the weights, and an error in
    them reaches every token.
    """
    with init_empty_weights():
        model = ZImageTransformer2DModel(**shape.config())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, (outputs, inputs) in shape.linears.items():
        if IN_A_BLOCK.match(name):
            model.set_submodule(name, FrozenLinear(inputs, outputs, dtype, kind))
    return model.requires_grad_(False)


def allocate_transformer(model: ZImageTransformer2DModel, device: torch.device) -> None:
    """Allocate what `empty_transformer` left on the meta device, and memory in which its weights are unpacked."""
    loading.allocate_parameters(model, device)
    linear.share_scratch(model, model.dtype, device)


def read_weights(path: Path) -> tuple[TransformerShape, Iterator[tuple[str, Tensor]]]:
    """Return the shape of the transformer at `path`, and an iterator over its tensors under diffusers' names.

    Raises:
        WeightsError: these are not exactly the tensors of a Z-Image transformer.
    """
    shape, weights = transformer_tensors(path)
    return shape, stream_tensors(weights)


def read_selected_weights(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors called `names` (diffusers' names) of the transformer at `path`, from its mapped files."""
    weights = transformer_tensors(path)[1]
    return stream_tensors({name: weight for name, weight in weights.items() if name in names})


@dataclass(frozen=True)
class WeightFile:
    """A transformer's tensors under diffusers' names, which `get` reads from the mapped files one at a time."""

    shape: TransformerShape
    weights: dict[str, StoredWeight]
    get: Callable[[str], Tensor]


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """Open the transformer at `path` for reading its tensors in any order within the block.

    Raises:
        WeightsError: these are not exactly the tensors of a Z-Image transformer.
    """
    shape, weights = transformer_tensors(path)
    with WeightReader() as reader:
        yield WeightFile(shape, weights, lambda name: reader.read(weights[name]))


@dataclass(frozen=True)
class PaddedPrompt:
    """Embeddings of a prompt, padded to the length to which the model would pad them.

    Prompts of similar length then have the same shape, and can be inputs of the same CUDA graph.
    """

    embeds: PromptEmbeds
    is_padding: Tensor
    """(tokens,), bool."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "PaddedPrompt":
        """Return the prompt on `device`, with embeddings in `dtype`."""
        embeds = self.embeds.to(device, dtype, non_blocking=True)
        return PaddedPrompt(embeds, self.is_padding.to(device, non_blocking=True))


Prompt = PromptEmbeds | PaddedPrompt


def pad_prompt(embeds: PromptEmbeds) -> PaddedPrompt:
    """Return `embeds` with the last token repeated, as the model does it."""
    missing = padded_tokens(len(embeds)) - len(embeds)
    is_padding = torch.zeros(len(embeds) + missing, dtype=torch.bool)
    is_padding[len(embeds) :] = True
    return PaddedPrompt(torch.cat([embeds, embeds[-1:].expand(missing, -1)]), is_padding)


def velocity(
    model: ZImageTransformer2DModel, latents: LatentBatch, sigma: PerSample, prompts: Sequence[Prompt]
) -> LatentBatch:
    """Predict the velocity `noise - x0` of `latents` (b, 16, h, w) at noise levels `sigma` (b,), in fp32.

    `prompts` are all padded, or none is; the result is the same.

    The only place that knows the model's own conventions: a list of images (16, 1, h, w), a time that runs from noise
    to image, and an output of the opposite sign. Everything else counts in sigma.
    """
    # The model's t is 0 at noise and 1 at the image. In bf16 it would be off by up to two of a thousand steps.
    t = 1.0 - sigma.to(latents.device, torch.float32)
    embeds = [prompt.embeds if isinstance(prompt, PaddedPrompt) else prompt for prompt in prompts]
    is_padding = [prompt.is_padding for prompt in prompts if isinstance(prompt, PaddedPrompt)]
    with _padding_tokens(model, is_padding):
        output = model(list(latents.to(model.dtype).unsqueeze(2)), t, embeds, return_dict=False)[0]
    # The model predicts d x / d t = x0 - noise. Negated in fp32, as the sampler's sums are.
    return -torch.stack([image.float() for image in output]).squeeze(2)


@contextlib.contextmanager
def _padding_tokens(model: ZImageTransformer2DModel, is_padding: list[Tensor]) -> Iterator[None]:
    """Within the block, put the model's padding token where `is_padding` says; the model pads only what is too short.

    After the embedder, as the model does it.
    """
    if not is_padding:
        yield
        return
    mask = torch.cat(is_padding).unsqueeze(-1)

    def pad(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return torch.where(mask, model.cap_pad_token, output)

    hook = model.cap_embedder.register_forward_hook(pad)
    try:
        yield
    finally:
        hook.remove()
