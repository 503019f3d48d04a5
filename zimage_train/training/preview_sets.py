"""What previews of a run there are to be: on its own model, and beside it on another one (torch-free)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion import request as recipe
from zimage_train.diffusion.request import Recipe
from zimage_train.report import preview_images as pictures
from zimage_train.report.preview_images import Table
from zimage_train.training import run_dir as run_folder
from zimage_train.training.run_dir import RunFolder


@dataclass(frozen=True)
class View:
    """Previews on one model: what is drawn, and where it goes."""

    also: Path | None
    """The transformer that stands in for the run's own; None: none does."""
    recipes: list[Recipe]
    folder: Path
    run: str
    """Stands in every picture: what it was drawn by, besides its recipe."""
    suffix: str
    """Added to the prompt where pictures are shown."""
    is_metered: bool
    """Whether it is on Turbo, and the drift from its own steps is measured there."""

    def wanted(self, step: int) -> list[tuple[Path, Recipe]]:
        """The pictures that `step` shall have."""
        return [(pictures.path_of(self.folder, step, index), one) for index, one in enumerate(self.recipes)]

    def missing(self, step: int) -> list[tuple[Path, Recipe]]:
        """The pictures of `step` that are not there, or that something else has drawn."""
        return [(path, one) for path, one in self.wanted(step) if not pictures.holds(path, one, self.run)]

    def table(self) -> Table:
        return pictures.table(self.folder, self.suffix)


def of(config: Config, folder: RunFolder, identity: Mapping[str, Any], also: Path | None) -> list[View]:
    """The run's own view, then that of `sample.also`; none without `sample.every` or prompts."""
    if config.sample.every is None or not config.sample.prompts:
        return []
    digest, name = run_folder.digest_of(identity), config.sample.also
    if config.sample.weights == "ema":
        digest += " averaged"
    digest += "".join(f" and {one.file}={one.weight:g}" for one in config.sample.extra_loras)
    views = [View(None, recipe.previews(config), folder.samples, digest, "", config.model.variant == "turbo")]
    if name is not None:
        on_turbo = name not in VARIANTS or name == "turbo"
        views.append(
            View(
                also=also,
                recipes=recipe.also(config),
                folder=folder.samples / "also",
                run=f"{digest} on {name}",
                suffix=f" (on {name})",
                is_metered=on_turbo and not views[0].is_metered,
            )
        )
    return views


def shown(views: list[View]) -> Table:
    """All previews of a run as one table, those of another model beside its own."""
    own, *others = [view.table() for view in views]
    return pictures.beside(own, others[0]) if others else own
