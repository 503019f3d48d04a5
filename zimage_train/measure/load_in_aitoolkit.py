"""Load a LoRA with AI Toolkit's own code; run as a program, so that nothing of zimage_train is in the process.

Arguments: the folder of AI Toolkit, a LoRA file, and a folder. That holds `request.json`, with the config of the
transformer and the rank of the LoRA, and `directions.safetensors`, with columns (in, n) for each number of inputs.
Written there is `outcome.safetensors`: the change of each module of its network, times the columns.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODELS = "extensions_built_in.diffusion_models"
UNKNOWN = "unknown"
"""A module that no model has. A key of it must be reported; otherwise the report says nothing about the others."""
ROWS = 1024
"""Rows that are converted to fp64 at a time."""


def main(folder: str, lora: str, place: str) -> None:
    sys.path.insert(0, folder)
    # Its package of models imports all of them, some of which need a GPU; an empty one in its place leaves Z-Image.
    models = ModuleType(MODELS)
    models.__path__ = [str(Path(folder, *MODELS.split(".")))]
    sys.modules[MODELS] = models
    try:
        from extensions_built_in.diffusion_models.z_image import z_image  # pyright: ignore[reportMissingImports]
        from toolkit import config_modules, lora_special  # pyright: ignore[reportMissingImports]
        from version import VERSION  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        write_outcome(place, {}, missing=str(error))
        return
    request = json.loads(Path(place, "request.json").read_bytes())
    with torch.device("meta"):
        transformer = z_image.ZImageTransformer2DModel(**request["config"])
    model = z_image.ZImageModel("cpu", config_modules.ModelConfig(name_or_path="none", arch="zimage"))
    network_config = config_modules.NetworkConfig(type="lora", linear=request["rank"], linear_alpha=request["rank"])
    network = make_network(lora_special.LoRASpecialNetwork, network_config, model, transformer)
    key = f"diffusion_model.{UNKNOWN}.lora_A.weight"
    left_out = network.load_weights({**load_file(lora), key: torch.zeros(1, 1)}) or {}
    unread = sorted(key.replace("$$", ".") for key in left_out if UNKNOWN not in key)
    if len(unread) == len(left_out):
        raise SystemExit("AI Toolkit does not report the keys that it leaves out")
    directions = load_file(Path(place, "directions.safetensors"))
    write_outcome(place, changes(network, transformer, directions), version=VERSION, unread=unread)
    if any(name.split(".")[0] == "zimage_train" for name in sys.modules):
        raise SystemExit("zimage_train was imported")


def make_network(network_class: Any, config: Any, model: Any, transformer: nn.Module) -> Any:
    """Return the network of a training, made as its training process makes it, without what Z-Image leaves as it is."""
    network = network_class(
        text_encoder=None,
        unet=transformer,
        lora_dim=config.linear,
        multiplier=1.0,
        alpha=config.linear_alpha,
        train_unet=True,
        train_text_encoder=False,
        network_config=config,
        network_type=config.type,
        transformer_only=config.transformer_only,
        is_transformer=model.is_transformer,
        base_model=model,
        target_lin_modules=model.target_lora_modules,
    )
    network.force_to(torch.device("cpu"), dtype=torch.float32)
    network._update_torch_multiplier()
    network.apply_to(None, transformer, False, True)
    return network


def changes(network: Any, transformer: nn.Module, directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return module -> its change times the directions (out, n), merged into zeros, a module at a time."""
    names = {module: name for name, module in transformer.named_modules()}
    found: dict[str, Tensor] = {}
    for module in network.get_all_modules():
        linear = module.org_module[0]
        hollow = linear.weight
        linear.weight = nn.Parameter(torch.zeros(hollow.shape), requires_grad=False)
        module.merge_in()
        columns = directions[str(hollow.shape[1])]
        found[names[linear]] = torch.cat([rows.double() @ columns for rows in linear.weight.split(ROWS)])
        linear.weight = hollow
    return found


def write_outcome(place: str, tensors: dict[str, Tensor], **outcome: Any) -> None:
    save_file(tensors, Path(place, "outcome.safetensors"), {"outcome": json.dumps(outcome)})


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
