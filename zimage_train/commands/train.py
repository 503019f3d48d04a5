"""The `train` and `cache` commands: check, lock, plan, build, train, finish."""

import contextlib
import itertools
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from zimage_train.commands.sample import command_for
from zimage_train.config.load import resolve_paths
from zimage_train.config.schema import Config
from zimage_train.io import atomic, locks
from zimage_train.models.arch import TransformerShape
from zimage_train.models.attention_choice import attention_by, resolve_attention
from zimage_train.models.locate import cached_only, download
from zimage_train.planning import devices, forecast, preflight
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.planning.run_times import Stage, describe_times
from zimage_train.report.console import Console
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.report.trackers import TensorBoard, Tracker, Trackers, WeightsAndBiases
from zimage_train.training import distributed, loop, requests, run_dir
from zimage_train.training.build import build_state, fill_caches
from zimage_train.training.context import RunContext, find_checkpoint, open_context, shared_facts
from zimage_train.training.device_plan import block_path, plan_for_devices, plan_warnings
from zimage_train.training.distributed import World
from zimage_train.training.dry_run import compare_with_forecast, dry_run
from zimage_train.training.heartbeat import watch_processes
from zimage_train.training.launch import launch_warnings
from zimage_train.training.outputs import is_complete, write_report
from zimage_train.training.preview_sets import remove_later_previews
from zimage_train.training.run_dir import RunDir
from zimage_train.training.signals import StopRequest, stop_on_signals
from zimage_train.training.stage_clock import StageClock
from zimage_train.training.state import TrainState
from zimage_train.training.validation import log_best_step

_RUNS = itertools.count()
"""Numbers the runs of this process; all processes of a sweep train them in the same order."""


def run_training(config: Config, fresh: bool, allow: tuple[str, ...] = (), stop: StopRequest | None = None) -> None:
    """Train `config` to its last step, from the newest checkpoint of the run if there is any.

    `allow` names settings that may differ from the earlier start; `fresh` moves the earlier run aside. A command that
    trains several runs handles signals itself and passes its `stop`.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    run_dir.require_allowable(allow)
    clock = StageClock()
    world = distributed.init()
    spec = check_for_training(config, world)
    attention = resolve_attention(config.model.attention, world.device)  # before an earlier run is moved aside
    folder = run_dir.run_dir_of(config)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(stop_on_signals())
        console = stack.enter_context(_locked_run_dir(folder, world, fresh))
        stack.enter_context(watch_processes(world, str(next(_RUNS))))
        _print_remarks(spec, console)
        for line in launch_warnings(os.environ, config.model.dtype):
            console.warning(line)
        spec, plan = plan_for_devices(spec, world, folder, allow)
        context = open_context(spec, world, console, stop, clock)
        checkpoint = find_checkpoint(context, block_path(plan, world.device, attention), allow)
        start_step = checkpoint.step if checkpoint else 0
        distributed.require_equal(world, shared_facts(context, start_step))
        # Another machine may lack the files of the main process.
        if distributed.of_main(checkpoint is not None and is_complete(context, checkpoint.step)):
            console.info(f"{config.name} is complete: {folder.lora()}")
            return
        if world.is_main:
            remove_later_previews(context.preview_sets, start_step)
        stack.enter_context(console.live_progress())
        stack.enter_context(_explained_out_of_memory(context, plan))
        trackers = stack.enter_context(contextlib.closing(_open_trackers(context, start_step)))
        for remark in plan_warnings(spec, plan):
            console.warning(remark)
        with clock.stage("encoding"):
            fill_caches(context)
        with clock.stage("loading"):
            state = build_state(context, plan, checkpoint, trackers, attention, allow)
        # From here on every step must use the same kernels, or a resumed run would get other bits.
        stack.enter_context(attention_by(attention))
        if config.train.reproducible:
            stack.enter_context(devices.reproducible(world.device))
        with clock.stage("rehearsal"):
            state = dry_run(state)
        # Opening these removes the records after the checkpoint, so whatever may fail early comes before them.
        metrics = stack.enter_context(contextlib.closing(_open_records(state, folder.metrics)))
        events = stack.enter_context(contextlib.closing(_open_records(state, folder.events)))
        with clock.stage("steps"):
            loop.train(state, metrics, events)
        _finish(state, events, context)


@contextlib.contextmanager
def _locked_run_dir(folder: RunDir, world: World, fresh: bool) -> Iterator[Console]:
    """Lock the run folder within the block, which gets a console that also writes to the log file there.

    The other processes wait until the main process has the lock, and have a console that prints nothing.

    Raises:
        FolderInUseError: another process holds the folder.
    """
    console = Console(world.is_main)
    if not world.is_main:
        distributed.barrier()
        yield console
        return
    if fresh and folder.root.exists():
        with locks.lock_folder(folder.root):
            pass  # raises if a process is still training there, since its folder must not be moved
        console.info(f"--fresh: the old run is now {atomic.rename_as_backup(folder.root, '.old')}")
    with locks.lock_folder(folder.root), contextlib.closing(console):
        atomic.remove_stale_temp_files(folder.root)
        requests.take(folder)  # of a run that ended before it saw them; later requests are to this run
        console.log_to(folder.log)
        distributed.barrier()
        yield console


def _print_remarks(spec: RunSpec, console: Console) -> None:
    for note in spec.notes:
        console.info(f"note: {note}")
    for warning in spec.warnings:
        console.warning(str(warning))


def _explained_out_of_memory(context: RunContext, plan: MemoryPlan) -> AbstractContextManager[None]:
    """Turn an out-of-memory error of the GPU within the block into a problem that suggests settings."""
    device = context.world.device
    # If the plan does not fit, its prediction was too low, so the suggested settings are to take a tenth less.
    limit_bytes = min(devices.retry_limit_bytes(device), 0.9 * plan.peak.total)
    suggestion = preflight.how_to_fit(context.spec, limit_bytes, device.type == "cuda")
    return devices.explained_out_of_memory(f"{suggestion}; the last checkpoint is good")


def _open_trackers(context: RunContext, start_step: int) -> Trackers:
    """Open the trackers that `log` names. This comes before loading, so that a missing login fails at once."""
    config, folder, console = context.config, context.folder, context.console
    trackers: list[Tracker] = []
    if context.world.is_main:
        if config.log.tensorboard:
            trackers.append(TensorBoard(folder.tensorboard, start_step))
        if config.log.wandb is not None:
            run_id = run_dir.wandb_id(folder)
            settings = config.model_dump(mode="json")
            trackers.append(WeightsAndBiases(config.log.wandb, config.name, folder.root, run_id, settings))
            console.info(f"logging to project {config.log.wandb} on Weights & Biases, run {run_id}")
    return Trackers(trackers, console.warning)


def _open_records(state: TrainState, path: Path) -> RecordWriter:
    return RecordWriter(path if state.world.is_main else None, state.start_step)


def _finish(state: TrainState, events: RecordWriter, context: RunContext) -> None:
    """Compare the run with its forecast, write the report, and print what to do next."""
    if state.world.is_main:
        records = read_records(state.folder.metrics)
        compare_with_forecast(state, [record for record in records if record["step"] > state.start_step])
        seconds = state.clock.seconds()
        facts = {"seconds": _rounded(seconds)}
        predicted = forecast.predicted_times(context.spec, state.memory_plan)
        if predicted is not None and state.start_step == 0:
            facts["predicted_seconds"] = _rounded(predicted)
        run_dir.add_facts(state.folder, facts)
        write_report(state)
        events.append({"step": state.config.train.steps, "event": "done"})
        state.console.info(f"time of this start: {describe_times(seconds)}")
    log_best_step(state)
    _print_results(state.config, state.folder, state.console)


def _rounded(seconds: Mapping[Stage, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in seconds.items()}


def _print_results(config: Config, folder: RunDir, console: Console) -> None:
    console.info(f"done: {folder.lora()}")
    console.info(f"look at {folder.report}, and sample with it:")
    console.info(f"  {command_for(resolve_paths(config), folder.lora().absolute())}")
    if command := copy_command(folder.lora().absolute(), os.environ):
        console.info(f"bring it home:\n  {command}")
    if config.ema.decay is not None:
        console.info(f"averaged weights: {folder.lora(is_ema=True)}")
    if config.model.quantize is not None:
        console.info(f"(it draws in {config.model.dtype}; the previews of this run are of {config.model.quantize})")


def copy_command(path: Path, environment: Mapping[str, str]) -> str | None:
    """Return the command that copies `path` from this RunPod pod to the user's machine, or None if this is no pod.

    With a public address it is an scp command to be typed at home. Otherwise it is `runpodctl send`, to be typed here,
    which prints the command for the other end.
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
    spec = preflight.check_run(config, download, processes=world.world_size)
    explained = devices.explained_out_of_memory("use a card with more memory, or lower data.resolution")
    with stop_on_signals() as stop, console.live_progress(), explained:
        fill_caches(open_context(spec, world, console, stop, StageClock()))
        if config.method.generates_data:
            console.info("the model's own images are drawn by train, before its first step")


def check_for_training(config: Config, world: World) -> RunSpec:
    """Return the specification of the run after all checks of `check`, and download missing parts of the model.

    Without a GPU the published models are not downloaded, since `require_device` refuses them there.

    Raises:
        ZImageTrainError: every problem found.
    """
    would_be_refused = world.device.type == "cpu" and config.model.path is None
    spec = preflight.check_run(config, cached_only if would_be_refused else download, processes=world.world_size)
    shape = spec.model_files.shape if spec.model_files else TransformerShape()
    devices.require_device(world.device, shape, config.model.dtype, config.model.quantize)
    return spec
