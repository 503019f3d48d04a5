"""What is odd about a run and no problem: what `check` and `train` say beside their warnings."""

from pathlib import Path

from zimage_train.config.methods import TeacherSettings
from zimage_train.config.schema import Config
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.errors import Note, Problem


def notes_on_settings(config: Config) -> list[Note]:
    """Settings that others stand in for."""
    texts = ["train.epochs decides how long; train.steps is not used"] if config.train.epochs is not None else []
    if config.method.imitates_teacher:
        texts.append("trajectory_imitation trains at Turbo's own sigmas; timesteps is not used")
    elif config.teacher != TeacherSettings():
        texts.append(f"teacher is for trajectory_imitation; {config.train.method} does not use it")
    entries = [f"data.{n}" for n, entry in enumerate(config.data) if entry.max_pixels is not None]
    texts += [f"{where}: max_pixels decides; resolution is not used" for where in entries]
    return [Note("setting-not-used", text) for text in texts]


def not_downloaded(problem: Problem) -> Note:
    """What is said of a part that is yet to be downloaded; `problem`: that it is not here."""
    return Note("not-downloaded", f"{problem.location}: not on this machine yet; train downloads it")


def notes_on_sizes(items: list[TrainItem]) -> list[Note]:
    """Images that fill less than a listed resolution, which they are then trained below."""
    small: dict[int, set[Path]] = {}
    total = len({item.image.path for item in items})
    for item in items:
        if item.image.width * item.image.height < 0.9 * item.resolution**2:
            small.setdefault(item.resolution, set()).add(item.image.path)
    notes = []
    for resolution, paths in sorted(small.items()):
        some = ", ".join(path.name for path in sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
        what = f"smaller than {resolution}x{resolution} px, so trained at their own size there"
        notes.append(Note("smaller-than-resolution", f"{what}: {len(paths)} of {total} images ({some})"))
    return notes
