"""Drawing of one image after another with whatever model is asked for, as the page does it.

An image equals that of `sample`, and the preview of a run, with the same model, LoRAs and request.
"""

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zimage_train.commands import sample
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.config.schema import ModelSettings
from zimage_train.dataset.encoding import prompt_encoder
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.diffusion.request import SamplingRequest, prompts_to_encode
from zimage_train.errors import ConfigError
from zimage_train.io.progress import Progress
from zimage_train.lora import swap
from zimage_train.lora.deltas import Deltas
from zimage_train.models.arch import TransformerShape
from zimage_train.models.attention_choice import attention_by, resolve_attention
from zimage_train.models.components import ExtrasPaths
from zimage_train.planning import devices
from zimage_train.planning.memory import WeightPlacement
from zimage_train.report import preview_images
from zimage_train.report.console import Console
from zimage_train.training import distributed

ENCODER_ROOM = 1.2
"""Memory that the text encoder takes, relative to its files."""
HINT = "choose a smaller size, or wait until the training has ended"


class ImageRenderer:
    """Draws images, and keeps the model and the encoded prompts of the last ones.

    Args:
        writing: held while an image is written.
    """

    def __init__(self, writing: threading.Lock) -> None:
        self._writing = writing
        self._device = distributed.init().device
        self._frozen: FrozenTransformer | None = None
        self._frozen_key: tuple[Path, str, WeightPlacement] | None = None
        self._embeds: dict[str, Tensor] = {}
        """Prompt -> its encoding by the last text encoder."""
        self._encoder_key: tuple[ExtrasPaths, str] | None = None

    def draw(
        self,
        model: ModelSettings,
        loras: Sequence[tuple[str, float]],
        request: SamplingRequest,
        outputs: tuple[Path, Path | None],
        progress: Progress,
        is_beside_run: bool,
    ) -> None:
        """Draw an image, and another without LoRAs if that is asked for.

        Args:
            loras: (file, weight), in the order in which their changes are added.
            outputs: the path of the image, and that of the image without LoRAs or None.
            progress: called as `progress(phase, done, total)` with the phases text, loading and drawing. What it raises
                ends the work.
            is_beside_run: whether a run trains on this device, so that only what is free of its memory may be used.

        Raises:
            ZImageTrainError: a part of the model or a LoRA cannot be used, or there is too little memory.
        """
        progress("loading", 0, 1)
        weighted = [WeightedLora(Path(file), weight) for file, weight in loras]
        paths, shape = sample.locate_model(model)
        stacked = sample.read_loras(weighted, shape, Console(is_main=False))
        images: list[tuple[Path, Deltas, list[WeightedLora]]] = [(outputs[0], stacked, weighted)]
        if outputs[1] is not None:
            images.append((outputs[1], {}, []))
        attention = resolve_attention(model.attention, self._device)
        with devices.explained_out_of_memory(HINT):
            placement = self._place(shape, model, stacked, request, is_beside_run)
            if self._frozen_key != (paths.transformer, model.dtype, placement):
                self._unload()
            self._encode(request, paths.extras, model.dtype, progress)
            frozen = self._load(paths.transformer, model.dtype, placement, progress)
            loaded = sample.LoadedModel(frozen, paths.extras.vae, self._embeds)
            for number, (path, deltas, used) in enumerate(images):
                with attention_by(attention), swap.with_lora(frozen.model, deltas):
                    steps = _steps_of_image(number, len(images), request.steps, progress)
                    image = loaded.draw([request], steps)[0]
                with self._writing:
                    preview_images.save_preview(path, image, request, sample.drawn_by(model, used))

    def _place(
        self, shape: TransformerShape, model: ModelSettings, lora: Deltas, request: SamplingRequest, is_beside_run: bool
    ) -> WeightPlacement:
        limit = sample.BatchLimit(budget_gb=self._free_gb() if is_beside_run else None)
        try:
            return sample.place_weights(shape, model, lora, [request], self._device, limit)
        except ConfigError as error:
            # Its problem names an option of `sample`, which nobody has given here.
            problems = [replace(problem, location="free memory in GB", hint=HINT) for problem in error.problems]
            raise ConfigError(*problems) from None

    def _encode(self, request: SamplingRequest, extras: ExtrasPaths, dtype: str, progress: Progress) -> None:
        """Encode the prompts that are not encoded yet."""
        if self._encoder_key != (extras, dtype):
            self._embeds, self._encoder_key = {}, (extras, dtype)
        missing = [prompt for prompt in prompts_to_encode([request]) if prompt not in self._embeds]
        if not missing:
            return
        progress("text", 0, 1)
        if self._frozen is not None and self._device.type == "cuda":
            size = sum(path.stat().st_size for path in _weight_files(extras.text_encoder))
            if torch.cuda.mem_get_info()[0] < ENCODER_ROOM * size:
                self._unload()
        encode = prompt_encoder(extras, self._device, dtype)
        self._embeds.update(encode(missing, lambda done, total: None))
        del encode
        self._free_memory()

    def _load(self, path: Path, dtype: str, placement: WeightPlacement, progress: Progress) -> FrozenTransformer:
        """Return the transformer; that in memory, if it was not unloaded."""
        if self._frozen is None:
            progress("loading", 0, 1)
            self._frozen = load_frozen(path, None, dtype, self._device, placement.quantization, placement.streamed)
            self._frozen_key = (path, dtype, placement)
        return self._frozen

    def _unload(self) -> None:
        self._frozen = self._frozen_key = None
        self._free_memory()

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _free_gb(self) -> float | None:
        """Return what is free of the GPU's memory, together with what this process has; None without a GPU."""
        if self._device.type != "cuda":
            return None
        return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 1e9


def _steps_of_image(number: int, count: int, steps: int, progress: Progress) -> Callable[[int, int], None]:
    """Return the progress of the image `number` as that of the steps of all `count` images."""
    return lambda done, total: progress("drawing", number * steps + done, count * steps)


def _weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.glob("*.safetensors"))
