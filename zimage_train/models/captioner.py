"""A vision-language model that answers an instruction about an image.

Any `image-text-to-text` model of transformers works through its own processor. The Qwen-VL family goes without it,
because its processor requires a video processor and so torchvision, which images do not need.
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
"""Larger images are scaled down; each further eighth of a megapixel would cost about a hundred tokens."""
Prepare = Callable[[Image.Image, str], dict[str, Any]]


class CaptionModel:
    """A vision-language model; `prepare` turns an image and a text into its inputs."""

    def __init__(self, model: Any, tokenizer: Any, prepare: Prepare) -> None:
        self._model, self._tokenizer, self._prepare = model, tokenizer, prepare

    @torch.inference_mode()
    def answer(self, image: Image.Image, instruction: str, max_tokens: int) -> tuple[str, bool]:
        """Return the greedy answer about `image`, and whether it is complete within `max_tokens`."""
        inputs = self._prepare(_limit_pixels(image), instruction)
        on_device = {name: self._to_device(value) for name, value in inputs.items()}
        output = self._model.generate(**on_device, max_new_tokens=max_tokens, do_sample=False)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        end_tokens = self._model.generation_config.eos_token_id
        if not isinstance(end_tokens, list):
            end_tokens = [end_tokens]
        is_complete = len(new_tokens) < max_tokens or int(new_tokens[-1]) in end_tokens
        return self._tokenizer.decode(new_tokens, skip_special_tokens=True), is_complete

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)


def load_captioner(folder: Path, device: torch.device) -> CaptionModel:
    """Load the model in `folder` in the precision it was saved in, without running code or pickles from it.

    Raises:
        WeightsError: it is not a vision-language model, or is damaged.
    """
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        prepare, tokenizer = _qwen_inputs(folder) if kind.startswith("qwen") else _processor_inputs(folder)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # noqa: BLE001  each model's config and processor fails in its own way
        lines = str(error).strip().splitlines()
        what = f"is not a vision-language model ({type(error).__name__}: {lines[0][:160] if lines else ''})"
        hint = "give an image-text-to-text model in safetensors, such as Qwen/Qwen3-VL-4B-Instruct"
        raise WeightsError(Problem(str(folder), what, hint, "other-model")) from None
    for name in ("temperature", "top_p", "top_k"):  # sampling parameters, of which greedy decoding would warn
        setattr(model.generation_config, name, None)
    return CaptionModel(Module.to(model, device).eval(), tokenizer, prepare)


def _qwen_inputs(folder: Path) -> tuple[Prepare, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    placeholder = "<|image_pad|>"
    placeholder_id = tokenizer.convert_tokens_to_ids(placeholder)

    def prepare(image: Image.Image, text: str) -> dict[str, Any]:
        pixels = processor(images=[image], return_tensors="pt")
        num_patches = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
        prompt = tokenizer.apply_chat_template(
            _message(text), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        # The template has one placeholder for an image; the model takes as many as its merged patches.
        inputs = tokenizer(prompt.replace(placeholder, placeholder * num_patches), return_tensors="pt")
        types = (inputs["input_ids"] == placeholder_id).int()
        return {**inputs, **pixels, "mm_token_type_ids": types}

    return prepare, tokenizer


def _processor_inputs(folder: Path) -> tuple[Prepare, Any]:
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)

    def prepare(image: Image.Image, text: str) -> dict[str, Any]:
        prompt = processor.apply_chat_template(_message(text), tokenize=False, add_generation_prompt=True)
        return dict(processor(images=[image], text=[prompt], add_special_tokens=False, return_tensors="pt"))

    return prepare, processor.tokenizer


def _message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def _limit_pixels(image: Image.Image) -> Image.Image:
    factor = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)
