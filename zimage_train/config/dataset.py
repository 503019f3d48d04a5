"""Settings of a folder or table of images."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from zimage_train.config.triggers import placeholder_in
from zimage_train.config.types import ConflictError, NonEmptyPath, Resolutions, Section, SettingError

ALPHA = "alpha"
"""Value of `mask` for the transparency of the images."""


class DataEntry(Section):
    folder: NonEmptyPath | None = None
    """Folder of images, including its subfolders."""
    metadata: NonEmptyPath | None = None
    """Instead of a folder, a .jsonl or .csv with the columns image (or file_name, image_path) and prompt (or text,
    caption); paths are relative to the file."""
    prompts: NonEmptyPath | None = None
    """Instead of images, a text file with a prompt per line, for a train.method that draws its own images; they are
    square."""
    negative: NonEmptyPath | None = None
    """Folder of the negative images of train.method: pairs, each with the name and size of its image in `folder`."""
    resolution: Resolutions = [512, 768, 1024]
    """Each image is trained once at each of these resolutions (side of the square of equal area, px); images are never
    upscaled."""
    repeat_equal_sizes: bool = False
    """Train an image at each resolution even where it has the same size at several: small images, which are never
    upscaled, then weigh as much as large ones, as in AI Toolkit; false: equal sizes count once."""
    max_pixels: int | None = Field(default=None, ge=1024, le=16_777_216)
    """Each image is trained at its own size, scaled down to at most this number of pixels; `resolution` is then not
    used."""
    repeats: Annotated[int, Field(ge=1, le=1000)] | Literal["by_folder"] = 1
    """How often each image occurs in an epoch, each time with other noise; by_folder: as often as the name of its
    subfolder says (kohya's layout: in `10_cat` ten times, and `cat` is the caption of images that have none)."""
    batch_size: int | None = Field(default=None, ge=1, le=1024)
    """Samples of these images per forward pass; null: train.batch_size."""
    trigger: str | None = Field(default=None, min_length=1)
    """Word that stands for the concept: replaces `[trigger]` or `[name]` in captions and previews, and is prepended to
    captions without it. It is found as a whole word in any case, and written as it is spelt here."""
    default_caption: str = ""
    """Caption of images that have none."""
    caption_ext: str = Field(default=".txt", pattern=r"^\.[A-Za-z0-9_.]+$")
    """Extension of the caption files beside the images."""
    caption_lines: bool = False
    """Each line of a caption file is a caption, one of which is drawn for each sample, as from a list in a .jsonl."""
    caption_dropout: float = Field(default=0.05, ge=0.0, le=1.0)
    """Fraction of the samples that is trained with the empty prompt instead of the caption."""
    dropout_keeps_trigger: bool = False
    """Replace a dropped caption by the trigger instead of the empty prompt."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of captions anew in each epoch; a tag with the trigger stays in front."""
    keep_tags: int = Field(default=0, ge=0, le=512)
    """Number of leading tags that are neither shuffled nor dropped."""
    tag_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the other tags that is dropped, drawn anew in each epoch."""
    flip: bool = False
    """Train each image mirrored too, which doubles the samples of an epoch."""
    mask: NonEmptyPath | None = None
    """Mask of the loss: alpha, which is the transparency of the images, or a folder of masks with the names of the
    images. White is trained."""
    mask_floor: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Loss weight of the masked-out area."""
    mask_prior: float = Field(default=0.0, ge=0.0, le=100.0)
    """Weight of a second loss in the masked-out area, towards the prediction of the model without the LoRA."""
    regularization: bool | Literal["prior"] = False
    """Whether the images show the class instead of the concept; true: they are trained as they are, prior: towards the
    prediction of the model without the LoRA. train.regularization_share is their share."""
    weight: float = Field(default=1.0, gt=0.0, le=100.0)
    """Factor on the loss of these images."""

    @field_validator("trigger")
    @classmethod
    def _is_word(cls, value: str | None) -> str | None:
        if value is not None and (value != value.strip() or placeholder_in(value) or len(value.splitlines()) > 1):
            raise SettingError(f"is {value!r}", "give the word itself, on a single line and without spaces around it")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [source for source in (self.folder, self.metadata, self.prompts) if source is not None]
        if len(sources) != 1:
            raise ConflictError("needs exactly one of folder, metadata and prompts", "give one of them")
        return self

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        fields = type(self).model_fields
        if self.repeats == "by_folder" and self.folder is None:
            raise ConflictError("repeats: by_folder needs folder: a file has no subfolders", key=("repeats",))
        if self.negative is not None and self.folder is None:
            raise ConflictError("negative needs folder, whose names its images have", key=("negative",))
        if self.regularization and self.trigger is not None:
            raise ConflictError(
                "is for regularization, so its images show no concept", "leave trigger out", ("trigger",)
            )
        if self.dropout_keeps_trigger and self.trigger is None:
            hint = "set trigger, or leave it out"
            raise ConflictError("dropout_keeps_trigger needs a trigger", hint, ("dropout_keeps_trigger",))
        for name in ("mask_floor", "mask_prior"):
            if self.mask is None and getattr(self, name) != fields[name].default:
                raise ConflictError(f"{name} needs a mask", "set mask, or leave it out", (name,))
        if self.keep_tags and not (self.shuffle_tags or self.tag_dropout):
            hint = "set either of them, or leave it out"
            raise ConflictError("keep_tags needs shuffle_tags or tag_dropout", hint, ("keep_tags",))
        return self
