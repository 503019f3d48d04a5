"""Prediction of the time of a whole run, by its stages: what comes before step 1, steps, previews, saves (torch-free).

Rates of files, images and convolutions are estimates that no run has confirmed; every run logs its own times beside the
prediction. Steps and forward passes are those of flops.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io.dtypes import bytes_per_number
from zimage_train.planning import flops, memory, preflight
from zimage_train.planning.gpus import GpuSpec
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import RunSpec
from zimage_train.planning.workload import Workload

VALIDATION_PASSES = 17
"""Forward passes for each validation image: at nine deciles of the trained noise levels and at Turbo's 8 steps."""
DRIFT_PASSES = 3
"""Forward passes to measure drift, for each of up to two prompts: at the steps that decide (`diffusion.drift`)."""
READ_BYTES_PER_SECOND = 2e9
"""Rate of reading weights from a file that was read before, and may still be in the page cache."""
WRITE_BYTES_PER_SECOND = 0.5e9
"""Rate of writing a checkpoint until it is on the disk."""
COPY_SHARE = 0.5
"""Fraction of PCIe's bandwidth that an exchange of weights reaches, tensor by tensor."""
PUBLISHED_PARAMETERS, TEXT_ENCODER_PARAMETERS = 6.15e9, 4.02e9
"""Parameters of the published transformer and text encoder; those of a smaller family are taken in proportion."""
ENCODE_FLOPS, DECODE_FLOPS = 4.7e6, 1.0e7
"""Operations of the published VAE per pixel, counted on the real classes (tests/planning/test_run_times.py)."""
CONVOLUTION_SHARE = 0.4
"""Fraction of a data sheet's arithmetic that the VAE reaches."""
IMAGE_SECONDS = 0.05
"""Time of reading, decoding and resizing an image on the CPU."""
PROGRAM_SECONDS = 15.0
"""Time of importing, checking and digesting what has been digested before."""
KERNEL_SECONDS = 15.0
"""Time of compiling the kernels of fused blocks, and of the first calls of libraries."""


Stage = Literal[
    "checks", "encoding", "loading", "generating", "rehearsal", "steps", "previews", "drift", "validation", "saves"
]
"""What a run spends its time on: the first five before step 1."""
STAGES: tuple[Stage, ...] = get_args(Stage)
BEFORE_STEPS, AFTER_START = STAGES[: STAGES.index("steps")], STAGES[STAGES.index("steps") :]


@dataclass(frozen=True)
class RunTimes:
    """The predicted seconds of each stage of a run."""

    seconds: Mapping[Stage, float]
    warm_start: float
    """Seconds before step 1 where everything is encoded, generated and compiled already."""

    @property
    def total(self) -> float:
        return math.fsum(self.seconds.values())


def predict_times(spec: RunSpec, plan: MemoryPlan, card: GpuSpec, factor: float = 1.0) -> RunTimes:
    """Return the times of `spec` with `plan` on `card`, from its first start to its end.

    Passes of the transformer take `factor` times as long as predicted; see calibration.py.
    """
    workload = plan.workload
    step_seconds = {size: factor * plan.step_seconds(size, card) for size in workload.sizes}
    step = math.fsum(share * step_seconds[size] for size, share in workload.shares().items())
    # Of each mode, a step from Python, another while it is recorded, and its replay.
    modes = {plan.mode_of(workload.tokens(size)) for size in workload.sizes}
    tried = 3 * len(modes) * max(step_seconds.values(), default=0.0)
    loading = _full_bytes(workload) / READ_BYTES_PER_SECOND
    seconds: dict[Stage, float] = {
        "checks": PROGRAM_SECONDS,
        "encoding": _encoding_seconds(spec, card),
        "loading": loading,
        "generating": factor * math.fsum(_drawing_seconds(plan, request, card) for request in workload.generated),
        "rehearsal": tried + KERNEL_SECONDS * workload.gpu,
        "steps": spec.config.train.steps * spec.config.train.grad_accumulation * step,
        "previews": _previews_seconds(spec, plan, card, factor),
        "drift": factor * _drift_seconds(spec, plan, card),
        "validation": factor * _validation_seconds(spec, plan, card),
        "saves": _saves_seconds(spec.config, workload),
    }
    return RunTimes(seconds, PROGRAM_SECONDS + loading + tried)


def describe_times(seconds: Mapping[Stage, float]) -> str:
    """Return the shares of all stages that take time, those before step 1 together."""
    total = max(math.fsum(seconds.values()), 1e-9)
    before = math.fsum(seconds[stage] for stage in BEFORE_STEPS)
    parts = [f"start {before / total:.0%} ({before:.0f} s)"]
    for stage in AFTER_START:
        if seconds[stage] > 0:
            parts.append(f"{stage} {seconds[stage] / total:.0%}")
    return ", ".join(parts)


def times_of_previews(config: Config) -> int:
    """Return how often previews are drawn in a run."""
    every, steps = config.sample.every, config.train.steps
    return 0 if every is None else -(-steps // every) + config.sample.first


def _encoding_seconds(spec: RunSpec, card: GpuSpec) -> float:
    """Return the seconds of encoding all images and captions."""
    items = [*spec.items, *spec.held_out]
    pixels = sum(item.size.width * item.size.height for item in items)
    captions = {item.image.prompts[0] for item in items if item.image.prompts}
    operations = ENCODE_FLOPS * pixels / CONVOLUTION_SHARE
    shape = preflight.workload_of(spec).shape
    parameters = TEXT_ENCODER_PARAMETERS * memory.parameters_of(shape) / PUBLISHED_PARAMETERS
    operations += 2 * parameters * flops.CAPTION_TOKENS * len(captions) / flops.PRODUCT_SHARE
    # The text encoder is read once, layer by layer, for all captions.
    reading = 2 * parameters / READ_BYTES_PER_SECOND
    return operations / (card.tflops * 1e12) + IMAGE_SECONDS * len(items) + reading


def _drawing_seconds(plan: MemoryPlan, request: SamplingRequest, card: GpuSpec) -> float:
    """Return the seconds of sampling an image and decoding it."""
    decoding = DECODE_FLOPS * request.width * request.height / (CONVOLUTION_SHARE * card.tflops * 1e12)
    return flops.preview_seconds(plan.workload, plan.placement, request, card) + decoding


def _previews_seconds(spec: RunSpec, plan: MemoryPlan, card: GpuSpec, factor: float) -> float:
    times, requests = times_of_previews(spec.config), plan.workload.previews
    if not times or not requests:
        return 0.0
    drawing = factor * math.fsum(_drawing_seconds(plan, request, card) for request in requests)
    # Previews are drawn without the LoRAs that are merged for the training, on weights that take the place of those in
    # training; a second model takes their place again.
    is_merged = spec.config.model.adapter is not None or bool(spec.config.train.beside)
    changes = int(is_merged) + int(spec.config.sample.compare_on is not None)
    reading = _full_bytes(plan.workload) / READ_BYTES_PER_SECOND
    if not plan.keeps_original_weights:
        return times * (drawing + changes * 2 * reading)
    exchanged = memory.model_bytes(plan.workload, plan.placement.quantization)
    exchange = 2 * exchanged / (COPY_SHARE * card.pcie_gb_per_second * 1e9)
    return times * (drawing + changes * 2 * exchange) + changes * reading


def _drift_seconds(spec: RunSpec, plan: MemoryPlan, card: GpuSpec) -> float:
    times, requests = times_of_previews(spec.config), plan.workload.previews
    if not times or not requests or spec.config.model.variant != "turbo":
        return 0.0
    size = Bucket(requests[0].width, requests[0].height)
    forward = flops.forward_seconds(plan.workload, plan.placement, size, 1, card)
    # The untrained LoRA is not measured; Turbo itself is, once.
    measured = times - spec.config.sample.first + 1
    return measured * DRIFT_PASSES * min(len(requests), 2) * forward


def _validation_seconds(spec: RunSpec, plan: MemoryPlan, card: GpuSpec) -> float:
    every = spec.config.validation.every
    if not every:
        return 0.0
    times = -(-spec.config.train.steps // every) + 1  # one more before the first step
    one = math.fsum(flops.forward_seconds(plan.workload, plan.placement, item.size, 1, card) for item in spec.held_out)
    return times * VALIDATION_PASSES * one


def _saves_seconds(config: Config, workload: Workload) -> float:
    """Return the seconds in which checkpoints and LoRAs are written while training waits."""
    times = 1 if config.save.every is None else -(-config.train.steps // config.save.every)
    checkpoint = workload.trained * (4 + OPTIMIZERS[workload.optimizer].state_bytes + 4 * workload.ema)
    checkpoint += workload.trained * workload.pissa * bytes_per_number(workload.dtype)
    exported = workload.trained * (1 + workload.pissa) * bytes_per_number(config.save.dtype) * (1 + workload.ema)
    return times * (checkpoint + exported) / WRITE_BYTES_PER_SECOND


def _full_bytes(workload: Workload) -> int:
    """Return the bytes of the transformer's files."""
    return memory.model_bytes(replace(workload, dtype="bf16"), None)
