"""The `sweep` command: train a run for each combination of values, and compare the runs."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from zimage_train.commands import compare
from zimage_train.commands.compare import RUN, FinishedRun
from zimage_train.commands.sweep_values import RunsFailed, SweepRun, run_each
from zimage_train.commands.train import check_for_training, run_training
from zimage_train.config.load import flatten_keys
from zimage_train.errors import DataError, Problem, Stopped, WorkerLostError, ZImageTrainError
from zimage_train.report.console import Console
from zimage_train.training import distributed, run_dir
from zimage_train.training.distributed import World
from zimage_train.training.signals import StopRequest, stop_on_signals


def run_sweep(runs: Sequence[SweepRun], fresh: bool, allow: tuple[str, ...] = ()) -> None:
    """Train `runs` one after the other, or continue those that were begun before, and compare the finished runs.

    All runs are checked before the first is trained. If one fails, the others are trained all the same.

    Raises:
        RunsFailed: lists the problems of all runs that failed. The exit code is the lowest if the checks failed, and
            that of the first failed run if training did.
        ZImageTrainError: any other error that a user can act on.
    """
    run_dir.require_allowable(allow)
    world = distributed.init()
    console = Console(world.is_main)
    run_by_label = {run.label: run for run in runs}
    with stop_on_signals() as stop:
        run_each(list(run_by_label), lambda label: check_for_training(run_by_label[label].config, world).notes)
        failures = _train_all(runs, fresh, allow, world, console, stop)
    if world.is_main:
        finished = [run for run in runs if run.label not in failures]
        _report(finished, list(failures), console)
    if failures:
        raise _combine(failures)


def _train_all(
    runs: Sequence[SweepRun],
    fresh: bool,
    allow: tuple[str, ...],
    world: World,
    console: Console,
    stop: StopRequest,
) -> dict[str, RunsFailed]:
    """Train the runs one after the other, and return the errors of those that failed, by label."""
    failures: dict[str, RunsFailed] = {}
    for number, run in enumerate(runs, 1):
        # The signal may have reached only some of the processes, and all have to stop before the same run.
        is_running = distributed.all_reduce_min(world, float(stop.signal_number is None))
        if is_running == 0.0:
            raise stop.error(f"before run {number} of {len(runs)}")
        console.info(f"run {number} of {len(runs)}: {run.label}")
        try:
            run_training(run.config, fresh, allow, stop)
        except (Stopped, WorkerLostError):
            raise
        except ZImageTrainError as error:
            if world.world_size > 1:  # the other processes may still wait for this process
                raise
            # A copy without the traceback of `error`, which would keep the model of this run in memory.
            failures[run.label] = RunsFailed(error.exit_code, error.problems)
            for problem in error.problems:
                console.warning(f"{run.label} failed: {problem}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return failures


def _report(finished: Sequence[SweepRun], failed_labels: Sequence[str], console: Console) -> None:
    """Print a table of all runs, and write grid and page for the finished runs."""
    finished_runs: list[FinishedRun] = []
    for run in finished:
        settings = flatten_keys(run.config.model_dump(mode="json"))
        finished_runs.append(FinishedRun(run.label, run_dir.run_dir_of(run.config), settings))
    rows = {run.label: compare.run_facts(run) for run in finished_runs}
    for label in failed_labels:
        rows[label] = {"LoRA": "failed"}
    console.info("")
    for line in format_table(rows):
        console.info(line)
    if not finished:
        return
    folder = Path(finished[0].config.output_dir)
    try:
        comparison = replace(compare.make_comparison(finished_runs, RUN), title=folder.name)
        lines = compare.save_comparison(folder, comparison)
    except DataError as error:
        lines = [f"note: no grid and no page: {problem}" for problem in error.problems]
    for line in lines:
        console.info(line)


def format_table(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a table as lines of text: a header with the names of the values, and a line for each labelled row."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    table = [["", *names]]
    for label, values in rows.items():
        table.append([label, *(values.get(name, "") for name in names)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _combine(failures: Mapping[str, RunsFailed]) -> RunsFailed:
    """Return an error with the problems of all failed runs, each with the label of its run."""
    problems: list[Problem] = []
    for label, error in failures.items():
        problems += [problem.of_run(label) for problem in error.problems]
    first = next(iter(failures.values()))
    return RunsFailed(first.exit_code, problems)
