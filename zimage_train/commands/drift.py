"""The `drift` command: whether a LoRA leaves Turbo its eight steps, told without ground truth."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from zimage_train.commands import compare, lora_args, sample
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.commands.sample import BatchLimit, LoadedModel, SamplingOptions
from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import drift
from zimage_train.diffusion.prompts import PromptSpec
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io import atomic
from zimage_train.lora import arithmetic, swap
from zimage_train.planning import devices
from zimage_train.report import comparison, preview_images, preview_shift
from zimage_train.report.comparison import IMAGES, MODEL, PROMPT, SAMPLING, Comparison, ComparisonImage, Subject
from zimage_train.report.console import Console

SLOW_STEPS, SLOW_GUIDANCE = 30, 1.0
"""What eight steps without guidance are held against: the same model with time to spare."""

KEPT, LOST = 0.38, 0.45
"""Deviations below and above which the eight steps count as kept and as lost; from the miniature (docs/lab.md)."""

TURBO = "Turbo"
FACTS = "drift.json"

NEUTRAL = (
    "a wooden boat on a calm lake at sunrise, mountains behind it",
    "a bowl of ripe cherries on a kitchen table, soft window light",
    "an old brick house with ivy beside a cobbled street",
    "a snowy owl on a bare branch, forest out of focus",
)
"""What is drawn unless something else is asked for: nothing that anyone trains a LoRA for."""


@dataclass(frozen=True)
class DriftReport:
    """What was found; sharpness is the variance of the Laplacian, as a mean over the prompts."""

    sigmas: list[float]
    deviations: list[float]
    """Of the velocity from Turbo's at each of `sigmas`, as a share of Turbo's."""
    turbo_fast: float
    turbo_slow: float
    lora_fast: float
    lora_slow: float
    """Sharpness at Turbo's own steps, and at many with guidance."""

    @property
    def deviation(self) -> float:
        """That of the steps which decide, as one number."""
        return drift.overall_deviation(self.deviations)

    @property
    def kept(self) -> float:
        """The share of Turbo's sharpness at its own steps that is left."""
        return self.lora_fast / self.turbo_fast if self.turbo_fast > 0 else 1.0

    @property
    def gap(self) -> float:
        """Sharpness at Turbo's steps as a share of that at many steps, against the same of Turbo alone."""
        if not min(self.turbo_fast, self.turbo_slow, self.lora_slow) > 0:
            return 1.0
        return (self.lora_fast / self.lora_slow) / (self.turbo_fast / self.turbo_slow)

    @property
    def verdict(self) -> str:
        """What it comes to."""
        if self.deviation < KEPT:
            return "the LoRA leaves Turbo its 8 steps"
        if self.deviation < LOST:
            return "the LoRA takes something from Turbo's 8 steps: look at the images"
        return "the LoRA has drifted: Turbo's 8 steps are lost in part; docs/methods.md says how to win them back"

    def lines(self) -> list[str]:
        """What is told."""
        each = "  ".join(f"{sigma:.3f}: {one:.3f}" for sigma, one in zip(self.sigmas, self.deviations, strict=True))
        return [
            f"velocity against Turbo's, at each of its sigmas: {each}",
            f"deviation {self.deviation:.3f} (below {KEPT:g} the 8 steps are kept, from {LOST:g} on they are lost)",
            f"sharpness at 8 steps: {self.kept:.0%} of Turbo's; against {SLOW_STEPS} steps: {self.gap:.0%} of Turbo's",
            self.verdict,
        ]


def drift_report(
    model: ModelSettings,
    loras: Sequence[WeightedLora],
    wishes: Sequence[PromptSpec],
    asked: SamplingOptions,
    output: Path,
) -> list[str]:
    """Measure what `loras` take from `model`, draw it in both ways into the folder `output`; returns what to tell.

    Raises:
        ZImageTrainError: the model or a LoRA cannot be used, in whole, or `output` cannot be written to.
    """
    atomic.require_writable_folder(output)
    recipes = sample.requests_for(asked, model, wishes or [PromptSpec(prompt) for prompt in NEUTRAL])
    turbo = VARIANTS["turbo"]  # what a line of --prompts says of how it is drawn is for other images than these
    fast = [
        replace(recipe, steps=turbo.steps, guidance=turbo.guidance, shift=turbo.shift, negative="")
        for recipe in recipes
    ]
    slow = [replace(recipe, steps=SLOW_STEPS, guidance=SLOW_GUIDANCE) for recipe in fast]
    console = Console()
    with devices.explained_out_of_memory("give a smaller --width and --height"), console.live_progress():
        found, shots = _measured(model, loras, fast, slow, output, console)
    facts = asdict(found) | {"deviation": found.deviation, "kept": found.kept, "gap": found.gap}
    atomic.write_json(output / FACTS, facts | {"verdict": found.verdict})
    name = " and ".join(f"{one.path.name}={one.weight:g}" for one in loras)
    said = {"deviation": f"{found.deviation:.3f}", "sharpness kept": f"{found.kept:.0%}", "verdict": found.verdict}
    shown = Comparison(
        title=f"Drift of {name}",
        images=shots,
        columns=MODEL,
        rows=[PROMPT, SAMPLING],
        subjects=[Subject(name, said)],
        remarks=[],
    )
    return [*found.lines(), *compare.written(output, shown)]


def _measured(
    model: ModelSettings,
    loras: Sequence[WeightedLora],
    fast: list[SamplingRequest],
    slow: list[SamplingRequest],
    output: Path,
    out: Console,
) -> tuple[DriftReport, list[ComparisonImage]]:
    located, shape = sample.locate_model(model)
    read = [(lora_args.read_weighted_lora(one.path, shape), one.weight) for one in loras]
    for one, (lora, _) in zip(loras, read, strict=True):
        out.info(lora_args.match_message(one, lora))
    stacked = arithmetic.stack_loras(read)
    loaded = sample.load_model(model, located, shape, stacked, [*fast, *slow], out, BatchLimit())
    bare = loaded.frozen.model
    walked = drift.record_trajectories(
        bare, fast, loaded.embeds, lambda done, total: out.progress("Turbo's own way", done, total)
    )
    shots = _drawn(loaded, fast + slow, TURBO, sample.drawn_by(model, []), output, out)
    with swap.with_lora(bare, stacked):
        found = drift.deviations(
            bare, walked, loaded.embeds, lambda done, total: out.progress("the LoRA beside it", done, total)
        )
        shots += _drawn(loaded, fast + slow, "with the LoRA", sample.drawn_by(model, list(loras)), output, out)
    sharp = [preview_shift.sharpness(shot.path) for shot in shots]
    each = [statistics.fmean(sharp[at : at + len(fast)]) for at in range(0, len(sharp), len(fast))]
    return DriftReport(walked[0].sigmas[:-1], found, *each), shots


def _drawn(
    loaded: LoadedModel, recipes: list[SamplingRequest], who: str, drawn_by: str, output: Path, out: Console
) -> list[ComparisonImage]:
    images = loaded.draw(recipes, lambda done, total: out.progress(f"drawing {who}", done, total))
    shots: list[ComparisonImage] = []
    for number, (image, recipe) in enumerate(zip(images, recipes, strict=True)):
        path = output / IMAGES / f"{comparison.slug(who)}-{number:02d}.png"
        preview_images.save_preview(path, image, recipe, drawn_by)
        values = {MODEL: who, SAMPLING: comparison.sampling_label(recipe), PROMPT: recipe.prompt or comparison.EMPTY}
        shots.append(ComparisonImage(path, recipe, values))
    return shots
