"""Load a LoRA with ComfyUI's own code; run as a program, so that nothing of zimage_train is in the process.

Arguments: the folder of ComfyUI, a LoRA file, and a folder. That holds `request.json`, with the shapes of the model's
weights under ComfyUI's names, and `directions.safetensors`, with columns (in, n) for each number of inputs. Written
there is `outcome.safetensors`: the change of each weight that is patched, times the columns.
"""

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU = torch.device("cpu")
NOT_LOADED = "lora key not loaded: "
"""How ComfyUI's log begins for a key that it leaves out."""
UNKNOWN = "diffusion_model.unknown.lora_A.weight"
"""A key of no module, which must be reported; otherwise the report says nothing about the others."""
ROWS = 1024
"""Rows that are converted to fp64 at a time."""


class RefusedError(Exception):
    """ComfyUI has no model of these sizes."""


class Unread(logging.Handler):
    """Collects the keys that are logged as not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(NOT_LOADED):
            self.keys.add(message.removeprefix(NOT_LOADED))


def main(folder: str, lora: str, place: str) -> None:
    sys.path.insert(0, folder)
    try:
        from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

        args.cpu = True  # the other modules look for a device while they are imported

        import comfy.lora  # pyright: ignore[reportMissingImports]
        import comfy.lora_convert  # pyright: ignore[reportMissingImports]
        import comfy.model_detection  # pyright: ignore[reportMissingImports]
        import comfy.model_patcher  # pyright: ignore[reportMissingImports]
        import comfyui_version  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        write_outcome(place, {}, missing=str(error))
        return
    version = comfyui_version.__version__
    shapes = json.loads(Path(place, "request.json").read_bytes())["weights"]
    try:
        model = hollow_model(comfy, shapes)
    except RefusedError as error:
        write_outcome(place, {}, version=version, refused=str(error))
        return
    patcher, unread = load_lora(comfy, model, lora)
    directions = load_file(Path(place, "directions.safetensors"))
    write_outcome(place, changes(comfy, patcher, directions), version=version, unread=unread)
    if any(name.split(".")[0] == "zimage_train" for name in sys.modules):
        raise SystemExit("zimage_train was imported")


def hollow_model(comfy: Any, shapes: dict[str, list[int]]) -> Any:
    """Return the model that ComfyUI detects in weights of `shapes`, with weights that take no memory.

    Raises:
        RefusedError: it detects none, or one with other weights.
    """
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(weights, "")
    if config is None:
        raise RefusedError("detects no model that it knows")
    config.set_inference_dtype(torch.float32, None)
    try:
        model = config.get_model(weights, "", device=torch.device("meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        # An assertion may say nothing, and is then shown itself.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise RefusedError(f"refuses a model of these sizes ({reason})") from None
    own = {name: list(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    others = [name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name)]
    if others:
        raise RefusedError(f"builds a model with {len(others)} weights of another name or size, such as {min(others)}")
    return model


def load_lora(comfy: Any, model: Any, lora: str) -> tuple[Any, list[str]]:
    """Return the patches, as the node for LoRAs makes them, and the keys that are not loaded."""
    unread = Unread()
    logging.getLogger().addHandler(unread)
    tensors = {**load_file(lora), UNKNOWN: torch.zeros(1, 1)}
    targets = comfy.lora.model_lora_keys_unet(model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), targets)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    patcher.add_patches(loaded, 1.0)
    if UNKNOWN not in unread.keys:
        raise SystemExit("ComfyUI does not report the keys that it leaves out")
    return patcher, sorted(unread.keys - {UNKNOWN})


def changes(comfy: Any, patcher: Any, directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weight -> its change times the directions (out, n), a weight at a time: all together fill 24 GB."""
    weights = patcher.model.state_dict()
    found: dict[str, Tensor] = {}
    for key, patches in patcher.patches.items():
        change = comfy.lora.calculate_weight(patches, torch.zeros(weights[key].shape), key)
        columns = directions[str(change.shape[1])]
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        found[name] = torch.cat([rows.double() @ columns for rows in change.split(ROWS)])
    return found


def write_outcome(place: str, tensors: dict[str, Tensor], **outcome: Any) -> None:
    save_file(tensors, Path(place, "outcome.safetensors"), {"outcome": json.dumps(outcome)})


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
