"""`sample --from` draws what an image of another program says, and names what it cannot read of it."""

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.sample import SamplingOptions
from zimage_train.commands.sample_from import requests_from_images
from zimage_train.config.schema import ModelSettings
from zimage_train.errors import ZImageTrainError
from zimage_train.report import preview_images

NONE = SamplingOptions(None, None, None, None, None, None)
TEXT = "a fox\nNegative prompt: fog\nSteps: 4, Sampler: Euler, CFG scale: 3, Seed: 9, Size: 64x96, Model: z_image"


def png(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


def test_requests_of_other_programs(tmp_path: Path):
    """The request has the values of the image, then options, then the defaults of the variant."""
    full, part = png(tmp_path / "a.png", parameters=TEXT), png(tmp_path / "b.png", parameters="a dog\nSteps: 5")
    (first, second), lines = requests_from_images(NONE, ModelSettings(variant="base", adapter=None), [full, part])
    assert (first.prompt, first.negative, first.seed, first.width, first.height) == ("a fox", "fog", 9, 64, 96)
    assert (first.steps, first.guidance, first.shift) == (4, 2.0, 6.0)
    assert (second.prompt, second.steps, second.seed, second.guidance, second.width) == ("a dog", 5, 42, 3.0, 1024)
    assert (
        lines[0] == f"{full} was drawn by z_image with no LoRA; this command uses the model and the --lora given to it"
    )
    assert [line.split(" (")[0] for line in lines[1:]] == [
        f"{part}: its {name} cannot be read" for name in ("seed", "guidance", "size")
    ]
    options = SamplingOptions("no", 3, 96, 64, None, 0.0)
    (third,), lines = requests_from_images(options, ModelSettings(), [part])
    assert (third.negative, third.seed, third.width, third.height, third.guidance) == ("no", 3, 96, 64, 0.0)
    assert lines == []


def test_images_that_cannot_be_read(tmp_path: Path):
    """A file that is cut off, no image or no PNG is called that, and not an image without settings."""
    whole = png(tmp_path / "a.png", parameters=TEXT).read_bytes()
    spoiled = bytearray(whole)
    spoiled[whole.index(b"Steps")] ^= 0xFF
    Image.new("RGB", (64, 64)).save(tmp_path / "b.jpg")
    contents = {
        "cut.png": (whole[:60], "cannot be read"),
        "cut_more.png": (whole[:5], "is no image, or damaged"),
        "empty.png": (b"", "is no image, or damaged"),
        "text.png": (b"a fox", "is no image, or damaged"),
        "spoiled.png": (bytes(spoiled), "is no image, or damaged"),
        "jpeg.png": ((tmp_path / "b.jpg").read_bytes(), "is a JPEG, whose metadata is not read"),
        "gone.png": (None, "does not exist"),
    }
    for name, (content, said) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ZImageTrainError) as caught:
            requests_from_images(NONE, ModelSettings(), [tmp_path / name])
        assert f"{tmp_path / name}: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("64x96", "65x96"), "width: is 65; 65 is no multiple of 16"),
        (TEXT.replace("64x96", "64x99999"), "height: is 99999"),
        (TEXT.replace("Seed: 9", f"Seed: {2**64 - 1}"), "seed: is 18446744073709551615"),
        (TEXT.replace("Steps: 4", "Steps: 0"), "steps: is 0"),
    ],
)
def test_values_that_no_request_has(text: str, message: str, tmp_path: Path):
    """Values that cannot be drawn are refused by image and field; an option takes their place."""
    path = png(tmp_path / "a.png", parameters=text)
    with pytest.raises(ZImageTrainError) as caught:
        requests_from_images(NONE, ModelSettings(), [path, tmp_path / "gone.png"])
    assert f"{message}" in str(caught.value) and str(path) in str(caught.value)
    assert f"{tmp_path / 'gone.png'}: does not exist" in str(caught.value)
    options = SamplingOptions(None, 1, 64, 64, 2, None)
    assert requests_from_images(options, ModelSettings(), [path])[0][0].prompt == "a fox"


def test_a_hostile_png_is_refused(tmp_path: Path):
    """A PNG of a billion pixels, and a chunk that unpacks to gigabytes, are refused and not unpacked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = b"\x89PNG\r\n\x1a\n"
    bomb = start + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"x")
    (tmp_path / "a.png").write_bytes(bomb)
    text = zlib.compress(b"a" * 100_000_000)
    size = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")
    (tmp_path / "b.png").write_bytes(start + chunk(b"IHDR", size) + chunk(b"zTXt", b"parameters\0\0" + text) + rows)
    for name in ("a.png", "b.png"):
        with pytest.raises(ZImageTrainError, match=r"cannot be read \("):
            requests_from_images(NONE, ModelSettings(), [tmp_path / name])


@pytest.mark.slow
def test_image_of_comfyui_is_drawn(tmp_path: Path):
    """An image of ComfyUI is drawn with its prompt, seed, steps and size."""
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red zorb"}},
        "2": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 64}},
        "3": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["1", 0]}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "positive": ["1", 0], "negative": ["3", 0], "latent_image": ["2", 0], "seed": 5, "steps": 3, "cfg": 1,
                "sampler_name": "euler", "denoise": 1,
            },
        },
    }  # fmt: skip
    path = png(tmp_path / "a.png", prompt=json.dumps(graph), workflow="{}")
    words = ["sample", str(mini.TURBO), "--from", str(path), "--dtype", "fp32", "-o", str(tmp_path / "drawn")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    request = preview_images.request_of(tmp_path / "drawn" / "sample-5.png")
    assert (request.prompt, request.width, request.height, request.steps) == ("a red zorb", 96, 64, 3)
    assert (request.guidance, request.negative) == (0.0, "")
