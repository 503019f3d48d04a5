"""The `train` and `cache` commands: check, lock, prepare, train, and leave in good order whatever happens."""

import contextlib
from typing import Any

from zimage_train import checkpoint, distributed, files, preflight
from zimage_train.config.schema import Config
from zimage_train.data.plan import make_plan
from zimage_train.errors import ConfigError, Problem
from zimage_train.model.sources import download
from zimage_train.report.console import Console
from zimage_train.report.metrics import Records
from zimage_train.training import run_folder, setup
from zimage_train.training.loop import train as run_loop
from zimage_train.training.publish import write_report
from zimage_train.training.run_folder import RunFolder
from zimage_train.training.stopping import stop_on_signals


def train(config: Config, fresh: bool) -> None:
    """Train `config` to its end, or continue what an earlier start of it left.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    world = distributed.join()
    console = Console(world.is_main)
    checked = preflight.examine(config, download)
    for line in (*(f"note: {note}" for note in checked.notes), *(f"warning: {one}" for one in checked.warnings)):
        console.say(line)
    folder = run_folder.of(config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        if world.is_main:
            if fresh and folder.root.exists():
                _move_aside(folder, console)
            stack.enter_context(files.locked(folder.root))
            files.clear_debris(folder.root)
            console.log_to(folder.log)
            stack.callback(console.close)
        distributed.wait()
        session = setup.open_session(checked, world, console, stop)
        if folder.facts.exists():
            run_folder.require_same(folder, config, setup.fingerprint_of(checked, session.digests))
        if _is_complete(folder, config):
            console.say(f"{config.name} is complete: {folder.lora()}")
            return
        stack.enter_context(console.live())
        run = setup.prepare(checked, folder, session)
        if run.start > config.train.steps:
            what = f"is {config.train.steps}, and the run is at step {run.start} already"
            raise ConfigError(Problem("train.steps", what, "raise it"))
        metrics, events = (
            stack.enter_context(contextlib.closing(Records(path if world.is_main else None, run.start)))
            for path in (folder.metrics, folder.events)
        )
        board = _board(folder, run.start, stack) if config.log.tensorboard and world.is_main else None
        run_loop(run, metrics, events, board)
        if world.is_main:
            write_report(run)
    console.say(f"done: {folder.lora()}")
    console.say(f"look at {folder.report}, and sample with it:")
    console.say(f"  {_sample_command(config, folder)}")


def cache(config: Config) -> None:
    """Fill the latent and text caches of `config`, and do nothing else.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    world = distributed.join()
    console = Console(world.is_main)
    checked = preflight.examine(config, download)
    with stop_on_signals() as stop, console.live():
        session = setup.open_session(checked, world, console, stop)
        setup.fill_caches(checked, session, make_plan(config, checked.items, world.processes))


def _move_aside(folder: RunFolder, console: Console) -> None:
    with files.locked(folder.root):
        pass  # refuse to move the folder of a run that is going on
    console.say(f"--fresh: the old run is now {files.set_aside(folder.root, '.old')}")


def _is_complete(folder: RunFolder, config: Config) -> bool:
    newest = checkpoint.steps_in(folder.checkpoints)
    return bool(newest) and newest[0][0] == config.train.steps and folder.lora().exists() and folder.report.exists()


def _board(folder: RunFolder, start: int, stack: contextlib.ExitStack) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder.tensorboard), purge_step=start + 1 if start else None)
    stack.callback(board.close)
    return board


def _sample_command(config: Config, folder: RunFolder) -> str:
    prompt = config.sample.prompts[0].prompt if config.sample.prompts else "..."
    model = config.model.path or config.model.variant
    size = f" --width {config.sample.width} --height {config.sample.height}"
    dtype = "" if config.model.dtype == "bf16" else f" --dtype {config.model.dtype}"
    return f'zimage-train sample {model} --lora {folder.lora()} --prompt "{prompt}"{size}{dtype}'
