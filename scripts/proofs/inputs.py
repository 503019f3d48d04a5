"""Inputs of the runs of the proof table: images, captions, masks, and changed parts of the miniature."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_train import mini

TAGS = "zorb, red, big, on the left, drawn, plain background"
COUNT = 8


def make_inputs(folder: Path) -> dict[str, str]:
    """Make all inputs in `folder`, and return their paths by the names that the rows use."""
    images, class_images = folder / "images", folder / "class"
    sources = sorted(mini.IMAGES.glob("*.[pj]*g"))[:COUNT]
    masks = {"white": 255, "half": None}
    for index, path in enumerate(sources):
        target = images / "2_zorb" / f"{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            side = min(image.size)
            image.convert("RGB").crop((0, 0, side, side)).save(target)
        # The first has no caption, and each has another caption beside, in two lines.
        if index:
            target.with_suffix(".txt").write_text(f"{TAGS}, number {index}")
        target.with_suffix(".caption").write_text(f"a zorb, number {index}\na drawing of a zorb, number {index}")
        for name, value in masks.items():
            mask = folder / name / "2_zorb" / target.name
            mask.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.linspace(0, 255, side)[None, :] if value is None else np.full((1, 1), value)
            Image.fromarray(np.broadcast_to(pixels, (side, side)).astype(np.uint8)).save(mask)
        if index < 2:
            _copy(target, folder / "few")
        _copy(target, folder / "transparent" / "2_zorb")
        with Image.open(target) as image, Image.open(folder / "half" / "2_zorb" / target.name) as mask:
            image.putalpha(mask)
            image.save(folder / "transparent" / "2_zorb" / target.name)
    shutil.copytree(images, class_images)
    for path in [*class_images.rglob("*.txt"), *class_images.rglob("*.caption")]:
        path.write_text("a red circle")
    rows = [{"image": f"images/2_zorb/{path.stem}.png", "prompt": "a zorb of the table"} for path in sources[:3]]
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle on a blue background\na green square\n")
    other = folder / "other"
    shutil.copytree(mini.TURBO, other)
    for path in [*(other / "text_encoder").glob("*.safetensors"), *(other / "vae").glob("*.safetensors")]:
        _enlarge_matrices(path)
    _exchange_words(other / "tokenizer" / "tokenizer.json")
    return {
        "images": str(images),
        "class": str(class_images),
        "white": str(folder / "white"),
        "half": str(folder / "half"),
        "few": str(folder / "few"),
        "transparent": str(folder / "transparent"),
        "table": str(table),
        "prompts": str(prompts),
        "turbo": str(mini.TURBO),
        "base": str(mini.BASE),
        "other": str(other),
        "adapter_v1": str(mini.ADAPTER_V1),
        "adapter_v2": str(mini.ADAPTER_V2),
        "distillpatch": str(mini.DISTILLPATCH),
        "elsewhere": str(folder / "elsewhere"),
    }


def _copy(image: Path, folder: Path) -> None:
    """Copy an image and its caption, if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (image, image.with_suffix(".txt")):
        if path.exists():
            shutil.copy(path, folder)


def _enlarge_matrices(path: Path) -> None:
    """Multiply every matrix of a file of weights by 1.01."""
    tensors = load_file(path)
    changed = {name: tensor * 1.01 if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    save_file(changed, path, metadata={"format": "pt"})


def _exchange_words(path: Path) -> None:
    """Let two entries of a tokenizer's vocabulary change places."""
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
