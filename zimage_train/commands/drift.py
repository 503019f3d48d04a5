"""The `drift` command: measure how far a LoRA has drifted from Turbo's eight steps, without reference images."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from zimage_train.commands import compare, sample
from zimage_train.commands.lora_args import WeightedLora
from zimage_train.commands.sample import LoadedModel, SamplingOptions
from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import drift
from zimage_train.diffusion.prompts import PromptSpec
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.io import atomic
from zimage_train.lora import swap
from zimage_train.planning import devices
from zimage_train.planning.verdicts import KEPT_BELOW, LOST_FROM
from zimage_train.report import comparison, preview_images, preview_shift
from zimage_train.report.comparison import IMAGES, MODEL, PROMPT, SAMPLING, Comparison, ComparisonImage, Subject
from zimage_train.report.console import Console

SLOW_STEPS, SLOW_GUIDANCE = 30, 1.0
"""Sampling with many steps and guidance, with which Turbo's own eight steps without guidance are compared."""

TURBO, WITH_LORA = "Turbo", "with the LoRA"
FACTS = "drift.json"

DEFAULT_PROMPTS = (
    "a wooden boat on a calm lake at sunrise, mountains behind it",
    "a bowl of ripe cherries on a kitchen table, soft window light",
    "an old brick house with ivy beside a cobbled street",
    "a snowy owl on a bare branch, forest out of focus",
)
"""Prompts of everyday subjects, which a LoRA is unlikely to have been trained on."""


@dataclass(frozen=True)
class DriftReport:
    """Results of the measurement; its fields are written to drift.json."""

    sigmas: list[float]
    deviations: list[float]
    """Relative distance of the velocity from Turbo's at each of `sigmas`."""
    turbo_fast: float
    """Sharpness (variance of the Laplacian, mean over the prompts) without the LoRA, with Turbo's own steps."""
    turbo_slow: float
    """The same, with many steps and guidance."""
    lora_fast: float
    """Sharpness with the LoRA, with Turbo's own steps."""
    lora_slow: float
    """The same, with many steps and guidance."""

    @property
    def deviation(self) -> float:
        """Root mean square of the deviations at the first steps, which decide."""
        return drift.overall_deviation(self.deviations)

    @property
    def kept(self) -> float:
        """Sharpness with the LoRA divided by that without it, both with Turbo's own steps."""
        return self.lora_fast / self.turbo_fast if self.turbo_fast > 0 else 1.0

    @property
    def gap(self) -> float:
        """Sharpness with Turbo's steps divided by that with many steps, relative to the same ratio without the LoRA.

        A LoRA may rightly make images softer; then this ratio stays at 1.
        """
        if not min(self.turbo_fast, self.turbo_slow, self.lora_slow) > 0:
            return 1.0
        return (self.lora_fast / self.lora_slow) / (self.turbo_fast / self.turbo_slow)

    @property
    def verdict(self) -> str:
        """The result as a sentence."""
        if self.deviation < KEPT_BELOW:
            return "the LoRA keeps Turbo's 8 steps"
        if self.deviation < LOST_FROM:
            return "the LoRA has drifted a little from Turbo's 8 steps: look at the images"
        return "the LoRA has drifted: Turbo's 8 steps are partly lost; docs/methods.md says how to repair it"

    def lines(self) -> list[str]:
        """Return the report as lines to print."""
        pairs = zip(self.sigmas, self.deviations, strict=True)
        by_sigma = "  ".join(f"{sigma:.3f}: {deviation:.3f}" for sigma, deviation in pairs)
        return [
            f"deviation from Turbo's velocity at each of its sigmas: {by_sigma}",
            f"deviation {self.deviation:.3f} (below {KEPT_BELOW:g}: 8 steps kept; from {LOST_FROM:g}: lost)",
            f"sharpness at 8 steps: {self.kept:.0%} of Turbo's; against {SLOW_STEPS} steps: {self.gap:.0%} of Turbo's",
            self.verdict,
        ]


def drift_report(
    model: ModelSettings,
    loras: Sequence[WeightedLora],
    specs: Sequence[PromptSpec],
    options: SamplingOptions,
    output: Path,
) -> list[str]:
    """Measure the drift of `loras` on `model`, write report and images into `output`, and return the lines to print.

    Raises:
        ZImageTrainError: the model or a LoRA cannot be used, or `output` cannot be written to.
    """
    atomic.require_writable_folder(output, "--output")
    requests = sample.requests_for(options, model, specs or [PromptSpec(prompt) for prompt in DEFAULT_PROMPTS])
    # Steps, guidance and negative prompt of a prompt file do not apply: the comparison fixes them.
    turbo = VARIANTS["turbo"]
    fast, slow = [], []
    for request in requests:
        request = replace(request, steps=turbo.steps, guidance=turbo.guidance, shift=turbo.shift, negative="")
        fast.append(request)
        slow.append(replace(request, steps=SLOW_STEPS, guidance=SLOW_GUIDANCE))
    console = Console()
    with devices.explained_out_of_memory("give a smaller --width and --height"), console.live_progress():
        report, images = _measure(model, loras, fast, slow, output, console)
    summary = {"deviation": report.deviation, "kept": report.kept, "gap": report.gap, "verdict": report.verdict}
    atomic.write_json(output / FACTS, asdict(report) | summary)
    name = " and ".join(f"{lora.path.name}={lora.weight:g}" for lora in loras)
    facts = {
        "deviation": f"{report.deviation:.3f}",
        "sharpness kept": f"{report.kept:.0%}",
        "verdict": report.verdict,
    }
    comparison_lines = compare.save_comparison(
        output,
        Comparison(
            title=f"Drift of {name}",
            images=images,
            columns=MODEL,
            rows=[PROMPT, SAMPLING],
            subjects=[Subject(name, facts)],
            remarks=[],
        ),
    )
    return [*report.lines(), *comparison_lines]


def _measure(
    model: ModelSettings,
    loras: Sequence[WeightedLora],
    fast: list[SamplingRequest],
    slow: list[SamplingRequest],
    output: Path,
    console: Console,
) -> tuple[DriftReport, list[ComparisonImage]]:
    paths, shape = sample.locate_model(model)
    stacked = sample.read_loras(loras, shape, console)
    requests = fast + slow
    loaded = sample.load_model(model, paths, shape, stacked, requests, console)
    transformer = loaded.frozen.model
    trajectories = drift.record_trajectories(
        transformer, fast, loaded.embeds, partial(console.progress, "recording Turbo's trajectories")
    )
    source = sample.drawn_by(model, [])
    images = _draw(loaded, requests, TURBO, source, output, console)
    with swap.with_lora(transformer, stacked):
        deviations = drift.deviations(
            transformer, trajectories, loaded.embeds, partial(console.progress, "measuring the LoRA's velocity")
        )
        source = sample.drawn_by(model, list(loras))
        images += _draw(loaded, requests, WITH_LORA, source, output, console)
    # Images are in the order of DriftReport: Turbo fast, Turbo slow, LoRA fast, LoRA slow.
    sharpness = [preview_shift.sharpness(image.path) for image in images]
    means = []
    for start in range(0, len(sharpness), len(fast)):
        means.append(statistics.fmean(sharpness[start : start + len(fast)]))
    return DriftReport(trajectories[0].sigmas[:-1], deviations, *means), images


def _draw(
    loaded: LoadedModel, requests: list[SamplingRequest], label: str, source: str, output: Path, console: Console
) -> list[ComparisonImage]:
    """Draw `requests` with the LoRA that is attached, and write the images; `source` goes into their metadata."""
    rendered = loaded.draw(requests, partial(console.progress, f"drawing {label}"))
    images: list[ComparisonImage] = []
    for number, (image, request) in enumerate(zip(rendered, requests, strict=True)):
        path = output / IMAGES / f"{comparison.slug(label)}-{number:02d}.png"
        preview_images.save_preview(path, image, request, source)
        prompt = request.prompt or comparison.EMPTY
        values = {MODEL: label, SAMPLING: comparison.sampling_label(request), PROMPT: prompt}
        images.append(ComparisonImage(path, request, values))
    return images
