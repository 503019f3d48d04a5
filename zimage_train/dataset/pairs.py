"""Pairs of images: the negative image that belongs to each image of an entry of `data`."""

from dataclasses import dataclass
from pathlib import Path

from zimage_train.dataset import images
from zimage_train.dataset.images import ImageIndex, ImageInfo
from zimage_train.errors import DataError, Location, Problem, ZImageTrainError
from zimage_train.io.progress import Progress


@dataclass(frozen=True)
class Partner:
    """The negative image of a pair."""

    path: Path
    info: ImageInfo


def find_partners(
    image_paths: list[Path],
    root: Path,
    folder: Path,
    where: str,
    errors: list[ZImageTrainError],
    image_index: ImageIndex,
    progress: Progress,
) -> dict[Path, Partner]:
    """Return the negative image in `folder` of each image: that of the same name and subfolder, of any format.

    Images without one are named in a single error in `errors`, and so are two files of the same name.
    """
    setting = Location(key=f"{where}.negative", source=str(folder))
    if not folder.is_dir():
        message = "is a file, not a folder" if folder.exists() else "does not exist"
        errors.append(DataError(Problem(setting, message, "give a folder of negative images", "missing-folder")))
        return {}
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in images.EXTENSIONS and path.is_file():
            first = files.setdefault(_name_of(path, folder), path)
            if first is not path:
                message = f"is a second image of this name, beside {first.name}"
                errors.append(DataError(Problem(str(path), message, "remove either file", "ambiguous-partner")))
    found: dict[Path, Path] = {}
    missing: list[str] = []
    for path in image_paths:
        name = _name_of(path, root)
        if name in files:
            found[path] = files[name]
        else:
            missing.append(path.relative_to(root).as_posix())
    if missing:
        message = f"has no image for {len(missing)} of {len(image_paths)}: {', '.join(missing)}"
        hint = "put an image of the same name there, or remove these"
        errors.append(DataError(Problem(setting, message, hint, "missing-partner")))
    partners: dict[Path, Partner] = {}
    for (path, file), info in zip(found.items(), image_index.lookup(found.values(), progress), strict=True):
        if isinstance(info, ImageInfo):
            partners[path] = Partner(file, info)
        else:
            errors.append(info)
    return partners


def require_equal_size(partner: Partner, image: Path, info: ImageInfo) -> None:
    """Require that both images of a pair have the same size, so that they get the same crop.

    Raises:
        DataError: they have not.
    """
    other = partner.info
    if (other.width, other.height) != (info.width, info.height):
        message = f"is {other.width}x{other.height} px, and {image.name} {info.width}x{info.height}"
        raise DataError(Problem(str(partner.path), message, "make both of the same size", "other-size"))


def _name_of(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()
