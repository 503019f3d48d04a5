"""The previews of a run: on its own model, and optionally on a second model (torch-free)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import request
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.report import preview_images
from zimage_train.report.preview_images import PreviewTable
from zimage_train.training import run_dir
from zimage_train.training.run_dir import RunDir


@dataclass(frozen=True)
class PreviewSet:
    """The previews of a run that are drawn on a model."""

    second_model: Path | None
    """The transformer that replaces the run's own while these are drawn, or None for its own."""
    requests: list[SamplingRequest]
    folder: Path
    run: str
    """Written into every image: which run and which model drew it."""
    suffix: str
    """Appended to the prompt wherever the images are shown."""
    measures_drift: bool
    """Whether the drift from Turbo's own steps is measured on this set; of two sets on Turbo, only on the first."""
    lora_weight: float = 1.0
    """The weight of the run's LoRA."""

    def expected(self, step: int) -> list[tuple[Path, SamplingRequest]]:
        """Return the path and request of every preview of `step`."""
        paths = [preview_images.preview_path(self.folder, step, index) for index in range(len(self.requests))]
        return list(zip(paths, self.requests, strict=True))

    def missing(self, step: int) -> list[tuple[Path, SamplingRequest]]:
        """Return those of `expected` that do not exist or were drawn by another run or request."""
        return [
            (path, request)
            for path, request in self.expected(step)
            if not preview_images.is_current(path, request, self.run)
        ]

    def table(self) -> PreviewTable:
        return preview_images.preview_table(self.folder, self.suffix)


def make_preview_sets(
    config: Config, folder: RunDir, identity: Mapping[str, Any], second_model: Path | None
) -> list[PreviewSet]:
    """Return the previews on the run's own model, those on `sample.compare_on`, and those at other weights of the LoRA.

    None if previews are off.
    """
    if config.sample.every is None or not config.sample.prompts:
        return []
    digest, name = run_dir.identity_digest(identity), config.sample.compare_on
    if config.sample.weights == "ema":
        digest += " averaged"
    if config.sample.extra_loras:
        # As a digest, since it stands in every image, and a path would say whose machine it was.
        extra = "".join(f" and {lora.file}={lora.weight:g}" for lora in config.sample.extra_loras)
        digest += f" and {_digest(extra)}"
    weights = config.preview_weights
    own = PreviewSet(
        second_model=None,
        requests=request.preview_requests(config),
        folder=folder.samples,
        run=digest,
        suffix=_weight_suffix(1.0) if len(weights) > 1 else "",
        measures_drift=config.model.variant == "turbo",
    )
    others: list[PreviewSet] = []
    for weight in weights:
        if weight != 1.0:
            others.append(
                replace(
                    own,
                    folder=folder.samples / f"weight_{weight:g}",
                    suffix=_weight_suffix(weight),
                    measures_drift=False,
                    lora_weight=weight,
                )
            )
    if name is None:
        return [own, *others]
    # A path names no variant; such a model is sampled as Turbo, see `request.comparison_requests`.
    is_turbo = name not in VARIANTS or name == "turbo"
    second = PreviewSet(
        second_model=second_model,
        requests=request.comparison_requests(config),
        folder=folder.samples / "also",
        run=f"{digest} on {name if name in VARIANTS else _digest(name)}",
        suffix=f" (on {name})",
        measures_drift=is_turbo and not own.measures_drift,
    )
    return [own, second, *others]


def _weight_suffix(weight: float) -> str:
    return f" (weight {weight:g})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_previews_table(preview_sets: list[PreviewSet]) -> PreviewTable:
    """Return all previews of a run as a table: each prompt by weight of the LoRA, and then on a second model."""
    by_weight = sorted(preview_sets, key=lambda previews: (previews.second_model is not None, previews.lora_weight))
    return preview_images.side_by_side([previews.table() for previews in by_weight])


def remove_later_previews(preview_sets: list[PreviewSet], step: int) -> None:
    """Remove the images that this run drew after `step`, which it is going to train again."""
    for previews in preview_sets:
        preview_images.remove_later(previews.folder, step, previews.run)
