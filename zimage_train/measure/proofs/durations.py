"""How long the parts of a proof take, as far as that can be told before."""

from collections.abc import Iterable

from zimage_train.dataset.buckets import Bucket
from zimage_train.measure.proofs import plans, times
from zimage_train.measure.proofs.encoders import NUM_IMAGES, PROMPTS
from zimage_train.measure.proofs.subject import Subject
from zimage_train.models.arch import MAX_PROMPT_TOKENS
from zimage_train.planning import flops
from zimage_train.planning.run_times import ENCODE_FLOPS, KERNEL_SECONDS, PROGRAM_SECONDS, TEXT_ENCODER_PARAMETERS

MINIATURE_SECONDS = {
    "weights": 1,
    "text": 2,
    "latents": 3,
    "step": 2,
    "memory": 10,
    "time": 10,
    "exactness": 50,
    "export": 2,
    "pictures": 40,
    "drift": 30,
}
"""Measured on two cores."""
READ_SECONDS = 15.0
"""Reading transformer and text encoder."""
HOST_FLOPS = 2e11
"""Operations of a usual processor in a second, in fp32."""
PROCESSES = {"exactness": 4, "export": 0, "pictures": 4, "drift": 3, "comfyui": 1, "aitoolkit": 1}
"""Processes of each part that load a model."""


def expected_seconds(subject: Subject, parts: Iterable[str]) -> float:
    """Return the seconds that `parts` take; those of the published models are an estimate."""
    if subject.is_miniature:
        return sum(MINIATURE_SECONDS.get(part, 20) for part in parts)
    start = PROGRAM_SECONDS + READ_SECONDS + KERNEL_SECONDS
    cases = (
        len(plans.budgets_of(subject, subject.side))
        * len(subject.sides)
        * (1 if subject.is_quick else len(plans.KINDS))
    )
    size = Bucket(subject.side, subject.side)
    seconds = {
        "weights": READ_SECONDS,
        "text": 2 * TEXT_ENCODER_PARAMETERS * MAX_PROMPT_TOKENS * len(PROMPTS) / HOST_FLOPS,
        "latents": NUM_IMAGES * ENCODE_FLOPS * subject.side**2 / HOST_FLOPS,
        "step": flops.step_flops(subject.shape, size, "none") / HOST_FLOPS + 3 * start,
        "memory": cases * start,
        "time": len(subject.sides) * (3 * start + 2 * times.STEPS),
    }
    return sum(seconds.get(part, start * PROCESSES.get(part, 0)) for part in parts)


def source(subject: Subject) -> str:
    """Return the words that follow the expected time."""
    return "" if subject.is_miniature else " (an estimate that no card has confirmed)"
