"""The frozen S3-DiT: an empty one to fill, and the one function that calls it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from zimage_train.config.types import Quantization
from zimage_train.io.safetensors_format import TensorInfo, read_header
from zimage_train.models.arch import IN_A_BLOCK, TransformerShape
from zimage_train.models.linear import FrozenLinear
from zimage_train.models.loading import stream, stream_native
from zimage_train.models.locate import native_names, transformer_tensors
from zimage_train.typing import LatentBatch, PerSample, PromptEmbeds


def empty_transformer(
    shape: TransformerShape, dtype: torch.dtype, kind: Quantization | None
) -> ZImageTransformer2DModel:
    """A transformer of `shape` in `dtype` whose parameters have no storage yet; attention and feed forward as `kind`.

    Embedders, modulations, norms and the final layer are never quantised: they are small and everything passes them.
    """
    with init_empty_weights():
        model = ZImageTransformer2DModel(**shape.config())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, (outputs, inputs) in shape.linears.items():
        if IN_A_BLOCK.match(name):
            model.set_submodule(name, FrozenLinear(inputs, outputs, dtype, kind))
    return model.requires_grad_(False)


def read_weights(path: Path) -> tuple[TransformerShape, Iterator[tuple[str, Tensor]]]:
    """The shape of the transformer at `path`, and its tensors as a stream under diffusers' names.

    Raises:
        WeightsError: not exactly the tensors of a Z-Image transformer.
    """
    shape, tensors = transformer_tensors(path)
    return shape, stream(tensors) if path.is_dir() else stream_native(path)


def read_selected_weights(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors called `names` (diffusers' names) of the transformer at `path`, from its mapped files."""
    if path.is_dir():
        tensors = transformer_tensors(path)[1]
        return stream({name: info for name, info in tensors.items() if name in names})
    return ((name, tensor) for name, tensor in stream_native(path) if name in names)


@dataclass(frozen=True)
class WeightFile:
    """A transformer's tensors under diffusers' names, each read from its mapped file when it is asked for."""

    shape: TransformerShape
    infos: dict[str, TensorInfo]
    get: Callable[[str], Tensor]


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """The tensors of the transformer at `path`, in any order, for as long as the block runs.

    Raises:
        WeightsError: not exactly the tensors of a Z-Image transformer.
    """
    shape, infos = transformer_tensors(path)
    spelled = {name: (name, None) for name in infos}
    if not path.is_dir():
        spelled = {new: (name, third) for name in read_header(path).tensors for new, third in native_names(name)}
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(file, "pt")) for file in {info.file for info in infos.values()}}

        def get(name: str) -> Tensor:
            key, third = spelled[name]
            file, rows = files[infos[name].file], infos[name].shape[0]
            return file.get_tensor(key) if third is None else file.get_slice(key)[third * rows : (third + 1) * rows]

        yield WeightFile(shape, infos, get)


def velocity(
    model: ZImageTransformer2DModel, latents: LatentBatch, sigma: PerSample, prompt_embeds: list[PromptEmbeds]
) -> LatentBatch:
    """Predict the velocity `noise - x0` of `latents` (b, 16, h, w) at `sigma` (b,), in fp32.

    The one place that knows the model's own conventions: a list of (16, 1, h, w), time `t = 1 - sigma` in fp32
    (in bf16 it would be off by up to two of a thousand steps), and an output of opposite sign.
    """
    t = 1.0 - sigma.to(latents.device, torch.float32)
    output = model(list(latents.to(model.dtype).unsqueeze(2)), t, prompt_embeds, return_dict=False)[0]
    return -torch.stack([one.float() for one in output]).squeeze(2)
