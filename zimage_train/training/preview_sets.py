"""What previews of a run there are to be: on its own model, and beside it on another one (torch-free)."""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """Previews on one model: what is drawn, and where it goes."""

    second_model: Path | None
    """The transformer that stands in for the run's own; None: none does."""
    requests: list[SamplingRequest]
    folder: Path
    run: str
    """Stands in every image: what it was drawn by, besides its recipe."""
    suffix: str
    """Added to the prompt where images are shown."""
    is_metered: bool
    """Whether it is on Turbo, and the drift from its own steps is measured there."""

    def expected(self, step: int) -> list[tuple[Path, SamplingRequest]]:
        """The images that `step` shall have."""
        return [(preview_images.preview_path(self.folder, step, index), one) for index, one in enumerate(self.requests)]

    def missing(self, step: int) -> list[tuple[Path, SamplingRequest]]:
        """The images of `step` that are not there, or that something else has drawn."""
        return [(path, one) for path, one in self.expected(step) if not preview_images.is_current(path, one, self.run)]

    def table(self) -> PreviewTable:
        return preview_images.preview_table(self.folder, self.suffix)


def make_preview_sets(
    config: Config, folder: RunDir, identity: Mapping[str, Any], also: Path | None
) -> list[PreviewSet]:
    """The run's own view, then that of `sample.compare_on`; none without `sample.every` or prompts."""
    if config.sample.every is None or not config.sample.prompts:
        return []
    digest, name = run_dir.identity_digest(identity), config.sample.compare_on
    if config.sample.weights == "ema":
        digest += " averaged"
    digest += "".join(f" and {one.file}={one.weight:g}" for one in config.sample.extra_loras)
    views = [
        PreviewSet(None, request.preview_requests(config), folder.samples, digest, "", config.model.variant == "turbo")
    ]
    if name is not None:
        on_turbo = name not in VARIANTS or name == "turbo"
        views.append(
            PreviewSet(
                second_model=also,
                requests=request.comparison_requests(config),
                folder=folder.samples / "also",
                run=f"{digest} on {name}",
                suffix=f" (on {name})",
                is_metered=on_turbo and not views[0].is_metered,
            )
        )
    return views


def all_previews_table(views: list[PreviewSet]) -> PreviewTable:
    """All previews of a run as one table, those of another model beside its own."""
    own, *others = [view.table() for view in views]
    return preview_images.side_by_side(own, others[0]) if others else own


def remove_later_previews(preview_sets: list[PreviewSet], step: int) -> None:
    """Remove the images that this run drew after `step`, which it is going to train again."""
    for previews in preview_sets:
        preview_images.remove_later(previews.folder, step, previews.run)
