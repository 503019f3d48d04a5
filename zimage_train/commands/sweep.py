"""The `sweep` command: one run for each combination of values, one after the other, and all of them side by side."""

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
from zimage_train.errors import DataError, Stopped, WorkerLostError, ZImageTrainError
from zimage_train.report.console import Console
from zimage_train.training import distributed, run_dir
from zimage_train.training.distributed import World
from zimage_train.training.signals import StopRequest, stop_on_signals


def run_sweep(runs: Sequence[SweepRun], fresh: bool, allow: tuple[str, ...] = ()) -> None:
    """Train every one of `runs`, or continue what an earlier start left of them, and compare those that finished.

    Nothing is trained before all of them are checked. One that fails does not keep the others from being trained.

    Raises:
        RunsFailed: some of them failed; the exit code of the first.
        ZImageTrainError: anything else a user can act on.
    """
    run_dir.require_allowable(allow)
    world = distributed.init()
    console = Console(world.is_main)
    by_label = {run.label: run for run in runs}
    with stop_on_signals() as stop:
        run_each(list(by_label), lambda label: check_for_training(by_label[label].config, world).notes)
        failures = _train_all(runs, fresh, allow, world, console, stop)
    if world.is_main:
        _conclude([run for run in runs if run.label not in failures], failures, console)
    if failures:
        raise _failed(failures)


def _train_all(
    runs: Sequence[SweepRun],
    fresh: bool,
    allow: tuple[str, ...],
    world: World,
    console: Console,
    stop: StopRequest,
) -> dict[str, RunsFailed]:
    """Train one after the other; returns what went wrong, by the label of the run."""
    failures: dict[str, RunsFailed] = {}
    for number, run in enumerate(runs, 1):
        if (
            distributed.all_reduce_min(world, float(stop.signal_number is None)) == 0.0
        ):  # whoever of the processes got it
            raise stop.error(f"before run {number} of {len(runs)}")
        console.info(f"run {number} of {len(runs)}: {run.label}")
        try:
            run_training(run.config, fresh, allow, stop)
        except (Stopped, WorkerLostError):
            raise
        except ZImageTrainError as error:
            if world.world_size > 1:  # the others may still wait for this one
                raise
            # The error itself would keep alive, by its traceback, the model that was being trained.
            failures[run.label] = RunsFailed(error.exit_code, error.problems)
            for problem in error.problems:
                console.warning(f"{run.label} failed: {problem}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return failures


def _conclude(finished: list[SweepRun], failures: Mapping[str, RunsFailed], console: Console) -> None:
    """Say what the runs came to, and write grid and page beside them."""
    past = [
        FinishedRun(run.label, run_dir.run_dir_of(run.config), flatten_keys(run.config.model_dump(mode="json")))
        for run in finished
    ]
    console.info("")
    for line in table(
        {run.label: compare.facts(run) for run in past} | {label: {"LoRA": "failed"} for label in failures}
    ):
        console.info(line)
    if not finished:
        return
    folder = Path(finished[0].config.output_dir)
    try:
        found = replace(compare.of_runs(past, RUN), title=folder.name)
        for line in compare.written(folder, found):
            console.info(line)
    except DataError as error:
        for problem in error.problems:
            console.info(f"note: no grid and no page: {problem}")


def table(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Rows of named values as lines of text, under the names."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    cells = [["", *names], *([label, *(values.get(name, "") for name in names)] for label, values in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _failed(failures: Mapping[str, RunsFailed]) -> RunsFailed:
    problems = [problem.of_run(label) for label, error in failures.items() for problem in error.problems]
    return RunsFailed(next(iter(failures.values())).exit_code, problems)
