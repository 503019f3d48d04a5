"""The `train` and `cache` commands: check, lock, prepare, train, and leave in good order whatever happens."""

import contextlib
import os
from dataclasses import replace

from zimage_train.commands import runpod as pods
from zimage_train.commands.sample import command_for
from zimage_train.config import methods
from zimage_train.config.load import resolved
from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import make_plan
from zimage_train.io import atomic as files
from zimage_train.models.arch import TransformerShape
from zimage_train.models.locate import cached_only, download
from zimage_train.planning import devices as accelerator
from zimage_train.planning import preflight
from zimage_train.planning.preflight import Checked
from zimage_train.report import preview_images as pictures
from zimage_train.report.console import Console
from zimage_train.report.metrics import Records, read
from zimage_train.report.trackers import TensorBoard, Tracker, Trackers, WeightsAndBiases
from zimage_train.training import build as setup
from zimage_train.training import distributed
from zimage_train.training import fit as fitting
from zimage_train.training import preview_sets as views
from zimage_train.training import run_dir as run_folder
from zimage_train.training.distributed import World
from zimage_train.training.dry_run import compare, rehearse
from zimage_train.training.loop import train as run_loop
from zimage_train.training.outputs import is_complete, write_report
from zimage_train.training.run_dir import RunFolder
from zimage_train.training.signals import StopRequest, stop_on_signals
from zimage_train.training.validation import say_best


def train(config: Config, fresh: bool, allow: tuple[str, ...] = (), stop: StopRequest | None = None) -> None:
    """Train `config` to its end, or continue what an earlier start of it left, with the changes that `allow` names.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    run_folder.require_allowable(allow)
    world = distributed.join()
    console = Console(world.is_main)
    checked = examine(config, world)
    folder = run_folder.of(config)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(stop_on_signals())  # a sweep has its own
        if world.is_main:
            if fresh and folder.root.exists():
                _move_aside(folder, console)
            stack.enter_context(files.locked(folder.root))
            files.clear_debris(folder.root)
            console.log_to(folder.log)
            stack.callback(console.close)
        distributed.wait()
        for line in (*(f"note: {note}" for note in checked.notes), *(f"warning: {one}" for one in checked.warnings)):
            console.say(line)
        session = setup.open_session(checked, world, console, stop, allow)
        fit = fitting.plan_memory(checked, world, folder)
        config = fitting.quantized(checked.config, fit.form.kind)
        checked = replace(checked, config=config)
        identity = run_folder.identity(config, setup.fingerprint_of(checked, session.digests))
        found = setup.find_checkpoint(folder, config, identity, session)
        if found is not None and is_complete(folder, config, found.step, identity):
            console.say(f"{config.name} is complete: {folder.lora()}")
            return
        if world.is_main:
            for view in views.of(config, folder, identity, None):
                pictures.drop_later(view.folder, found.step if found else 0, view.run)
        stack.enter_context(console.live())
        room = min(accelerator.room_bytes(world.device), 0.9 * fit.peak.total)
        less = preflight.less_memory(checked, room, world.device.type == "cuda")
        stack.enter_context(accelerator.explained_out_of_memory(f"{less}; the last checkpoint is good"))
        trackers = _trackers(config, folder, found.step if found else 0, console) if world.is_main else []
        told = stack.enter_context(contextlib.closing(Trackers(trackers, console.warn)))
        for remark in fitting.remarks(checked, fit):
            console.warn(remark)
        run = setup.prepare(checked, fit, folder, session, identity, found, told)
        stack.enter_context(accelerator.reproducible(world.device))
        if run.start < config.train.steps:
            run, took = rehearse(run)
            run_folder.add_facts(folder, {"rehearsal": took} if world.is_main else {})
        metrics, events = (
            stack.enter_context(contextlib.closing(Records(path if world.is_main else None, run.start)))
            for path in (folder.metrics, folder.events)
        )
        run_loop(run, metrics, events)
        if world.is_main:
            compare(run, [record for record in read(folder.metrics) if record["step"] > run.start])
            write_report(run)
            events.append({"step": config.train.steps, "event": "done"})
        say_best(run)
        _say_done(config, folder, console)


def _say_done(config: Config, folder: RunFolder, console: Console) -> None:
    console.say(f"done: {folder.lora()}")
    console.say(f"look at {folder.report}, and sample with it:")
    console.say(f"  {command_for(resolved(config), folder.lora().absolute())}")
    if home := pods.bring_home(folder.lora().absolute(), os.environ):
        console.say(f"bring it home:\n  {home}")
    if config.ema.decay is not None:
        console.say(f"averaged weights: {folder.lora(is_ema=True)}")
    if config.model.quantize is not None:
        console.say(f"(it draws in {config.model.dtype}; the previews of this run are of {config.model.quantize})")


def cache(config: Config) -> None:
    """Fill the latent and text caches of `config`, and do nothing else.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    world = distributed.join()
    console = Console(world.is_main)
    checked = preflight.examine(config, download, processes=world.processes)
    explained = accelerator.explained_out_of_memory("use a card with more memory, or lower data.resolution")
    with stop_on_signals() as stop, console.live(), explained:
        session = setup.open_session(checked, world, console, stop)
        setup.fill_caches(checked, session, make_plan(checked.config, checked.items, world.processes))
        if methods.learns_from_itself(config.train.method):
            console.say("the model's own pictures are drawn by train, before its first step")


def _move_aside(folder: RunFolder, console: Console) -> None:
    with files.locked(folder.root):
        pass  # refuse to move the folder of a run that is going on
    console.say(f"--fresh: the old run is now {files.set_aside(folder.root, '.old')}")


def examine(config: Config, world: World) -> Checked:
    """All of `check`; without a GPU the published models are not downloaded only to be refused.

    Raises:
        ZImageTrainError: every problem found.
    """
    is_useless = world.device.type == "cpu" and config.model.path is None
    checked = preflight.examine(config, cached_only if is_useless else download, processes=world.processes)
    shape = checked.weights.shape if checked.weights else TransformerShape()
    accelerator.require(world.device, shape, config.model.dtype)
    return checked


def _trackers(config: Config, folder: RunFolder, start: int, console: Console) -> list[Tracker]:
    """Those that `log` asks for, before anything is loaded: who is not logged in wants to know now."""
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder.tensorboard, start))
    if config.log.wandb is not None:
        run_id = run_folder.wandb_id(folder)
        settings = config.model_dump(mode="json")
        trackers.append(WeightsAndBiases(config.log.wandb, config.name, folder.root, run_id, settings))
        console.say(f"logging to project {config.log.wandb} on Weights & Biases, run {run_id}")
    return trackers
