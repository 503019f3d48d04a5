"""The files that a run writes beside its metrics: checkpoints, previews, the report; `exports` writes the LoRAs."""

import time
from functools import partial
from typing import Any

from zimage_train.config.load import dump_config
from zimage_train.config.types import without_folder
from zimage_train.diffusion.frozen import NotRestoredError, original_weights
from zimage_train.diffusion.render import decode_all, eval_mode, sample_all
from zimage_train.errors import Stopped, WeightsError
from zimage_train.io.dtypes import PRECISIONS
from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import lora_file, metadata
from zimage_train.optim import optimizers
from zimage_train.planning.verdicts import run_verdicts
from zimage_train.report import page, preview_images, preview_shift
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.training import checkpoint, exports, preview_sets, requests, run_dir
from zimage_train.training.context import RunContext
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.state import TrainState, is_due
from zimage_train.training.validation import validate

SLOW_SAVE_SECONDS = 60.0
"""Time to write a checkpoint, mostly below 1 GB, from which it is worth a warning."""


def save_checkpoint(state: TrainState, step: int) -> None:
    """Write the checkpoint of `step`.

    Raises:
        DivergedError: the LoRA or the optimizer is not finite.
        DiskError: it cannot be written.
    """
    began = time.monotonic()
    tensors, optimizer = optimizers.optimizer_state(state.optimizer, state.lora.flat)
    numbers = {"optimizer": optimizer, "identity": dict(state.identity), "path": state.path}
    tensors |= state.lora.state() | state.lora.fixed_state() | (state.ema.state() if state.ema else {})
    for path in checkpoint.save(state.folder.checkpoints, step, tensors, numbers):
        state.console.warning(f"{path}: cannot be removed; going on")
    state.last_save.step, state.last_save.at = step, time.monotonic()
    if (seconds := state.last_save.at - began) > SLOW_SAVE_SECONDS:
        state.console.warning(
            f"step {step}: the checkpoint took {seconds:.0f} s to write; the volume of output_dir is slow or did not "
            "answer, and a run waits for it at each save"
        )


def is_checkpoint_due(state: TrainState) -> bool:
    """Return whether `save.checkpoint_minutes` have passed since the last checkpoint."""
    minutes = state.config.save.checkpoint_minutes
    return minutes is not None and time.monotonic() - state.last_save.at >= 60.0 * minutes


def preview(state: TrainState, step: int, events: RecordWriter) -> None:
    """Draw every preview of `step` that is missing, without the training adapter.

    A preview that fails is reported, and training goes on: the checkpoint is already on disk.

    Raises:
        NotRestoredError: the training weights could not be put back, so that no further step can be trained.
        Stopped: a signal came; the training weights are not put back.
    """
    if not state.preview_sets:
        return
    measured: dict[str, float] = {}
    try:
        for previews in state.preview_sets:
            with state.clock.stage("previews"), state.run_step.between_steps():
                measured |= render_previews(state, previews, step)
        preview_images.save_grid(state.folder.samples / "grid.png", preview_sets.all_previews_table(state.preview_sets))
    except (NotRestoredError, Stopped):
        raise
    except Exception as error:  # noqa: BLE001  a preview that fails must not end a run
        state.console.warning(f"preview at step {step} failed ({type(error).__name__}: {error}); training goes on")
        events.append({"step": step, "event": "preview_failed", "error": str(error)})
        return
    events.append({"step": step, "event": "preview", **preview_metrics(state, step), **measured})
    for verdict in run_verdicts(state.config, read_records(state.folder.events)):
        state.console.warning(verdict.text, verdict=verdict.kind)
    if "drift" in measured:
        state.trackers.drift(step, measured["drift"])
    for previews in state.preview_sets:
        state.trackers.images(
            step, {request.prompt[:80] + previews.suffix: path for path, request in previews.expected(step)}
        )


def render_previews(state: TrainState, previews: PreviewSet, step: int) -> dict[str, float]:
    """Render the missing images of a preview set, and return the drift if it is measured on this set.

    Both use the LoRA rounded to `save.dtype`, as an exported file holds it.
    """
    missing, measured = previews.missing(step), dict[str, float]()
    meter = state.drift_meter if previews.measures_drift and step > 0 else None
    if not missing and meter is None:
        return measured
    model, sample = state.frozen.model, state.config.sample
    is_averaged = sample.weights == "ema" and state.ema is not None
    trained = state.lora.deltas(state.ema.shadow if is_averaged and state.ema else None)
    requests = [request for _, request in missing]
    preview_progress = partial(state.report_progress, f"preview at step {step}{previews.suffix}")
    drift_progress = partial(state.report_progress, f"drift at step {step}")
    rounded = lora_file.round_to_dtype(trained, state.config.save.dtype)
    with state.with_preview_loras(rounded, previews.lora_weight):
        # Putting the original weights in place reads files, so sampling and drift share it. Decoding needs no
        # transformer, so it comes after.
        with eval_mode(model), original_weights(state.frozen, previews.second_model):
            latents = sample_all(model, requests, state.preview_embeds, preview_progress)
            if meter is not None:
                with state.clock.stage("drift"):
                    measured["drift"] = meter.measure(model, drift_progress)
        images = decode_all(model, state.vae_path, latents)
    model_name = without_folder(sample.compare_on or "") if previews.second_model else state.config.model.label
    lora_name = "averaged LoRA" if is_averaged else "LoRA"
    extra = "".join(f" and {without_folder(lora.file)}={lora.weight:g}" for lora in state.config.preview_loras)
    weight = "" if previews.lora_weight == 1.0 else f" and weight {previews.lora_weight:g}"
    drawn_by = (
        f"{model_name} in {state.config.model.dtype} with the {lora_name} of {state.config.name} at step {step}"
        f"{weight}{extra}"
    )
    for (path, request), image in zip(missing, images, strict=True):
        preview_images.save_preview(path, image, request, drawn_by, previews.run)
    if measured:
        state.console.info(f"step {step}: drift {measured['drift']:.3f} from Turbo's own steps")
    return measured


def preview_metrics(state: TrainState, step: int) -> dict[str, Any]:
    """Return the measures of the previews of `step` for events.jsonl."""
    own_table, *second_tables = [previews.table() for previews in state.preview_sets if previews.lora_weight == 1.0]
    triggers = state.config.triggers
    record: dict[str, Any] = {"pictures": [path.name for path in own_table.rows[step] if path]}
    for shift in preview_shift.preview_shifts(own_table, triggers):
        if shift.step == step:
            record |= {"change_with_trigger": shift.with_trigger, "change_without_trigger": shift.without_trigger}
    if step > 0:
        record["sharpness_kept"] = preview_shift.sharpness_kept(own_table, triggers, step)
    for table in second_tables:
        kept = preview_shift.sharpness_kept(table, triggers, step) if step > 0 else None
        if kept is not None:
            record["sharpness_kept_also"] = kept
            state.console.info(
                f"step {step}: on {state.config.sample.compare_on} the LoRA keeps {kept:.0%} of the sharpness"
            )
    return record


def after_step(state: TrainState, step: int, events: RecordWriter, metrics: RecordWriter) -> None:
    """Do all that is due or was asked for after `step`: save, export, validate, preview, write the report.

    The checkpoint comes first, so that a crash in the rest costs no training. A run that continues after `step` calls
    this again: exports are written anew with the same content, and validations and images that exist are kept.
    """
    if not state.world.is_main:
        return
    last = state.config.train.steps
    asked = requests.take(state.folder)
    if "preview" in asked and not state.preview_sets:
        state.console.warning("previews were asked for, but sample.prompts is empty or sample.every is null")
    saves = exports.is_save_due(state, step) or "save" in asked
    draws = is_due(state.config.sample.every, step, last) or "preview" in asked
    validates = is_due(state.config.validation.every, step, last)
    if saves:
        with state.clock.stage("saves"):
            metrics.sync()
            if step > state.last_save.step:  # else the run has just been loaded from this checkpoint
                save_checkpoint(state, step)
            events.append({"step": step, "event": "save"})
    elif is_checkpoint_due(state):
        with state.clock.stage("saves"):
            metrics.sync()
            save_checkpoint(state, step)
    if saves or validates or draws:
        with state.with_result():
            _look_at_result(state, step, events, saves=saves, validates=validates, draws=draws)
    if saves and draws:
        exports.save_picture(state, step)
    if saves or draws:
        write_report(state)


def _look_at_result(
    state: TrainState, step: int, events: RecordWriter, saves: bool, validates: bool, draws: bool
) -> None:
    """Export, validate and preview the weights that the model holds."""
    if saves:
        with state.clock.stage("saves"):
            exports.export_step(state, step)
    if validates:
        validate(state, step, events)
    if draws:
        preview(state, step, events)


def is_complete(context: RunContext, step: int) -> bool:
    """Return whether a run with its newest checkpoint at `step` has nothing left to do.

    `done` must be among its events, as the last thing that a run writes. The exported LoRA must be readable and have
    `save.dtype` and `save.metadata`, and the last previews must be those of `sample`, since these settings may change
    on resume.
    """
    config, folder = context.config, context.folder
    last = config.train.steps
    is_done = any(event["step"] == last and event.get("event") == "done" for event in read_records(folder.events))
    if step != last or not is_done or not folder.report.exists():
        return False
    paths = [folder.lora(), *([folder.lora(is_ema=True)] if config.ema.decay is not None else [])]
    try:
        headers = [read_header(path) for path in paths]
    except WeightsError:
        return False
    dtypes: set[str] = set()
    for header in headers:
        dtypes |= {info.dtype for key, info in header.tensors.items() if not key.endswith((".alpha", ".dora_scale"))}
    levels = {metadata.level_of(header.metadata) for header in headers}
    return (dtypes, levels) == ({PRECISIONS[config.save.dtype]}, {config.save.metadata}) and not any(
        previews.missing(last) for previews in context.preview_sets
    )


def write_report(state: TrainState) -> None:
    """Write report.html from the records, facts and previews in the run folder."""
    facts: dict[str, Any] = run_dir.read_facts(state.folder)
    page.write_report_page(
        state.folder.report,
        name=state.config.name,
        facts=facts,
        metrics_path=state.folder.metrics,
        events_path=state.folder.events,
        all_previews=preview_sets.all_previews_table(state.preview_sets)
        if state.preview_sets
        else preview_images.preview_table(state.folder.samples),
        config_text=dump_config(state.config),
        warnings=[*state.warnings, *map(str, run_verdicts(state.config, read_records(state.folder.events)))],
    )
