"""The LoRAs that a run exports, and the files beside each: ComfyUI workflows, and the picture that managers show."""

import re
from pathlib import Path

from zimage_train.config.triggers import has_any_trigger
from zimage_train.config.variants import NAMED_LORAS
from zimage_train.diffusion import comfyui, comfyui_canvas
from zimage_train.errors import DiskError, WeightsError, ZImageTrainError
from zimage_train.io import atomic
from zimage_train.lora import lora_file, metadata, verify
from zimage_train.lora.deltas import Deltas
from zimage_train.report import preview_images
from zimage_train.training.state import TrainState, is_due


def export_step(state: TrainState, step: int) -> None:
    """Write the LoRA of `step` and its average, if any; verify that diffusers and ComfyUI would load them.

    Raises:
        WeightsError: a file would be loaded as other weights; it is renamed to `.unverified`.
        DiskError: a file cannot be written.
        Stopped: a signal came; the next start exports from the checkpoint. A save that was asked for is exported now.
    """
    averages = [None] if state.ema is None else [None, state.ema.shadow]
    for average in averages:
        if is_save_due(state, step):
            state.heed_stop()
        _export(state, step, _path(state, step, is_ema=average is not None), state.lora.deltas(average))


def is_save_due(state: TrainState, step: int) -> bool:
    """Return whether `step` is saved and exported by the config, not only because somebody asked for it."""
    last = state.config.train.steps
    return step == last or is_due(state.config.save.every, step, last)


def save_picture(state: TrainState, step: int) -> None:
    """Write the preview of `step` that shows the LoRA best as NAME.png beside the LoRA that drew it.

    The preview is the first whose prompt has a trigger, or else the first. Managers of models find it there, so the
    LoRA itself holds no picture, and its bytes do not depend on one. A failure is a warning.
    """
    if not state.preview_sets:
        return
    source, request = state.preview_sets[0].expected(step)[_shown_preview(state)]
    path = picture_path(_path(state, step, is_ema=state.config.sample.weights == "ema"))
    if not (path.with_suffix(".safetensors").exists() and source.exists()):
        return
    try:
        preview_images.copy_preview(source, request, path)
    except (ZImageTrainError, OSError) as error:
        state.console.warning(f"{path}: cannot be written ({error}); going on")


def picture_path(lora: Path) -> Path:
    """Return the path of the picture beside an exported LoRA."""
    return lora.with_suffix(".png")


def files_beside(lora: Path) -> list[Path]:
    """Return the paths of the files that belong to an exported LoRA, whether or not they exist."""
    return [comfyui.workflow_path(lora), comfyui_canvas.canvas_path(lora), picture_path(lora)]


def _path(state: TrainState, step: int, is_ema: bool = False) -> Path:
    number = None if step == state.config.train.steps else step  # the last file is named by the run alone
    return state.folder.lora(number, is_ema)


def _shown_preview(state: TrainState) -> int:
    """Return the index of the preview that stands for the LoRA."""
    for index, request in enumerate(state.preview_sets[0].requests):
        if has_any_trigger(request.prompt, state.config.triggers):
            return index
    return 0


def _export(state: TrainState, step: int, path: Path, trained: Deltas) -> None:
    config = state.config
    if picture_path(path).exists():  # from an earlier start; if this step's preview fails, it would show other weights
        atomic.remove(picture_path(path))
    lora_file.export_lora(path, trained, config.save.dtype, metadata.at_step(state.export_metadata, step))
    try:
        error = verify.verify_export(path, trained, config.save.dtype, state.frozen.shape)
    except WeightsError:
        atomic.rename_as_backup(path, ".unverified")
        raise
    count = f"{len(trained)}/{len(trained)}"
    state.console.info(f"step {step}: exported {path} ({count} modules verified, relative error {error:.1e})")
    if state.preview_sets:
        _save_workflows(state, path)
    _prune(state, path.parent)


def _save_workflows(state: TrainState, path: Path) -> None:
    request = state.preview_sets[0].requests[_shown_preview(state)]
    extra_loras = []
    for lora in state.config.preview_loras:
        file = Path(NAMED_LORAS.get(lora.file, lora.file))
        # ComfyUI lists files alone: that which `lora convert` makes of a folder of peft.
        extra_loras.append((f"{file.name}.safetensors" if file.is_dir() else file.name, lora.weight))
    nodes = comfyui.comfyui_workflow(request, state.config.model, path.name, extra_loras)
    try:
        atomic.write_json(comfyui.workflow_path(path), nodes)
        atomic.write_json(comfyui_canvas.canvas_path(path), comfyui_canvas.canvas_workflow(nodes))
    except DiskError as error:
        state.console.warning(f"{error}; going on without the workflow")


def _prune(state: TrainState, folder: Path) -> None:
    """Remove all but the newest `save.keep` exports in `folder`; the final file, without a step in its name, stays."""
    pattern = re.compile(re.escape(state.config.name) + r"-(\d{6,})\.safetensors")
    exported = []
    for path in folder.iterdir():
        if match := pattern.fullmatch(path.name):
            exported.append((int(match[1]), path))
    for _, path in sorted(exported)[: -state.config.save.keep]:
        if not all([atomic.remove(file) for file in (path, *files_beside(path))]):
            state.console.warning(f"{path}: cannot be removed; going on")
