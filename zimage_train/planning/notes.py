"""Notes of `check` and `train` on a run: facts that may surprise, and need no action (torch-free)."""

from pathlib import Path

from zimage_train.config.methods import TeacherSettings
from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.errors import Note, Problem


def notes_on_settings(config: Config) -> list[Note]:
    """Return a note for each setting that has no effect, because another replaces it."""
    texts: list[str] = []
    if config.train.epochs is not None:
        texts.append("train.epochs decides how long; train.steps is not used")
    if config.method.imitates_teacher:
        texts.append("trajectory_imitation trains at Turbo's own sigmas; timesteps is not used")
    elif config.teacher != TeacherSettings():
        texts.append(f"teacher is for trajectory_imitation; {config.train.method} does not use it")
    for index, entry in enumerate(config.data):
        if entry.max_pixels is not None:
            texts.append(f"data.{index}: max_pixels decides; resolution is not used")
    return [Note("setting-not-used", text) for text in texts]


def not_downloaded(problem: Problem) -> Note:
    """Return the note on a part of the model that is still to be downloaded; `problem` says that it is missing."""
    return Note("not-downloaded", f"{problem.location}: not on this machine yet; train downloads it")


def notes_on_sizes(items: list[TrainItem]) -> list[Note]:
    """Return a note for each resolution that is larger than some images, which are then trained below it."""
    small_images: dict[int, set[Path]] = {}
    for item in items:
        # Sizes are multiples of 16 px, so most images lose some area; less than a tenth is not worth a note.
        if item.image.width * item.image.height < 0.9 * item.resolution**2:
            small_images.setdefault(item.resolution, set()).add(item.image.path)
    total = len({item.image.path for item in items})
    notes = []
    for resolution, paths in sorted(small_images.items()):
        examples = ", ".join(path.name for path in sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
        message = f"smaller than {resolution}x{resolution} px, so trained at their own size there"
        notes.append(Note("smaller-than-resolution", f"{message}: {len(paths)} of {total} images ({examples})"))
    return notes
