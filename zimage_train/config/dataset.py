"""Settings of one folder of images."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from zimage_train.config.types import ConflictError, Resolutions, Section, SettingError


class DataEntry(Section):
    folder: str | None = Field(default=None, min_length=1)
    """Folder of images, searched with its subfolders."""
    metadata: str | None = Field(default=None, min_length=1)
    """A .jsonl or .csv instead: columns image (or file_name) and prompt (or text); paths relative to the file."""
    prompts: str | None = Field(default=None, min_length=1)
    """No images, but a text file with one prompt a line, for a train.method that draws its own; square ones."""
    resolution: Resolutions = [512, 768, 1024]
    """Each image is trained once at each of these sizes (side of the square of equal area, px); never upscaled."""
    max_pixels: int | None = Field(default=None, ge=1024, le=16_777_216)
    """Each image at its own size, but with at most so many pixels; `resolution` is not used then."""
    repeats: Annotated[int, Field(ge=1, le=1000)] | Literal["by_folder"] = 1
    """How often each image is seen in an epoch, each time with its own noise; by_folder: as often as the names of the
    subfolders say, and `10_cat` is the caption `cat` of images that have none (kohya's layout)."""
    batch_size: int | None = Field(default=None, ge=1, le=1024)
    """Samples of these images in one forward pass; null: train.batch_size."""
    trigger: str | None = Field(default=None, min_length=1)
    """Word that stands for the concept: replaces `[trigger]` in captions, and is put in front where it is missing."""
    default_caption: str = ""
    """Caption of images that have none."""
    caption_ext: str = Field(default=".txt", pattern=r"^\.[A-Za-z0-9_.]+$")
    """Extension of the caption files beside the images."""
    caption_lines: bool = False
    """Each line of a caption is a caption of its own, and one is drawn for each sample, as from a list in a .jsonl."""
    caption_dropout: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of samples trained with the empty prompt instead of their caption."""
    dropout_keeps_trigger: bool = False
    """A dropped caption is the trigger alone instead of the empty prompt."""
    shuffle_tags: bool = False
    """Another order of comma-separated tags in each epoch; a tag with the trigger stays in front."""
    keep_tags: int = Field(default=0, ge=0, le=512)
    """So many tags stay in front, and are never dropped."""
    tag_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the other tags that is left out, others in each epoch."""
    flip: bool = False
    """Each image is trained mirrored too: twice as many samples in an epoch."""
    mask: str | None = Field(default=None, min_length=1)
    """alpha: the images' own transparency; or a folder of masks under the images' names. White is trained."""
    mask_floor: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Weight of what is masked out."""
    mask_prior: float = Field(default=0.0, ge=0.0, le=100.0)
    """Weight of a second loss that holds what is masked out to what the model makes of it without the LoRA."""
    regularization: bool | Literal["prior"] = False
    """Images of the class and not of the concept; true: trained as they are, prior: held to what the model makes of
    them without the LoRA. train.regularization_share says how often."""
    weight: float = Field(default=1.0, gt=0.0, le=100.0)
    """Factor on the loss of these images."""

    @field_validator("trigger")
    @classmethod
    def _is_word(cls, value: str | None) -> str | None:
        if value is not None and (value != value.strip() or value == "[trigger]" or len(value.splitlines()) > 1):
            raise SettingError(f"is {value!r}", "give the word itself, on one line and without space around it")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(one is not None for one in (self.folder, self.metadata, self.prompts)) != 1:
            raise ConflictError("needs exactly one of folder, metadata and prompts")
        return self

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        fields = type(self).model_fields
        if self.repeats == "by_folder" and self.folder is None:
            raise ConflictError("repeats: by_folder needs folder: a file has no subfolders")
        if self.regularization and self.trigger is not None:
            raise ConflictError("is for regularization, which shows the class without the concept", "leave trigger out")
        if self.dropout_keeps_trigger and self.trigger is None:
            raise ConflictError("dropout_keeps_trigger needs a trigger")
        changed = [name for name in ("mask_floor", "mask_prior") if getattr(self, name) != fields[name].default]
        if changed and self.mask is None:
            raise ConflictError(f"{changed[0]} needs a mask")
        if self.keep_tags and not (self.shuffle_tags or self.tag_dropout):
            raise ConflictError("keep_tags needs shuffle_tags or tag_dropout")
        return self
