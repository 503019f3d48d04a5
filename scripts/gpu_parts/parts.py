"""The table of parts, as plain data: whoever only reads it need not import torch.

A new part is an entry in `PARTS` and a module with a function `measure(case: str, dry: bool) -> dict[str, Any]`.
"""

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage_train.config.types import Quantization

Measure = Callable[[str, bool], dict[str, Any]]
"""What a case, possibly dry, was found to be; whatever it raises is recorded as the case's error."""
Variables = Mapping[str, str | None]
"""Environment variables to set; None: to take away."""


@dataclass(frozen=True)
class Part:
    """A question, asked case by case in processes of its own."""

    shows: str
    """For `--list`."""
    work: str
    """`module:function` of its `Measure`, imported by the process that measures."""
    cases: tuple[str, ...]
    dry_cases: tuple[str, ...]
    limit_s: float
    """For all its cases together."""
    case_limit_s: float | None = None
    """For each case, where each has a process of its own; None: a shared process for all of them."""
    environment: Mapping[str, Variables] = field(default_factory=dict)
    """By case; only where each has a process of its own."""

    def measure(self) -> Measure:
        """Import what measures."""
        module, _, function = self.work.partition(":")
        return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class Way:
    """How attention may be computed."""

    backend: str | None = None
    """A name of torch's `SDPBackend`; None: what torch picks."""
    fixed: bool = False
    """In one order of sums."""
    heads: tuple[int, ...] | None = None
    """FlashAttention's backward in so many calls, each with so many heads."""
    implementation: str | None = None
    """Of FlashAttention, where it is not torch's own."""


FLASH = "FLASH_ATTENTION"
WAYS = {
    "as torch picks, free": Way(),
    "as torch picks, fixed": Way(fixed=True),
    "flash, free": Way(FLASH),
    "flash, fixed": Way(FLASH, fixed=True),
    "flash, fixed, 8+22 heads": Way(FLASH, fixed=True, heads=(8, 22)),
    "flash, fixed, 12+12+6 heads": Way(FLASH, fixed=True, heads=(12, 12, 6)),
    "flash, fixed, 5x6 heads": Way(FLASH, fixed=True, heads=(6,) * 5),
    "cudnn, free": Way("CUDNN_ATTENTION"),
    "FA3, free": Way(FLASH, implementation="FA3"),
    "FA3, fixed": Way(FLASH, fixed=True, implementation="FA3"),
    "FA4, free": Way(FLASH, implementation="FA4"),
    "FA4, fixed": Way(FLASH, fixed=True, implementation="FA4"),
}


@dataclass(frozen=True)
class Budget:
    """A memory budget, a resolution and a quantisation that a plan is made for."""

    gb: float
    side_px: int
    kind: Quantization | None

    @property
    def name(self) -> str:
        return f"{self.gb:g} GB {self.side_px} px {self.kind or 'bf16'}"

    @staticmethod
    def named(name: str) -> "Budget":
        """Return the budget that `name` is the name of."""
        return next(budget for budget in BUDGETS if budget.name == name)


BUDGETS = tuple(itertools.starmap(Budget, itertools.product((24, 16, 12, 8), (512, 768, 1024), (None, "int8", "nf4"))))
EXPANDABLE = "expandable_segments:True"
ALLOCATORS: dict[str, Variables] = {
    "as is": {"PYTORCH_ALLOC_CONF": None, "PYTORCH_CUDA_ALLOC_CONF": None},
    "expandable": {"PYTORCH_ALLOC_CONF": EXPANDABLE, "PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE},  # torch before 2.9: CUDA
}


def crossed(first: list[str], second: list[str]) -> tuple[str, ...]:
    """Names of every case of two lists, as `split` takes them apart again."""
    return tuple(f"{name}: {other}" for name in first for other in second)


def split(case: str) -> tuple[str, str]:
    """The two names that `crossed` has put together."""
    first, _, second = case.partition(": ")
    return first, second


def pixels(case: str) -> int:
    """The side that "512 px" says."""
    return int(case.removesuffix(" px"))


SIDES = ["512 px", "768 px", "1024 px"]
DRY_SIDE = "64 px"
SHAPES = [
    *((512, 512, tokens) for tokens in (20, 60, 100)),
    *((576, 448, tokens) for tokens in (20, 60, 100)),
    *((448, 576, tokens) for tokens in (20, 60)),
    *((640, 384, tokens) for tokens in (20, 60)),
]
"""Width, height and tokens of the caption: ten shapes of a mixed epoch."""
_BUDGET_CASES = (
    *crossed([budget.name for budget in BUDGETS], ["as is"]),
    *crossed([budget.name for budget in BUDGETS if budget.gb == 16], ["expandable"]),
)
TRIALS = (
    *("1024", "1024_again", "1024_continued", "512", "int8_1024", "fp8_fast_1024", "12gb_768", "8gb_512", "nf4_1024"),
    *("768", "imitation_512", "de_distill_512", "whole_1024"),
)
"""Runs of `train`, the most important first; see product.py."""
COMMANDS = ("sample", "drift", "doctor")

PARTS: dict[str, Part] = {
    "facts": Part(
        shows="versions of torch, CUDA, cuDNN, triton, diffusers, peft, bitsandbytes; the card, its memory, its driver",
        work="gpu_parts.facts:measure",
        cases=("all",),
        dry_cases=("all",),
        limit_s=90,
    ),
    "fused": Part(
        shows="the step with fused blocks and with diffusers' blocks: milliseconds, memory, and how far they are apart",
        work="gpu_parts.fused:measure",
        cases=(*crossed(SIDES, ["none"]), "1024 px: w1w3"),
        dry_cases=crossed([DRY_SIDE], ["w1w3"]),
        limit_s=240,
        case_limit_s=90,
    ),
    "captured": Part(
        shows="the step from Python and replayed as a CUDA graph: milliseconds, the same bits, memory over 300 steps",
        work="gpu_parts.captured:measure",
        cases=(*crossed(SIDES, ["none"]), "1024 px: w1w3", "768 px: streamed", "ten shapes"),
        dry_cases=(f"{DRY_SIDE}: streamed", "ten shapes"),
        limit_s=360,
        case_limit_s=120,
    ),
    "speed": Part(
        shows="whole steps beside those of diffusers with peft: milliseconds, their ratio, memory",
        work="gpu_parts.speed:measure",
        cases=(*crossed(SIDES, ["batch 1"]), "mixed: batch 1", "512 px: batch 4", "512 px: lokr", "1024 px: lokr"),
        dry_cases=crossed([DRY_SIDE], ["batch 1", "lokr"]),
        limit_s=300,
        case_limit_s=100,
    ),
    "attention": Part(
        shows="attention of a block, each way: milliseconds of all 34 blocks, and whether its bits repeat",
        work="gpu_parts.attention:measure",
        cases=crossed(SIDES, list(WAYS)),
        dry_cases=crossed([DRY_SIDE], list(WAYS)),
        limit_s=180,
    ),
    "budgets": Part(
        shows="the plans for 24, 16, 12 and 8 GB, held to their budgets: which run, and what they take",
        work="gpu_parts.budgets:measure",
        cases=_BUDGET_CASES,
        dry_cases=("16 GB 1024 px int8: expandable",),
        limit_s=470,
        case_limit_s=60,
        environment={case: ALLOCATORS[split(case)[1]] for case in _BUDGET_CASES},
    ),
    "product": Part(
        shows="the commands on a model of full size: bytes after resuming, quantised and streamed runs, stages in s",
        work="gpu_parts.product:measure",
        cases=TRIALS + COMMANDS,
        dry_cases=("1024_again", "1024_continued", "sample"),
        limit_s=470,
        case_limit_s=240,
    ),
    "proof": Part(
        shows="`prove --quick` on a model of full size with random weights: each claim, measured and bounded",
        work="gpu_parts.proof:measure",
        cases=("quick",),
        dry_cases=(),
        limit_s=470,
        case_limit_s=460,
    ),
    "miniature": Part(
        shows="the miniature's family made on this device with little effort: seconds of each stage",
        work="gpu_parts.family:measure",
        cases=("effort 0.02",),
        dry_cases=(),
        limit_s=300,
        case_limit_s=300,
    ),
}
