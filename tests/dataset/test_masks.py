"""Masks lie on the latents where the image does: scaled, cropped and mirrored with it; and are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import images
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.masks import Mask, mask_on_latents
from zimage_train.dataset.scan import FolderScan, scan_entry
from zimage_train.errors import DataError, Note

from dataset_folder import image


def saved(path: Path, values: np.ndarray, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8), mode=None if mode == "L" else mode).save(path)
    return path


def scanned(folder: Path, mask: str, **settings: object) -> FolderScan:
    return scan_entry(DataEntry.model_validate({"folder": str(folder), "mask": mask, **settings}), "data.0")


def only(result: FolderScan) -> Mask:
    (found,) = result.images
    assert result.errors == [] and found.mask is not None
    return found.mask


def test_mask_is_averaged_over_latents(tmp_path: Path):
    """A mask is averaged over the pixels of each latent."""
    image(tmp_path / "a.png", size=(64, 64))
    values = np.random.default_rng(0).integers(0, 256, (64, 64))
    saved(tmp_path / "_m" / "a.png", values)
    found = mask_on_latents(only(scanned(tmp_path, str(tmp_path / "_m"))), Bucket(64, 64), False, "")
    expected = values.reshape(8, 8, 8, 8).mean(axis=(1, 3)) / 255
    assert found.shape == (8, 8) and np.abs(found - expected).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "bucket"), [((200, 120), (96, 64)), ((64, 192), (48, 80)), ((128, 128), (64, 64))])
def test_it_lies_where_the_image_lies(tmp_path: Path, size: tuple[int, int], bucket: tuple[int, int], flip: bool):
    """The image itself, taken as its mask, must come out as the image fitted to its bucket."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 200, size[1]))
    grey = (x * 0.6 + y * 0.4).astype(np.uint8)
    saved(tmp_path / "a.png", grey)
    saved(tmp_path / "_m" / "a.png", grey)
    target = Bucket(*bucket)
    found = mask_on_latents(only(scanned(tmp_path, str(tmp_path / "_m"))), target, flip, "")
    fitted = images.fit(images.load(tmp_path / "a.png", (tmp_path / "a.png").read_bytes()), target)
    pixels = np.asarray(fitted.convert("L"), dtype=np.float64)[:, :: -1 if flip else 1]
    expected = pixels.reshape(target.height // 8, 8, target.width // 8, 8).mean(axis=(1, 3)) / 255
    assert np.abs(found - expected).max() < 0.02


def test_the_alpha_channel_is_a_mask(tmp_path: Path):
    values = np.full((64, 64, 4), 200, dtype=np.uint8)
    values[:, :32, 3] = 0
    values[:, 32:, 3] = 255
    saved(tmp_path / "a.png", values, "RGBA")
    result = scanned(tmp_path, "alpha")
    mask = only(result)
    found = mask_on_latents(mask, Bucket(64, 64), False, result.images[0].digest)
    assert found[:, :4].max() == 0.0 and found[:, 4:].min() == 1.0
    mirrored = mask_on_latents(mask, Bucket(64, 64), True, result.images[0].digest)
    assert np.array_equal(mirrored, found[:, ::-1])


def test_image_without_a_mask(tmp_path: Path):
    """An image without a mask is trained whole, with a note."""
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", (1, 1, 1))
    image(tmp_path / "_m" / "b.png")
    result = scanned(tmp_path, str(tmp_path / "_m"))
    assert [one.mask is None for one in result.images] == [True, False]
    assert Note("no-mask", "data.0: 1 images have no mask and are trained whole (a.png)") in result.notes


def test_unusable_masks_are_refused(tmp_path: Path):
    """Masks that cannot be used are refused by name."""
    image(tmp_path / "a.png", size=(80, 64))

    def said(mask: Path) -> str:
        return " ".join(map(str, scanned(tmp_path, str(mask)).errors))

    assert said(tmp_path / "none").startswith("data.0.mask: ")
    assert "does not exist; give a folder of masks, or alpha" in said(tmp_path / "none")
    assert "is a file, not a folder" in said(tmp_path / "a.png")
    (tmp_path / "_empty").mkdir()
    assert "holds no mask under the name of an image (such as a.png)" in said(tmp_path / "_empty")
    image(tmp_path / "_turned" / "a.png", size=(64, 80))
    assert "is 64x80 px, and its image a.png 80x64; make it of the image's shape" in said(tmp_path / "_turned")
    (tmp_path / "_bad").mkdir()
    (tmp_path / "_bad" / "a.png").write_bytes(b"not an image")
    assert "not an image" in said(tmp_path / "_bad")
    saved(tmp_path / "_black" / "a.png", np.zeros((64, 80)))
    assert "is black: nothing would be trained" in said(tmp_path / "_black")


def test_masks_of_subfolders(tmp_path: Path):
    """Masks of images in subfolders are found in the same subfolders."""
    image(tmp_path / "sub" / "a.png")
    image(tmp_path / "_m" / "sub" / "a.jpg")
    assert only(scanned(tmp_path, str(tmp_path / "_m"))).path == tmp_path / "_m" / "sub" / "a.jpg"


def test_mask_changed_during_a_run(tmp_path: Path):
    """A mask that changes during a run is noticed."""
    image(tmp_path / "a.png")
    path = image(tmp_path / "_m" / "a.png")
    mask = only(scanned(tmp_path, str(tmp_path / "_m")))
    image(path, (9, 9, 9))
    with pytest.raises(DataError, match="changed while this command ran"):
        mask_on_latents(mask, Bucket(64, 48), False, "")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        mask_on_latents(mask, Bucket(64, 48), False, "")


def test_ambiguous_masks_are_refused(tmp_path: Path):
    """Two masks for an image, or a mask for several images, are refused."""
    image(tmp_path / "a.png")
    image(tmp_path / "_m" / "a.png", (1, 1, 1))
    image(tmp_path / "_m" / "a.jpg", (2, 2, 2))
    assert "is a second mask beside" in " ".join(map(str, scanned(tmp_path, str(tmp_path / "_m")).errors))
    image(tmp_path / "x" / "one.png")
    image(tmp_path / "y" / "one.png", (3, 3, 3))
    image(tmp_path / "_n" / "one.png")
    lines = [json.dumps({"image": f"{name}/one.png", "prompt": "a cat"}) for name in "xy"]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    result = scan_entry(DataEntry(metadata=str(tmp_path / "m.jsonl"), mask=str(tmp_path / "_n")), "data.0")
    assert "is the mask of several images" in " ".join(map(str, result.errors))
