"""The processes of a run: joining them, waiting for each other, and summing their gradients once a step."""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

from zimage_train.errors import ConfigError, Problem, WorkerLostError
from zimage_train.training.launch import launch_problems

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)
"""Longest time that processes wait, as while the main process draws; torch's default of 10 minutes is too short."""


@dataclass(frozen=True)
class World:
    """This process: its device, and its rank among all processes of the run."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init() -> World:
    """Join the processes that `accelerate launch` or torchrun started, if any.

    Raises:
        ConfigError: several processes were started and did not find each other, or the launcher was asked to split
            the model.
    """
    if problems := launch_problems(os.environ):
        raise ConfigError(*problems)
    has_gpu = torch.accelerator.is_available()
    # Without `cpu`, accelerate does not connect processes that have no GPU.
    state = PartialState(cpu=not has_gpu, timeout=TIMEOUT)
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != num_started:
        what = f"{num_started} processes were started, and {state.num_processes} found each other"
        raise ConfigError(Problem("launch", what, "start them with accelerate launch or torchrun", "processes-missing"))
    if not has_gpu:
        # The order in which threads add up depends on the number of cores. Only the miniature is trained on a CPU, and
        # its matrices are too small to gain from threads.
        torch.set_num_threads(1)
    assert state.device is not None
    if state.device.type == "cuda":
        # CUDA graphs cannot be recorded on the default stream, and torch keeps the free memory of each stream apart.
        torch.cuda.set_stream(torch.cuda.Stream(state.device))
    return World(state.device, state.process_index, state.num_processes)


def barrier() -> None:
    """Wait until every process is here.

    Raises:
        WorkerLostError: a process has ended.
    """
    with _reporting_lost_workers():
        PartialState().wait_for_everyone()


def of_main(value: T) -> T:
    """Return the `value` of the main process, in all of them.

    Raises:
        WorkerLostError: a process has ended.
    """
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    with _reporting_lost_workers():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def require_equal(world: World, facts: Mapping[str, str]) -> None:
    """Require that `facts` have the same values in every process; processes may be on machines with other files.

    Raises:
        ConfigError: a process has other values than the main process; all processes raise it.
        WorkerLostError: a process has ended.
    """
    if not torch.distributed.is_initialized():
        return
    gathered: list[Any] = [None] * world.world_size
    with _reporting_lost_workers():
        torch.distributed.all_gather_object(gathered, {"host": socket.gethostname(), **facts})
    problems = []
    for rank, values in enumerate(gathered[1:], 1):
        for name in facts:
            if values[name] != gathered[0][name]:
                what = f"is {values[name]} in process {rank} on {values['host']}, and {gathered[0][name]} in the first"
                todo = (
                    "give every machine the same versions, config, images, model and run folder, as on a shared volume"
                )
                problems.append(Problem(f"launch: {name}", what, todo, "processes-differ"))
    if problems:
        raise ConfigError(*problems)


def all_reduce_gradients(world: World, grads: Tensor, numbers: Tensor) -> Tensor:
    """Sum the buffer of gradients in place over the processes, and return the sums of `numbers`.

    Gradients are summed, not averaged: each process has scaled its losses by its share of all samples.

    Raises:
        WorkerLostError: a process has ended.
    """
    if world.world_size == 1:
        return numbers
    summed = numbers.float()
    for tensor in (grads, summed):
        with _reporting_lost_workers():
            torch.distributed.all_reduce(tensor)
    return summed


def all_reduce_min(world: World, number: float) -> float:
    """Return the smallest `number` of all processes.

    Raises:
        WorkerLostError: a process has ended.
    """
    if not torch.distributed.is_initialized():
        return number
    numbers = torch.tensor([number], dtype=torch.float64, device=world.device)
    with _reporting_lost_workers():
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
    return float(numbers)


@contextlib.contextmanager
def _reporting_lost_workers() -> Iterator[None]:
    """Turn a RuntimeError within the block into a WorkerLostError.

    The block must hold one collective and nothing else, since any RuntimeError is taken to mean that a process ended.

    Raises:
        WorkerLostError: the collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        what = f"another process has ended ({str(error).splitlines()[0][:120]})"
        todo = "its own output says why; the same command continues"
        raise WorkerLostError(Problem("launch", what, todo, "worker-lost")) from error
