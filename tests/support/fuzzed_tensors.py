"""The readers of images, LoRAs, checkpoints and models, each with valid files to damage."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from zimage_train.commands import lora as lora_commands
from zimage_train.commands.sample import SamplingOptions
from zimage_train.commands.sample_from import requests_from_images
from zimage_train.config.schema import ModelSettings
from zimage_train.dataset import images
from zimage_train.dataset.images import ImageIndex, ImageInfo
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ZImageTrainError, collect_errors
from zimage_train.io import tensorfile
from zimage_train.io.digests import DigestCache
from zimage_train.lora import formats, headers, lora_file, metadata
from zimage_train.models import components, stored_weights
from zimage_train.report import preview_images
from zimage_train.training import checkpoint, device_plan

from fuzzed_texts import given
from fuzzing import MEGABYTES, FileReader
from image_files import encoded, gradient, with_hole
from lora_files import random_lora
from lora_files import write as write_lora

SMALL = ("attention",)


def _image(path: Path) -> None:
    content = path.read_bytes()
    images.has_alpha(path)
    index = ImageIndex()
    (info,) = index.lookup([path], lambda *counts: None)
    if not isinstance(info, ImageInfo):
        raise info
    images.load(path, content)
    images.load_alpha(path, content)
    images.near_duplicates([info.thumbnail])


def _pictures(root: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = gradient(72, 64)
    return [
        encoded(small, "PNG"),
        encoded(small, "JPEG", exif=exif, quality=80),
        encoded(small, "WEBP"),
        encoded(small, "WEBP", lossless=True),
        encoded(small, "BMP"),
        encoded(small, "TIFF", compression="tiff_lzw"),
        encoded(small, "TIFF"),
        encoded(small.quantize(16), "PNG"),
        encoded(with_hole("LA"), "PNG"),
        encoded(with_hole("RGBA"), "WEBP"),
        encoded(small.convert("CMYK"), "JPEG"),
    ]


NO_OPTIONS = SamplingOptions(None, None, None, None, None, None)
REQUEST = SamplingRequest(
    prompt="a red zorb", negative="", seed=7, width=512, height=768, steps=8, guidance=0.0, shift=3.0
)
A1111 = (
    "a red <lora:zorb:0.8> zorb (word:1.2)\nNegative prompt: blurry\nSteps: 8, Sampler: Euler, Schedule type: Simple, "
    'CFG scale: 1, Seed: 7, Size: 512x768, Model: z, Shift: 3, Version: "f, 1"'
)
GRAPH = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "z.safetensors"}},
    "2": {"class_type": "LoraLoader", "inputs": {"lora_name": "a", "strength_model": 1.0, "model": ["1", 0]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red zorb", "clip": ["9", 0]}},
    "4": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["3", 0]}},
    "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 3.0, "model": ["2", 0]}},
    "7": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        | {"model": ["6", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]},
    },
}


def _preview(path: Path) -> None:
    """Read how an image was drawn, as `sample --from` and the reports do."""
    errors: list[ZImageTrainError] = []
    preview_images.drawn_by(path)
    preview_images.is_current(path, REQUEST, "x")
    preview_images.preview_table(path.parent)
    with collect_errors(errors):
        preview_images.request_of(path)
    requests_from_images(NO_OPTIONS, ModelSettings(), [path])


def _with_text(key: str) -> Any:
    """Read a file as the text chunk `key` of an image."""

    def read(path: Path) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_itxt(key, path.read_bytes().decode("utf-8", "replace"), zip=True)
        picture = path.parent / "made" / "000001-00.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(picture, pnginfo=info)
        _preview(picture)

    return read


def _previews(root: Path) -> list[bytes]:
    found: list[bytes] = []
    for text, key in ((REQUEST.to_json(), preview_images.REQUEST_KEY), (A1111, "parameters")):
        info = PngImagePlugin.PngInfo()
        info.add_itxt(key, text)
        info.add_text("prompt", json.dumps(GRAPH), zip=True)
        buffer = io.BytesIO()
        gradient(16, 16).save(buffer, "PNG", pnginfo=info)
        found.append(buffer.getvalue())
    return found


# LoRAs


def _lora(path: Path) -> None:
    """Read a LoRA as every command and a training do."""
    errors: list[ZImageTrainError] = []
    with collect_errors(errors):
        metadata.triggers_of(headers.read_header(path).metadata)
        metadata.edited_metadata("merge", [headers.read_header(path).metadata], {}, [4])
    for read in (
        headers.read_sizes,
        headers.read_ranks,
        lora_file.read_lora,
        lora_file.read_deltas,
        lambda file: headers.read_part_shapes(file, "LoKr"),
    ):
        with collect_errors(errors):
            read(path)
    for layout in formats.LAYOUTS:
        with collect_errors(errors):
            content = lora_file.read_changes(path)
            formats.to_layout(path, content.changes, content.metadata, layout)
    lora_commands.inspect_file(path, None)


def _loras(root: Path) -> list[bytes]:
    """A small LoRA in each layout and of each kind."""
    lora = dict(list(random_lora(2, 0.5, targets=SMALL).items())[:3])
    path = root / "lora.safetensors"
    found: list[bytes] = []
    for spelling in (
        "diffusion_model.{m}.lora_{p}.weight",
        "transformer.{m}.lora_{p}.weight",
        "base_model.model.{m}.lora_{p}.default.weight",
    ):
        found.append(write_lora(path, lora, spelling, alpha="default" not in spelling).read_bytes())
    q = "diffusion_model.layers.0.attention.to_q."
    fused = "diffusion_model.layers.0.attention.qkv."
    draw = torch.Generator().manual_seed(0)
    for tensors in (
        {"lokr_w1": (3, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
        {"hada_w1_a": (12, 2), "hada_w1_b": (2, 12), "hada_w2_a": (12, 2), "hada_w2_b": (2, 12), "alpha": ()},
        {"lora_A.weight": (2, 12), "lora_B.weight": (12, 2), "dora_scale": (12, 1), "alpha": ()},
        {"oft_blocks": (3, 4, 4), "alpha": ()},
    ):
        values = {q + name: torch.randn(shape, generator=draw) * (name != "alpha") for name, shape in tensors.items()}
        tensorfile.save(path, values, {"format": "pt", "modelspec.trigger_phrase": "zorb"})
        found.append(path.read_bytes())
    values = {fused + "lora_A.weight": torch.randn(3, 4, generator=draw)}
    values[fused + "lora_B.weight"] = torch.randn(12, 3, generator=draw)
    described = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.rank_pattern": {"a": 2}}
    tags = json.dumps({"zorb": {"zorb": 3}})
    more = {"lora_adapter_metadata": json.dumps(described), "ss_tag_frequency": tags, "trained_words": '["zorb"]'}
    tensorfile.save(path, values, more | {"zimage_train.converted": json.dumps({"ranks": {"a": [1, 1, 1]}})})
    return [*found, path.read_bytes()]


def _header_of(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _headers(seeds: Any) -> Any:
    """The headers of seeds; `_under_header` puts them before as much data as they claim."""
    return lambda root: [_header_of(content).rstrip() for content in seeds(root)]


def _under_header(read: Any) -> Any:
    def with_data(path: Path) -> None:
        text = path.read_bytes()
        made = path.with_name("made.safetensors")
        size = 0
        try:
            ends = [entry["data_offsets"][1] for key, entry in json.loads(text).items() if key != "__metadata__"]
            size = min(max(ends, default=0), 100_000)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            pass
        made.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size) if size >= 0 else text)
        read(made)

    return with_data


PEFT = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {"^layers.0": 4},
    "alpha_pattern": {"to_k$": 2.0},
    "use_rslora": False,
    "init_lora_weights": True,
    "target_modules": ["to_q"],
}


def _adapter_config(path: Path) -> None:
    weights = path.parent / "adapter_model.safetensors"
    if not weights.exists():
        lora = dict(list(random_lora(4, targets=SMALL).items())[:3])
        write_lora(weights, lora, "base_model.model.{m}.lora_{p}.weight", alpha=False)
    _lora(weights)


# Checkpoints and caches

STATE = {
    "format": checkpoint.FORMAT,
    "arithmetic": checkpoint.ARITHMETIC,
    "version": "1",
    "step": 3,
    "optimizer": {"step": 3, "groups": [{"lr": 1e-4}]},
    "identity": {"settings": {"model.quantize": "int8", "train.grad_accumulation": 1}, "inputs": {"a": "b"}},
    "path": "plain on cpu",
}
TENSORS = {"lora.x.A": torch.arange(6.0).view(2, 3), "optim.0.state1": torch.arange(5, dtype=torch.uint8)}


def _checkpoint(path: Path) -> None:
    folder = path.parent
    device_plan._planned_quantization(device_plan._newest_checkpoint(_Run(folder)))  # pyright: ignore
    checkpoint.load(path)


class _Run:
    """A run folder, as far as its checkpoints go."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints


def _state(path: Path) -> None:
    """Read a file as the state in a checkpoint whose digest is right."""
    made = path.parent / "made" / "step-000003.safetensors"
    made.parent.mkdir(exist_ok=True)
    tensorfile.save_with_digest(made, TENSORS, {"state": path.read_bytes().decode("utf-8", "replace")})
    _checkpoint(made)


def _checkpoints(root: Path) -> list[bytes]:
    path = root / "step-000003.safetensors"
    tensorfile.save_with_digest(path, TENSORS, {"state": json.dumps(STATE)})
    return [path.read_bytes()]


KEY = "latents/" + hashlib.sha256(b"x").hexdigest()


def _cached(path: Path) -> None:
    cache = TensorCache(path.parent / "cache")
    entry = cache._path(KEY)
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.write_bytes(path.read_bytes())
    cache.read(KEY)


def _entries(root: Path) -> list[bytes]:
    cache = TensorCache(root / "cache")
    cache.write(KEY, torch.arange(48.0).view(3, 4, 4))
    return [cache._path(KEY).read_bytes()]


def _image_index(path: Path) -> None:
    ImageIndex(path).save()


def _digests(path: Path) -> None:
    other = path.with_name("other.bin")
    other.write_bytes(b"x")
    DigestCache(path).of([other])


# Models


def _part(path: Path) -> None:
    for read in (
        lambda: stored_weights.read_part(path, "text_encoder"),
        lambda: components.read_vae(path),
        lambda: components.read_text_encoder(path),
    ):
        with collect_errors([]):  # it is another part
            read()
    stored_weights.read_part(path, "transformer")


def _parts(root: Path) -> list[bytes]:
    """Weights of 8 bits with scales, as ComfyUI writes them."""
    path = root / "part.safetensors"
    told = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    tensors = {
        "layers.0.attention.out.weight": torch.zeros(8, 8, dtype=torch.int8),
        "layers.0.attention.out.weight_scale": torch.ones(8),
        "layers.0.attention.out.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8),
        "x.weight": torch.zeros(4, 4),
        "vae.y.comfy_quant": told,
    }
    layers = {"layers.0.attention.out": {"format": "int8_tensorwise"}}
    tensorfile.save(path, tensors, {"_quantization_metadata": json.dumps({"layers": layers})})
    return [path.read_bytes()]


def _plain_parts(root: Path) -> list[bytes]:
    path = root / "plain.safetensors"
    tensors = {"layers.0.attention.out.weight": torch.zeros(8, 8, dtype=torch.int8)}
    tensors["layers.0.attention.out.weight_scale"] = torch.ones(8)
    layers = {"layers.0.attention.out": {"format": "int8_tensorwise"}}
    tensorfile.save(path, tensors, {"_quantization_metadata": json.dumps({"layers": layers})})
    return [path.read_bytes()]


def _encoder_config(path: Path) -> None:
    folder = path.parent
    tensorfile.save(folder / "model.safetensors", {"embed_tokens.weight": torch.zeros(4, 4)}, {})
    with collect_errors([]):  # it is another part
        components.read_vae(folder)
    components.read_text_encoder(folder)


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 4,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
LOOKS = {"format": images.INDEX_FORMAT, "looks": {"a|1|2|3": ["0" * 64, 64, 64, "00" * 192]}}


def _json(value: object) -> Any:
    return given(json.dumps(value).encode())


PIXELS_MB = MEGABYTES + 4 * images.MAX_PIXELS // 1_000_000
"""A small file may claim as many pixels as are accepted, and Pillow reserves 4 bytes for each before it decodes any."""
IMAGES = [
    FileReader("image", "a.png", _image, _pictures, megabytes=PIXELS_MB),
    FileReader("preview", "000001-00.png", _preview, _previews, megabytes=PIXELS_MB),
    FileReader("request", "request.json", _with_text(preview_images.REQUEST_KEY), given(REQUEST.to_json().encode())),
    FileReader("parameters", "parameters.txt", _with_text("parameters"), given(A1111.encode())),
    FileReader("graph", "graph.json", _with_text("prompt"), _json(GRAPH)),
    FileReader("image_index", "looks.json", _image_index, _json(LOOKS)),
]
TENSOR_FILES = [
    FileReader("lora", "lora.safetensors", _lora, _loras, "safetensors"),
    FileReader("lora_header", "header.json", _under_header(_lora), _headers(_loras)),
    FileReader("adapter_config", "adapter_config.json", _adapter_config, _json(PEFT)),
    FileReader("checkpoint", "step-000003.safetensors", _checkpoint, _checkpoints, "safetensors"),
    FileReader("state", "state.json", _state, _json(STATE)),
    FileReader("cache_entry", "entry.safetensors", _cached, _entries, "safetensors"),
    FileReader("digests", "digests.json", _digests, _json({"a|1|2|3": "0" * 64})),
    FileReader("weights", "part.safetensors", _part, _parts, "safetensors"),
    FileReader("weights_header", "header.json", _under_header(_part), _headers(_plain_parts)),
    FileReader("model_config", "config.json", _encoder_config, _json(QWEN3)),
]
