"""The processes of a run: which one this is, on which device, and their gradients added up once a step."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import Parameter

from zimage_train.errors import ConfigError, Problem, WorkerLostError

TIMEOUT = timedelta(hours=12)
"""How long processes wait while the main one fills a cache or draws: 10 minutes, the default, are too few."""


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init() -> World:
    """Join the processes that `accelerate launch` or torchrun started; alone without them.

    On a CPU, one thread a process: only the miniature runs there, whose matrices are too small to share out, and the
    sums then do not depend on how many cores a machine has.

    Raises:
        ConfigError: several processes were started and this one stands alone.
    """
    has_gpu = torch.accelerator.is_available()
    # Without `cpu`, accelerate leaves CPU processes strangers to each other.
    state = PartialState(cpu=not has_gpu, timeout=TIMEOUT)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != asked:
        what = f"{asked} processes were started, and {state.num_processes} found each other"
        raise ConfigError(Problem("launch", what, "start them with accelerate launch or torchrun"))
    if not has_gpu:
        torch.set_num_threads(1)
    assert state.device is not None
    return World(state.device, state.process_index, state.num_processes)


def barrier() -> None:
    """Wait until every process has come here.

    Raises:
        LostError: one of them never will.
    """
    with _together():
        PartialState().wait_for_everyone()


def all_reduce_gradients(world: World, parameters: list[Parameter], numbers: Tensor) -> Tensor:
    """Sum every gradient and `numbers` over the processes, in one flat reduction; returns the summed numbers.

    Raises:
        LostError: a process has ended.
    """
    if world.world_size == 1:
        return numbers
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), numbers.float()])
    with _together():
        torch.distributed.all_reduce(flat)
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()
    return flat[offset:]


def all_reduce_min(world: World, number: float) -> float:
    """The least of what the processes have.

    Raises:
        LostError: a process has ended.
    """
    if not torch.distributed.is_initialized():
        return number
    numbers = torch.tensor([number], dtype=torch.float64, device=world.device)
    with _together():
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
    return float(numbers)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Nothing but a collective stands within, so what fails there is the connection to another process."""
    try:
        yield
    except RuntimeError as error:
        what = f"another process has ended ({str(error).splitlines()[0][:120]})"
        raise WorkerLostError(Problem("launch", what, "its own output says why; the same command continues")) from error
