"""Every image has a single training size: multiples of 16, no larger than it is, as much of it as possible."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zimage_train.dataset import images
from zimage_train.dataset.buckets import MAX_SIDE_PX, Bucket, crop_percent, nearest_bucket

sides = st.integers(16, 6000) | st.sampled_from([16, 17, 31, 32, 64, 512, 1023, 1024, 1025])
resolutions = st.integers(2, 128).map(lambda count: count * 16)
quick = settings(deadline=None, derandomize=True, max_examples=300)


def found(width: int, height: int, resolution: int) -> Bucket | None:
    """The bucket, or None where there is none."""
    try:
        return nearest_bucket(width, height, resolution)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((1920, 1080), 1024, (1360, 768)),
        ((4000, 3000), 1024, (1184, 880)),
        ((3000, 4000), 512, (432, 576)),
        ((500, 500), 512, (496, 496)),
        ((1000, 800), 256, (288, 224)),  # 272x240 has more pixels and crops 9 % of the image away
        ((640, 480), 512, (592, 432)),
        ((512, 512), 1024, (512, 512)),
        ((100, 80), 1024, (96, 80)),
        ((1000, 1000), 64, (64, 64)),
        ((16, 16), 512, (16, 16)),
        ((4096, 4096), 4096, (4096, 4096)),
    ],
)
def test_usual_sizes(size: tuple[int, int], resolution: int, expected: tuple[int, int]):
    assert nearest_bucket(*size, resolution) == expected


@quick
@given(sides, sides, resolutions)
def test_bucket_sides(width: int, height: int, resolution: int):
    """Sides are multiples of 16 px, within the image and the area."""
    size = found(width, height, resolution)
    if size is not None:
        assert size.width % 16 == size.height % 16 == 0
        assert 16 <= size.width <= min(width, MAX_SIDE_PX)
        assert 16 <= size.height <= min(height, MAX_SIDE_PX)
        assert size.width * size.height <= resolution**2
    elif max(width, height) / min(width, height) < 4:
        assert resolution < 64 or min(width, height) < 32


@quick
@given(sides, sides, resolutions)
def test_bucket_of_a_turned_image(width: int, height: int, resolution: int):
    """A turned image has the turned bucket."""
    size, turned = found(width, height, resolution), found(height, width, resolution)
    assert turned == (None if size is None else (size.height, size.width))
    if size is not None and width == height:
        assert size.width == size.height


@quick
@given(st.integers(256, 6000), st.floats(0.25, 4.0), st.integers(16, 128).map(lambda count: count * 16))
def test_crop_and_lost_area_are_small(width: int, aspect: float, resolution: int):
    """Little is cropped, and little resolution is lost."""
    height = max(256, round(width / aspect))
    if max(width / height, height / width) <= 4:
        size = nearest_bucket(width, height, resolution)
        assert size.width * size.height >= 0.85 * min(width * height, resolution**2)
        assert crop_percent(width, height, size) <= 15


@quick
@given(sides, sides, resolutions)
def test_crop_percent(width: int, height: int, resolution: int):
    """The cropped share is the difference of the aspect ratios."""
    size = found(width, height, resolution)
    if size is not None:
        ratio = (size.width / size.height) / (width / height)
        assert crop_percent(width, height, size) == pytest.approx(100 * (1 - min(ratio, 1 / ratio)))


def test_it_is_the_best_of_the_sizes_around():
    for width, height, resolution in itertools.product((301, 501, 768), (300, 420, 1001), (256, 512)):
        size = nearest_bucket(width, height, resolution)
        limit = min(width * height, resolution**2)

        def worth(one: tuple[int, int], width: int = width, height: int = height) -> float:
            return one[0] * one[1] * (1 - crop_percent(width, height, Bucket(*one)) / 100)

        steps = [(-16, 0), (16, 0), (0, -16), (0, 16)]
        others = [(size.width + dx, size.height + dy) for dx, dy in steps]
        allowed = [one for one in others if one[0] * one[1] <= limit and one[0] <= width and one[1] <= height]
        assert worth(size) >= max(map(worth, allowed)) * (1 - 1e-9)


@pytest.mark.parametrize("size", [(15, 100), (100, 15), (1, 1), (0, 50)])
def test_less_than_one_patch_is_refused(size: tuple[int, int]):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} px is smaller than one 16 px patch"):
        nearest_bucket(*size, 512)


def test_strip_without_a_bucket():
    """A strip that fits no size is refused, with its resolution."""
    for size in ((5000, 64), (64, 5000)):
        with pytest.raises(ValueError, match="too narrow for resolution 64"):
            nearest_bucket(*size, 64)
    assert nearest_bucket(5000, 64, 1024) == (4992, 64)


def test_sides_end_at_the_position_tables():
    """Sides end where the model's position tables do."""
    size = nearest_bucket(40_000, 64, 4096)
    assert size.width == MAX_SIDE_PX == 8192


def test_fit_crops_the_middle():
    """Fitting crops to the middle, and never enlarges."""
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    middle = images.fit(image, Bucket(96, 96))
    assert middle.size == (96, 96)
    assert set(middle.crop((4, 4, 92, 92)).getcolors()) == {(88 * 88, (0, 0, 255))}
    same = images.fit(image, Bucket(300, 100))
    assert same.tobytes() == image.tobytes()
