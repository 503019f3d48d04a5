"""The product's step, forward and backward, as it is and captured as a CUDA graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_train.optim.flat import FlatParameters
from zimage_train.planning import devices
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import NO_LIMIT, MemoryPlan

import bench
from gpu_parts import measuring
from gpu_parts.parts import pixels
from gpu_parts.records import failure

WARM_UP = 3
"""Steps before the capture: tables made on first use, workspaces of libraries."""


@dataclass(frozen=True)
class Step:
    """A step whose inputs stay where they are, as a graph needs them."""

    frozen: bench.FrozenTransformer
    inputs: bench.Inputs
    flat: FlatParameters

    def run(self) -> Tensor:
        """New gradients, and the loss."""
        self.flat.zero_grad()
        loss = bench.loss_on(self.frozen, self.inputs)
        loss.backward()
        return loss

    def take(self, inputs: bench.Inputs) -> None:
        """Copy other values into the inputs."""
        for own, other in zip(self.inputs, inputs, strict=True):
            own.copy_(other)

    def gradients(self) -> Tensor:
        """A copy of those that are there now, in main memory: on the GPU it would count as the step's."""
        return self.flat.grads.cpu().clone()


def measure(case: str, dry: bool) -> dict[str, Any]:
    """Milliseconds, memory and equality of bits of both at a size."""
    device = measuring.device_of(dry)
    step, others = made(pixels(case), dry)
    with devices.reproducible(device):
        measuring.forget_peaks()
        expected = [answer(step, step.run, inputs) for inputs in others]
        again = [answer(step, step.run, inputs) for inputs in others]
        eager = measuring.milliseconds(step.run, device) | measuring.peaks()
        found: dict[str, Any] = {"eager": eager | {"same_bits": equal(again, expected)}}
        try:
            replay, capture = captured(step, device)
            replayed = [answer(step, replay, inputs, poisoned=True) for inputs in others]
            graph = measuring.milliseconds(replay, device) | measuring.peaks()
        except Exception as error:  # the step as it is has been measured all the same
            return found | failure(error)
    found["graph"] = graph | capture | {"same_bits": equal(replayed, expected)}
    return found | {"gradients_off": max(map(measuring.distance, replayed, expected))}


def made(side: int, dry: bool) -> tuple[Step, list[bench.Inputs]]:
    """A step of the model that nothing is recomputed of, and two sets of inputs for it."""
    device, shape = measuring.device_of(dry), measuring.shape_of(dry)
    workload = bench.workload_of(shape, side, "bf16", gpu=not dry)
    plan = MemoryPlan(workload, WeightPlacement(), {"none": NO_LIMIT}, bench.PLENTY, True, "to be captured")
    frozen, attached = bench.random_pair(shape, plan, device)
    draw = torch.Generator(device).manual_seed(3)
    with torch.no_grad():
        attached.flat.whole.normal_(0, 0.01, generator=draw)  # a new LoRA's B is 0, and so the gradient of its A
    own, *others = (bench.inputs_of(frozen, workload.caption_tokens, side, seed) for seed in (2, 2, 5))
    return Step(frozen, own, attached.flat), others


def answer(step: Step, run: Callable[[], object], inputs: bench.Inputs, poisoned: bool = False) -> Tensor:
    """The gradients that `run` makes of `inputs`; poisoned: what it does not write is not a number."""
    step.take(inputs)
    if poisoned:
        step.flat.grads.fill_(torch.nan)
    run()
    return step.gradients()


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit, for each set of inputs."""
    return all(map(torch.equal, found, expected))


def captured(step: Step, device: torch.device) -> tuple[Callable[[], object], dict[str, float]]:
    """What repeats the step without Python, and the seconds it took to make; on a CPU the step itself."""
    if device.type == "cpu":
        return step.run, {"warm_up_s": 0.0, "capture_s": 0.0}
    began = bench.now(device)
    torch.cuda.empty_cache()
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            step.run()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.empty_cache()
    measuring.forget_peaks()
    warm = bench.now(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step.run()
    done = bench.now(device)
    return graph.replay, {"warm_up_s": round(warm - began, 2), "capture_s": round(done - warm, 2)}
