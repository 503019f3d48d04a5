"""A vision-language model: an image and an instruction to a text.

Any `image-text-to-text` model of transformers is read through its own processor. The Qwen-VL family is read without
it: its processor insists on a part for videos, and that on torchvision, of which an image needs nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import Module
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from zimage_train.errors import Problem, WeightsError

MAX_PIXELS = 1024 * 1024
"""Larger images are scaled down: an eighth of a megapixel more is a hundred tokens more to read."""
Prepare = Callable[[Image.Image, str], dict[str, Any]]


class CaptionModel:
    """A model, and how an image and a text become its inputs."""

    def __init__(self, model: Any, tokenizer: Any, prepare: Prepare) -> None:
        self._model, self._tokenizer, self._prepare = model, tokenizer, prepare

    @torch.inference_mode()
    def answer(self, image: Image.Image, instruction: str, most_tokens: int) -> tuple[str, bool]:
        """What the model says of `image`, always the same, and whether it came to an end within `most_tokens`."""
        inputs = self._prepare(_scaled(image), instruction)
        moved = {name: self._moved(value) for name, value in inputs.items()}
        output = self._model.generate(**moved, max_new_tokens=most_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        is_whole = len(new) < most_tokens or int(new[-1]) in (ends if isinstance(ends, list) else [ends])
        return self._tokenizer.decode(new, skip_special_tokens=True), is_whole

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)


def load(folder: Path, device: torch.device) -> CaptionModel:
    """Read the model in `folder`, in the precision it was saved in; no code and no pickle of it is run.

    Raises:
        WeightsError: it is none that describes images, or damaged.
    """
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        prepare, tokenizer = _of_qwen(folder) if kind.startswith("qwen") else _of_others(folder)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # noqa: BLE001  configs and processors are programs of many hands
        lines = str(error).strip().splitlines()
        what = f"is no model that describes images ({type(error).__name__}: {lines[0][:160] if lines else ''})"
        todo = "give an image-text-to-text model in safetensors, such as Qwen/Qwen3-VL-4B-Instruct"
        raise WeightsError(Problem(str(folder), what, todo)) from None
    for name in ("temperature", "top_p", "top_k"):  # which are for sampling, and it warns of them
        setattr(model.generation_config, name, None)
    return CaptionModel(Module.to(model, device).eval(), tokenizer, prepare)


def _of_qwen(folder: Path) -> tuple[Prepare, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    place = "<|image_pad|>"
    place_id = tokenizer.convert_tokens_to_ids(place)

    def prepare(image: Image.Image, text: str) -> dict[str, Any]:
        pixels = processor(images=[image], return_tensors="pt")
        tokens = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
        prompt = tokenizer.apply_chat_template(
            _message(text), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        inputs = tokenizer(prompt.replace(place, place * tokens), return_tensors="pt")
        types = (inputs["input_ids"] == place_id).int()
        return {**inputs, **pixels, "mm_token_type_ids": types}

    return prepare, tokenizer


def _of_others(folder: Path) -> tuple[Prepare, Any]:
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)

    def prepare(image: Image.Image, text: str) -> dict[str, Any]:
        prompt = processor.apply_chat_template(_message(text), tokenize=False, add_generation_prompt=True)
        return dict(processor(images=[image], text=[prompt], add_special_tokens=False, return_tensors="pt"))

    return prepare, processor.tokenizer


def _message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def _scaled(image: Image.Image) -> Image.Image:
    factor = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)
