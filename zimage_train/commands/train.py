"""The `train` and `cache` commands: check, lock, prepare, train, and leave in good order whatever happens."""

import contextlib
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from zimage_train.commands.sample import command_for
from zimage_train.config.load import resolve_paths
from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import make_sample_order
from zimage_train.io import atomic, locks
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import cached_only, download
from zimage_train.planning import devices, preflight
from zimage_train.planning.preflight import RunSpec
from zimage_train.report import preview_images
from zimage_train.report.console import Console
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.report.trackers import TensorBoard, Tracker, Trackers, WeightsAndBiases
from zimage_train.training import build, distributed, loop, preview_sets, run_dir
from zimage_train.training.distributed import World
from zimage_train.training.dry_run import compare_with_forecast, dry_run
from zimage_train.training.fit import plan_for_devices, plan_warnings, with_quantization
from zimage_train.training.outputs import is_complete, write_report
from zimage_train.training.run_dir import RunDir
from zimage_train.training.signals import StopRequest, stop_on_signals
from zimage_train.training.validation import log_best_step


def run_training(config: Config, fresh: bool, allow: tuple[str, ...] = (), stop: StopRequest | None = None) -> None:
    """Train `config` to its end, or continue what an earlier start of it left, with the changes that `allow` names.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    run_dir.require_allowable(allow)
    world = distributed.init()
    console = Console(world.is_main)
    checked = check_for_training(config, world)
    folder = run_dir.run_dir_of(config)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(stop_on_signals())  # a sweep has its own
        if world.is_main:
            if fresh and folder.root.exists():
                _move_aside(folder, console)
            stack.enter_context(locks.lock_folder(folder.root))
            atomic.remove_stale_temp_files(folder.root)
            console.log_to(folder.log)
            stack.callback(console.close)
        distributed.barrier()
        for line in (*(f"note: {note}" for note in checked.notes), *(f"warning: {one}" for one in checked.warnings)):
            console.info(line)
        session = build.open_context(checked, world, console, stop, allow)
        fit = plan_for_devices(checked, world, folder)
        config = with_quantization(checked.config, fit.form.kind)
        checked = replace(checked, config=config)
        identity = run_dir.run_identity(config, build.run_fingerprint(checked, session.digests))
        found = build.find_checkpoint(folder, config, identity, session)
        if found is not None and is_complete(folder, config, found.step, identity):
            console.info(f"{config.name} is complete: {folder.lora()}")
            return
        if world.is_main:
            for view in preview_sets.make_preview_sets(config, folder, identity, None):
                preview_images.remove_later(view.folder, found.step if found else 0, view.run)
        stack.enter_context(console.live_progress())
        room = min(devices.available_bytes(world.device), 0.9 * fit.peak.total)
        less = preflight.how_to_fit(checked, room, world.device.type == "cuda")
        stack.enter_context(devices.explained_out_of_memory(f"{less}; the last checkpoint is good"))
        trackers = _trackers(config, folder, found.step if found else 0, console) if world.is_main else []
        told = stack.enter_context(contextlib.closing(Trackers(trackers, console.warning)))
        for remark in plan_warnings(checked, fit):
            console.warning(remark)
        run = build.build_state(checked, fit, folder, session, identity, found, told)
        stack.enter_context(devices.reproducible(world.device))
        if run.start_step < config.train.steps:
            run, took = dry_run(run)
            run_dir.add_facts(folder, {"rehearsal": took} if world.is_main else {})
        metrics, events = (
            stack.enter_context(contextlib.closing(RecordWriter(path if world.is_main else None, run.start_step)))
            for path in (folder.metrics, folder.events)
        )
        loop.train(run, metrics, events)
        if world.is_main:
            compare_with_forecast(
                run, [record for record in read_records(folder.metrics) if record["step"] > run.start_step]
            )
            write_report(run)
            events.append({"step": config.train.steps, "event": "done"})
        log_best_step(run)
        _say_done(config, folder, console)


def _say_done(config: Config, folder: RunDir, console: Console) -> None:
    console.info(f"done: {folder.lora()}")
    console.info(f"look at {folder.report}, and sample with it:")
    console.info(f"  {command_for(resolve_paths(config), folder.lora().absolute())}")
    if home := copy_command(folder.lora().absolute(), os.environ):
        console.info(f"bring it home:\n  {home}")
    if config.ema.decay is not None:
        console.info(f"averaged weights: {folder.lora(is_ema=True)}")
    if config.model.quantize is not None:
        console.info(f"(it draws in {config.model.dtype}; the previews of this run are of {config.model.quantize})")


def copy_command(path: Path, environment: Mapping[str, str]) -> str | None:
    """The command that copies `path` from this pod, to be typed at home; None where this is no pod.

    RunPod sets these variables. From a pod without a public address `runpodctl send` sends, and says what to type.
    """
    if not environment.get("RUNPOD_POD_ID"):
        return None
    address, port = environment.get("RUNPOD_PUBLIC_IP"), environment.get("RUNPOD_TCP_PORT_22")
    if address and port:
        return f"scp -P {port} {shlex.quote(f'root@{address}:{path}')} ."
    return f"runpodctl send {shlex.quote(str(path))}   # here; it prints what to type at home"


def fill_run_caches(config: Config) -> None:
    """Fill the latent and text caches of `config`, and do nothing else.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    world = distributed.init()
    console = Console(world.is_main)
    checked = preflight.check_run(config, download, processes=world.world_size)
    explained = devices.explained_out_of_memory("use a card with more memory, or lower data.resolution")
    with stop_on_signals() as stop, console.live_progress(), explained:
        session = build.open_context(checked, world, console, stop)
        build.fill_caches(checked, session, make_sample_order(checked.config, checked.items, world.world_size))
        if config.method.generates_data:
            console.info("the model's own images are drawn by train, before its first step")


def _move_aside(folder: RunDir, console: Console) -> None:
    with locks.lock_folder(folder.root):
        pass  # refuse to move the folder of a run that is going on
    console.info(f"--fresh: the old run is now {atomic.rename_as_backup(folder.root, '.old')}")


def check_for_training(config: Config, world: World) -> RunSpec:
    """All of `check`; without a GPU the published models are not downloaded only to be refused.

    Raises:
        ZImageTrainError: every problem found.
    """
    is_useless = world.device.type == "cpu" and config.model.path is None
    checked = preflight.check_run(config, cached_only if is_useless else download, processes=world.world_size)
    shape = checked.weights.shape if checked.weights else TransformerShape()
    devices.require_device(world.device, shape, config.model.dtype)
    return checked


def _trackers(config: Config, folder: RunDir, start: int, console: Console) -> list[Tracker]:
    """Those that `log` asks for, before anything is loaded: who is not logged in wants to know now."""
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder.tensorboard, start))
    if config.log.wandb is not None:
        run_id = run_dir.wandb_id(folder)
        settings = config.model_dump(mode="json")
        trackers.append(WeightsAndBiases(config.log.wandb, config.name, folder.root, run_id, settings))
        console.info(f"logging to project {config.log.wandb} on Weights & Biases, run {run_id}")
    return trackers
