"""The requests of `sample --from`: what images say of how they were drawn."""

from dataclasses import asdict
from pathlib import Path

from zimage_train.commands.sample import SamplingOptions, default_fields, make_request
from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import Location, ZImageTrainError, collect_errors, raise_all
from zimage_train.report import foreign_images, preview_images
from zimage_train.report.foreign_images import ForeignRecipe


def requests_from_images(
    options: SamplingOptions, model: ModelSettings, paths: list[Path]
) -> tuple[list[SamplingRequest], list[str]]:
    """Return the requests in the metadata of images, with `options` in place of their own values, and lines on them.

    Raises:
        ZImageTrainError: lists the images whose metadata has no prompt, or a value that no request can have.
    """
    errors: list[ZImageTrainError] = []
    requests: list[SamplingRequest] = []
    lines: list[str] = []
    for path in paths:
        with collect_errors(errors):
            texts = preview_images.read_texts(path)
            own = preview_images.parse_request(texts)
            if own is not None:
                fields = asdict(own)
                source = texts.get(preview_images.DRAWN_BY_KEY, "")
            else:
                recipe = foreign_images.read_recipe(path, texts)
                lines += [f"{path}: {note}" for note in _notes_of(recipe, options)]
                fields, source = default_fields(model) | recipe.fields, recipe.drawn_by
            requests.append(make_request(fields | options.given(), Location(str(path))))
            if source:
                lines.append(f"{path} was drawn by {source}; this command uses the model and the --lora given to it")
    raise_all(errors)
    return requests, lines


def _notes_of(recipe: ForeignRecipe, options: SamplingOptions) -> list[str]:
    """Return what of an image of another program is not drawn as it was; options take the place of what is missing."""
    given = set(options.given())
    notes: list[str] = []
    for name, reason in recipe.unread.items():
        names = {"width", "height"} if name == "size" else {name}
        if not names <= given:
            notes.append(f"its {name} cannot be read ({reason}); the default is used, unless an option gives it")
    return notes + recipe.notes
