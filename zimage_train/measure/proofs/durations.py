"""How long the parts of a proof take, as far as that can be told before."""

from collections.abc import Iterable

from zimage_train.dataset.buckets import Bucket
from zimage_train.measure.proofs import plans
from zimage_train.measure.proofs.step import QUICK_BLOCKS
from zimage_train.measure.proofs.subject import Subject
from zimage_train.planning import flops
from zimage_train.planning.run_times import KERNEL_SECONDS, PROGRAM_SECONDS, TEXT_ENCODER_PARAMETERS

MINIATURE_SECONDS = {
    "weights": 1,
    "text": 2,
    "latents": 3,
    "step": 2,
    "memory": 8,
    "time": 8,
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
PROMPT_TOKENS = 1000
"""Of all prompts together."""
PROCESSES = {"exactness": 4, "export": 0, "pictures": 4, "drift": 3, "comfyui": 1, "aitoolkit": 1}
"""Processes of each part that load a model."""


def expected_seconds(subject: Subject, parts: Iterable[str]) -> float:
    """Return the seconds that `parts` take; those of the published models are an estimate."""
    if subject.is_miniature:
        return sum(MINIATURE_SECONDS.get(part, 20) for part in parts)
    start = PROGRAM_SECONDS + READ_SECONDS
    kinds = 1 if subject.is_quick else len(plans.KINDS)
    cases = len(plans.budgets_of(subject, subject.side)) * len(subject.sides) * kinds
    blocks = QUICK_BLOCKS if subject.is_quick else subject.shape.n_layers
    operations = flops.step_flops(subject.shape, Bucket(subject.side, subject.side), "none")
    seconds = {
        "weights": 2 * READ_SECONDS,
        "text": start + 4 * TEXT_ENCODER_PARAMETERS * PROMPT_TOKENS / HOST_FLOPS,  # in two precisions
        "latents": start,
        "step": 2 * start + KERNEL_SECONDS + operations * blocks / subject.shape.n_layers / HOST_FLOPS,
        "memory": cases * start,
        "time": len(subject.sides) * 2 * start,
    }
    return sum(seconds.get(part, start * PROCESSES.get(part, 0)) for part in parts)


def source(subject: Subject) -> str:
    """Return the words that follow the expected time."""
    return "" if subject.is_miniature else " (an estimate that no card has confirmed)"
