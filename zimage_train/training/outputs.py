"""What a run leaves on disk beside its metrics: checkpoints, exported LoRAs, previews, the report."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from zimage_train.config.load import dump_config
from zimage_train.diffusion import comfyui
from zimage_train.diffusion.frozen import NotRestoredError, original_weights
from zimage_train.diffusion.render import decode_all, eval_mode, sample_all
from zimage_train.errors import WeightsError
from zimage_train.io import atomic
from zimage_train.io.safetensors_format import read_header
from zimage_train.io.tensorfile import DTYPE_NAMES, TORCH_DTYPES
from zimage_train.lora import lora_file, verify
from zimage_train.lora.lora_file import Lora
from zimage_train.optim import optimizers
from zimage_train.report import page, preview_images, preview_shift
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.training import checkpoint, preview_sets, run_dir
from zimage_train.training.context import RunContext
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.state import TrainState, is_due
from zimage_train.training.validation import validate


def save_checkpoint(run: TrainState, step: int) -> None:
    """Write the checkpoint of `step`.

    Raises:
        DivergedError: the LoRA or the optimizer is not finite.
        DiskError: it cannot be written.
    """
    tensors, optimizer = optimizers.optimizer_state(run.optimizer)
    numbers = {"optimizer": optimizer, "identity": dict(run.identity)}
    averages = run.ema.state() if run.ema else {}
    for path in checkpoint.save(run.folder.checkpoints, step, run.lora.state() | averages | tensors, numbers):
        run.console.warning(f"{path}: cannot be removed; going on")


def export_step(run: TrainState, step: int) -> None:
    """Write the LoRA of `step`, and its average, and prove that diffusers and ComfyUI read what was trained."""
    last = run.config.train.steps
    _export(run, step, run.folder.lora(None if step == last else step), run.lora.factors())
    if run.ema is not None:
        averaged = run.lora.factors(run.ema.shadow)
        _export(run, step, run.folder.lora(None if step == last else step, is_ema=True), averaged)


def _export(run: TrainState, step: int, path: Path, trained: Lora) -> None:
    config = run.config
    lora_file.export_lora(path, trained, config.save.dtype, {**run.export_metadata, "ss_steps": str(step)})
    try:
        error = verify.verify_export(path, trained, config.save.dtype, run.frozen.shape.linears)
    except WeightsError:
        atomic.rename_as_backup(path, ".unverified")
        raise
    count = f"{len(trained)}/{len(trained)}"
    run.console.info(f"step {step}: exported {path} ({count} modules verified, relative error {error:.1e})")
    if run.preview_sets:
        atomic.write_json(
            comfyui.workflow_path(path),
            comfyui.comfyui_workflow(run.preview_sets[0].requests[0], config.model, path.name),
        )
    _prune(run, path.parent)


def _prune(run: TrainState, folder: Path) -> None:
    name = re.compile(re.escape(run.config.name) + r"-(\d{6,})\.safetensors")
    numbered = sorted((int(match[1]), path) for path in folder.iterdir() if (match := name.fullmatch(path.name)))
    for _, path in numbered[: -run.config.save.keep]:
        if not (atomic.remove(path) and atomic.remove(comfyui.workflow_path(path))):
            run.console.warning(f"{path}: cannot be removed; going on")


def preview(run: TrainState, step: int, events: RecordWriter) -> None:
    """Sample every prompt on the true model, but for images of `step` that are there already.

    A failing preview is reported and costs no step: the checkpoint is already on disk.

    Raises:
        NotRestored: the training weights could not be put back, so that no further step can be trained.
    """
    if not run.preview_sets:
        return
    measured: dict[str, float] = {}
    try:
        for view in run.preview_sets:
            measured |= render_previews(run, view, step)
        preview_images.save_grid(run.folder.samples / "grid.png", preview_sets.all_previews_table(run.preview_sets))
    except NotRestoredError:
        raise
    except Exception as error:  # noqa: BLE001  a preview that fails must not end a run
        run.console.warning(f"preview at step {step} failed ({type(error).__name__}: {error}); training goes on")
        events.append({"step": step, "event": "preview_failed", "error": str(error)})
        return
    events.append({"step": step, "event": "preview", **preview_metrics(run, step), **measured})
    if "drift" in measured:
        run.trackers.drift(step, measured["drift"])
    for view in run.preview_sets:
        run.trackers.images(step, {one.prompt[:80] + view.suffix: path for path, one in view.expected(step)})


def render_previews(run: TrainState, view: PreviewSet, step: int) -> dict[str, float]:
    """Render the missing images of one preview set with the LoRA as an exported file holds it; return measurements.

    The drift is measured where the set is on Turbo, on the same weights as the images are drawn with.
    """
    missing, measured = view.missing(step), dict[str, float]()
    meter = run.drift_meter if view.is_metered and step > 0 else None
    if not missing and meter is None:
        return measured
    model, sample = run.frozen.model, run.config.sample
    is_averaged = sample.weights == "ema" and run.ema is not None
    trained = run.lora.factors(run.ema.shadow if is_averaged and run.ema else None)
    requests = [request for _, request in missing]
    preview_progress = partial(run.console.progress, f"preview at step {step}{view.suffix}")
    drift_progress = partial(run.console.progress, f"drift at step {step}")
    with run.with_preview_loras(lora_file.round_to_dtype(trained, run.config.save.dtype)):
        # Swapping weights reads files, so it is done once, for both. Decoding needs no transformer: it comes after.
        with eval_mode(model), original_weights(run.frozen, view.second_model):
            latents = sample_all(model, requests, run.preview_embeds, preview_progress)
            if meter is not None:
                measured["drift"] = meter.measure(model, drift_progress)
        images = decode_all(model, run.extras, latents)
    model_name = sample.compare_on if view.second_model else run.config.model.path or run.config.model.variant
    lora_name = "averaged LoRA" if is_averaged else "LoRA"
    extra = "".join(f" and {lora.file}={lora.weight:g}" for lora in sample.extra_loras)
    drawn_by = (
        f"{model_name} in {run.config.model.dtype} with the {lora_name} of {run.config.name} at step {step}{extra}"
    )
    for (path, request), image in zip(missing, images, strict=True):
        preview_images.save_preview(path, image, request, drawn_by, view.run)
    if measured:
        run.console.info(f"step {step}: drift {measured['drift']:.3f} from Turbo's own steps")
    return measured


def preview_metrics(run: TrainState, step: int) -> dict[str, Any]:
    """What the previews of `step` say, for events.jsonl; said aloud where someone should know."""
    own, *others = [view.table() for view in run.preview_sets]
    words = run.config.triggers
    record: dict[str, Any] = {"pictures": [path.name for path in own.rows[step] if path]}
    for one in preview_shift.preview_shifts(own, words):
        if one.step == step:
            record |= {"change_with_trigger": one.with_trigger, "change_without_trigger": one.without_trigger}
            remark = preview_shift.shift_remark(one, run.config.train.steps)
            if remark and not run.config.method.generates_data:  # images are to stay as they are
                run.console.warning(remark)
    if step > 0:
        record["sharpness_kept"] = preview_shift.sharpness_kept(own, words, step)
    for other in others:
        kept = preview_shift.sharpness_kept(other, words, step) if step > 0 else None
        if kept is not None:
            record["sharpness_kept_also"] = kept
            run.console.info(
                f"step {step}: on {run.config.sample.compare_on} the LoRA keeps {kept:.0%} of the sharpness"
            )
    return record


def after_step(run: TrainState, step: int, events: RecordWriter, metrics: RecordWriter) -> None:
    """Do all that is due after `step`, in the order in which a crash costs least; done again, it changes nothing."""
    if not run.world.is_main:
        return
    last = run.config.train.steps
    saves = step == last or is_due(run.config.save.every, step, last)
    draws = is_due(run.config.sample.every, step, last)
    if saves:
        metrics.sync()
        if step > run.start_step:
            save_checkpoint(run, step)
        events.append({"step": step, "event": "save"})
        export_step(run, step)
    if is_due(run.config.validation.every, step, last):
        validate(run, step, events)
    if draws:
        preview(run, step, events)
    if saves or draws:
        write_report(run)


def is_complete(context: RunContext, step: int) -> bool:
    """Return whether a run that stands at `step` has nothing left to do: `done` is the last event that a run writes.

    The LoRA must be whole and as `save.dtype` says, and the last previews those of `sample`: both may have changed.
    """
    config, folder = context.config, context.folder
    last = config.train.steps
    is_done = any(one["step"] == last and one.get("event") == "done" for one in read_records(folder.events))
    if step != last or not is_done or not folder.report.exists():
        return False
    paths = [folder.lora(), *([folder.lora(is_ema=True)] if config.ema.decay is not None else [])]
    try:
        dtypes = {info.dtype for path in paths for key, info in read_header(path).tensors.items() if "lora_" in key}
    except WeightsError:
        return False
    return dtypes == {DTYPE_NAMES[TORCH_DTYPES[config.save.dtype]]} and not any(
        previews.missing(last) for previews in context.preview_sets
    )


def write_report(run: TrainState) -> None:
    """Write report.html from what is in the run folder."""
    facts: dict[str, Any] = run_dir.read_facts(run.folder)
    page.write_report_page(
        run.folder.report,
        name=run.config.name,
        facts=facts,
        metrics_path=run.folder.metrics,
        events_path=run.folder.events,
        own_previews=run.preview_sets[0].table() if run.preview_sets else None,
        all_previews=preview_sets.all_previews_table(run.preview_sets)
        if run.preview_sets
        else preview_images.preview_table(run.folder.samples),
        config_text=dump_config(run.config),
        warnings=run.warnings,
        triggers=run.config.triggers,
        steps=run.config.train.steps,
    )
