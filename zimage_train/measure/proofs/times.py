"""Seconds of a step: against the forecast, against diffusers with peft, and against the device's large products."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zimage_train.measure.budgets import BudgetCase
from zimage_train.measure.models import workload_of
from zimage_train.measure.peers import diffusers_and_peft
from zimage_train.measure.proofs.claims import Claim, not_tried
from zimage_train.measure.proofs.step import reference_bytes
from zimage_train.measure.proofs.subject import Subject
from zimage_train.measure.speed import StepTimes, matmul_tflops, plan_without_limits, square, time_steps
from zimage_train.models.arch import TransformerShape
from zimage_train.planning import calibration, devices, flops, forecast, memory
from zimage_train.planning.gpus import TYPICAL_GPU
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import MemoryPlan

STEPS = 13
"""Steps of each size that are timed, so that planning takes them for a run; see `calibration.MIN_STEPS`."""
PAIRS = 5
ROOM = {True: 2.0, False: 1.0}
"""On the miniature or not: factor of the bounds. Its steps take milliseconds, which other work may double."""
CPU_PRODUCT = 1024


@dataclass(frozen=True)
class Timed:
    """Steps of one size by the plan for this device."""

    side: int
    plan: MemoryPlan
    times: StepTimes
    predicted: float
    """Seconds by the data sheet of the card, or of a typical card where this one is not known."""

    @property
    def seconds(self) -> float:
        """Return the median after the steps that calibration leaves out."""
        warm = sorted(self.times.own[calibration.WARM_UP_STEPS :])
        return warm[len(warm) // 2]


def time_claims(subject: Subject) -> Iterator[Claim]:
    """Yield claims on the seconds of a step at each size; they are recorded for later forecasts on this machine."""
    if subject.device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # as a run does
    timed = [time_size(subject, side) for side in subject.sides]
    yield from forecast_claims(subject, timed)
    for side in subject.sides:
        yield from reference_claims(subject, side)
    if subject.device.type == "cuda":
        ceiling = matmul_tflops(subject.device)
    else:
        ceiling = matmul_tflops(subject.device, CPU_PRODUCT, dtype=torch.float32)
    for one in timed:
        share = one.times.tflops / ceiling
        note = f"{one.times.tflops:.3g} of {ceiling:.3g} TFLOP/s"
        promise = f"arithmetic of a step at {one.side} px, as a share of what large matrix products reach"
        yield Claim(promise, share, note=note)


def time_size(subject: Subject, side: int) -> Timed:
    """Time steps at a size by the plan that a run gets here, and record them."""
    case = BudgetCase(subject.shape, subject.dtype, side, None, subject.device_bytes, STEPS)
    plan = case.plan(subject.device)
    times = time_steps(subject.shape, plan, square(side, 1), subject.device, None, STEPS)
    limits = devices.device_limits(subject.device)
    (size,) = plan.workload.sizes
    predicted = plan.step_seconds(size, limits.card or TYPICAL_GPU)
    key = calibration.device_key(limits.key, memory.parameters_of(subject.shape))
    pairs = [(seconds, predicted) for seconds in times.own]
    measured = calibration.measure(key, pairs, times.peaks.get("allocated"), plan.step_memory(size).allocated / 1e9)
    assert measured is not None
    calibration.record_measurement(forecast.calibration_file(subject.config), measured)
    return Timed(side, plan, times, predicted)


def forecast_claims(subject: Subject, timed: list[Timed]) -> Iterator[Claim]:
    """Yield claims on the forecasts: by the card's data sheet, or else by the first size, as runs before would do."""
    card = devices.device_limits(subject.device).card
    factor = 1.0
    if card is None:
        first, *timed = timed
        factor = first.seconds / first.predicted
        note = "not in the list of cards: forecasts of larger steps follow from this one"
        facts = {"side": first.side, "seconds": round(first.seconds, 5)}
        yield Claim(f"a step at {first.side} px", first.seconds, "s", note=note, facts=facts)
    for one in timed:
        predicted = factor * one.predicted
        promise = f"a step at {one.side} px takes no longer than the forecast's interval"
        note = f"{one.seconds:.3g} s, {predicted:.3g} s forecast"
        bound = ROOM[subject.is_miniature] * flops.TIME_INTERVAL[1] if subject.is_forecast else None
        facts = {"side": one.side, "seconds": round(one.seconds, 5), "predicted_seconds": round(predicted, 5)}
        yield Claim(promise, one.seconds / predicted, "times", bound, "forecast", note, facts=facts)


def reference_claims(subject: Subject, side: int) -> Iterator[Claim]:
    """Yield the claim that a step is no slower than that of diffusers and peft, in turns in this process."""
    promise = f"a step at {side} px takes no longer than that of diffusers and peft"
    gpu = subject.device.type == "cuda"

    def both(shape: TransformerShape) -> float:
        workload = workload_of(shape, side, subject.dtype, gpu)
        ours = memory.step_memory(workload, WeightPlacement(), "none", workload.max_tokens).total
        return ours + reference_bytes(subject, shape, subject.dtype, side)

    shape = subject.first_blocks(both, subject.device_bytes)
    if shape is None:
        yield not_tried(promise, "not even one block of both fits the device")
        return
    plan = plan_without_limits(shape, side, subject.dtype, gpu)
    times = time_steps(shape, plan, square(side, 1), subject.device, diffusers_and_peft, PAIRS)
    note = f"random weights in {subject.dtype}{subject.blocks_note(shape)}"
    facts = {"side": side, "to_reference": round(times.ratio, 4)}
    bound = ROOM[subject.is_miniature] if subject.is_forecast else None
    yield Claim(promise, times.ratio, "times", bound, "reference", note, facts=facts)
