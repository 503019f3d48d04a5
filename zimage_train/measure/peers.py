"""Steps of other trainers, made with their own model and LoRA classes from a folder of their source.

Everything around the model is the same for all of them: the batch, the loss, clipping and AdamW. Their packages must be
importable beside this one. Nothing is recomputed.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from zimage_train.errors import Problem, ZImageTrainError
from zimage_train.lora import targets
from zimage_train.measure.models import RANK, random_tensors
from zimage_train.models.arch import TransformerShape

Predict = Callable[[Tensor, Tensor, list[Tensor]], Tensor]
"""Returns the velocity (b, 16, h/8, w/8), from image to noise, for noisy latents, sigmas (b,) and encoded captions."""


@dataclass(frozen=True)
class Peer:
    """A trainer's model with its LoRA."""

    name: str
    model: nn.Module
    predict: Predict
    trained: list[nn.Parameter]
    precision: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """What its forward runs in."""
    network: nn.Module | None = None
    """Its LoRA, where the model's layers refer to it weakly."""


def load_peer(folder: Path, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> Peer:
    """Return the trainer whose source is in `folder`, with a model of `shape` and random weights.

    Raises:
        ZImageTrainError: no known trainer is there, or it cannot be imported.
    """
    made = [make for marker, make in PEERS.items() if (folder / marker).exists()]
    if not made:
        known = ", ".join(PEERS)
        raise ZImageTrainError(
            Problem(str(folder), "is the source of no known trainer", f"it has none of {known}", "missing-file")
        )
    try:
        return made[0](folder, shape, dtype, device)
    except ImportError as error:
        hint = "install its requirements beside this package"
        raise ZImageTrainError(
            Problem(str(folder), f"cannot be imported ({error})", hint, "missing-package")
        ) from error


def diffusers_and_peft(shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> Peer:
    """Return what the usual training script has: diffusers' model with peft's LoRA in the model's precision."""
    with init_empty_weights():
        model = ZImageTransformer2DModel(**shape.config())
    _load(model, shape, dtype, device)
    return Peer("diffusers + peft", model, _by_list(model), _inject(model, shape))


def _musubi_tuner(folder: Path, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> Peer:
    module = _import(folder / "src", "musubi_tuner.zimage.zimage_model")
    lora = _import(folder / "src", "musubi_tuner.networks.lora_zimage")
    config = shape.config()
    known = ("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim", "axes_dims", "axes_lens")
    model = module.ZImageTransformer2DModel(**{name: config[name] for name in known})
    _load(model, shape, dtype, device)
    network = lora.create_arch_network(1.0, RANK, RANK, None, [], model)
    network.apply_to([], model, apply_text_encoder=False, apply_unet=True)
    network.to(device)

    def predict(noisy: Tensor, sigma: Tensor, prompts: list[Tensor]) -> Tensor:
        captions = torch.stack(prompts)
        latents, time = noisy.to(dtype).unsqueeze(2), (1 - sigma).to(dtype)
        return -model(x=latents, t=time, cap_feats=captions, cap_mask=None).squeeze(2)

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    return Peer("musubi-tuner", model, predict, _trainable(network), precision, network)


def _simple_tuner(folder: Path, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> Peer:
    module = _import(folder, "simpletuner.helpers.models.z_image.transformer")
    model = module.ZImageTransformer2DModel(**shape.config())
    _load(model, shape, dtype, device)
    return Peer("SimpleTuner", model, _by_list(model), _inject(model, shape))


def _ai_toolkit(folder: Path, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> Peer:
    module = _import(folder, "toolkit.lora_special")
    model = ZImageTransformer2DModel(**shape.config())
    _load(model, shape, dtype, device)
    network = module.LoRASpecialNetwork(
        text_encoder=None,
        unet=model,
        lora_dim=RANK,
        alpha=RANK,
        train_unet=True,
        train_text_encoder=False,
        target_lin_modules=["ZImageTransformer2DModel"],
        only_if_contains=["layers."],
        ignore_if_contains=["adaLN", "refiner"],
        transformer_only=True,
        is_transformer=True,
    )
    network.force_to(device, dtype=torch.float32)
    network._update_torch_multiplier()
    network.apply_to(None, model, False, True)
    network.is_active = True
    return Peer("AI Toolkit", model, _by_list(model), _trainable(network), network=network)


PEERS = {
    "src/musubi_tuner/zimage": _musubi_tuner,
    "simpletuner/helpers/models/z_image": _simple_tuner,
    "extensions_built_in/diffusion_models/z_image": _ai_toolkit,
}
"""A folder in the source of each trainer, and what makes its step."""


def _import(folder: Path, name: str) -> Any:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def _by_list(model: nn.Module) -> Predict:
    """Return what calls a model with diffusers' interface, which takes lists."""

    def predict(noisy: Tensor, sigma: Tensor, prompts: list[Tensor]) -> Tensor:
        latents = list(noisy.to(next(model.parameters()).dtype).unsqueeze(2).unbind())
        return -torch.stack(model(latents, 1 - sigma, prompts)[0]).squeeze(2)

    return predict


def _load(model: nn.Module, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> None:
    set_weights(model, random_tensors(shape, device), dtype, device)
    nn.Module.to(model, device)  # the buffers
    model.train()


def set_weights(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device
) -> None:
    """Put frozen parameters in place of those of `model`, which may have no memory yet."""
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))


def _inject(model: nn.Module, shape: TransformerShape) -> list[nn.Parameter]:
    """Add peft's LoRA in the precision of the model, and return its parameters."""
    dtype = next(model.parameters()).dtype
    modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    return _trainable(model)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
