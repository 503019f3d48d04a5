"""The loaders of ComfyUI and AI Toolkit: what they read and compute is compared, and a folder of neither is named.

Stand-ins have the modules and names that the programs use, and loaders of their own.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from zimage_train.errors import ConfigError, ZImageTrainError
from zimage_train.lora import lora_file
from zimage_train.lora.deltas import Hadamard
from zimage_train.measure.proofs import loaders
from zimage_train.measure.proofs.claims import Claim
from zimage_train.measure.proofs.loaders import loader_claims, python_of
from zimage_train.models.arch import TransformerShape

from lora_files import TINY, Q, random_lora, write

Claims = Callable[[Path, Path, TransformerShape], Iterator[Claim]]
comfyui_claims = partial(loader_claims, loaders.COMFYUI)
aitoolkit_claims = partial(loader_claims, loaders.AI_TOOLKIT)
NO_SUCH_MODULE = "import no_such_module\n"

COMFYUI = {
    "comfyui_version.py": '__version__ = "0.1"\n',
    "comfy/__init__.py": "",
    "comfy/cli_args.py": "class args:\n    cpu = False\n",
    "comfy/lora_convert.py": "def convert_lora(lora):\n    return lora\n",
    "comfy/lora.py": """
import logging
import sys
from comfy.cli_args import args

assert args.cpu and "zimage_train" not in sys.modules
WITHOUT_ALPHA = ""


def model_lora_keys_unet(model, targets):
    for key in model.state_dict():
        name = key.removesuffix(".weight")
        targets[name] = key
        if name.endswith("attention.out"):
            targets[name.replace("attention.out", "attention.to_out.0")] = key
        if name.endswith("attention.qkv"):
            for third, part in enumerate("qkv"):
                size = model.state_dict()[key].shape[0] // 3
                targets[name.replace("qkv", f"to_{part}")] = (key, (0, third * size, size))
    return targets


def load_lora(lora, targets):
    patches, read = {}, set()
    for name, key in targets.items():
        if f"{name}.lora_A.weight" not in lora:
            continue
        down, up, alpha = (f"{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        read |= {down, up}
        scale = 1.0
        if name != WITHOUT_ALPHA:
            read.add(alpha)
            scale = float(lora[alpha]) / lora[down].shape[0]
        patches[key] = (lora[up], lora[down], scale)
    for key in lora:
        if key not in read:
            logging.warning(f"lora key not loaded: {key}")
    return patches


def calculate_weight(patches, weight, key):
    for strength, (up, down, scale), strength_model, offset, function in patches:
        rows = weight if offset is None else weight.narrow(*offset)
        rows += strength * scale * (up @ down)
    return weight
""",
    "comfy/model_detection.py": """
class Model:
    def __init__(self, weights, prefix):
        self.weights = {prefix + name: weight for name, weight in weights.items()}
        self.diffusion_model = Model(weights, "") if prefix else None

    def state_dict(self):
        return self.weights


class Config:
    def set_inference_dtype(self, dtype, manual_cast_dtype):
        pass

    def get_model(self, weights, prefix, device):
        assert all(weight.is_meta for weight in weights.values()) and device.type == "meta"
        return Model(weights, "diffusion_model.")


def model_config_from_unet(weights, prefix):
    return Config()
""",
    "comfy/model_patcher.py": """
class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        self.model, self.patches = model, {}

    def add_patches(self, loaded, strength):
        for key, patch in loaded.items():
            key, offset = (key, None) if isinstance(key, str) else key
            self.patches.setdefault(key, []).append((strength, patch, 1.0, offset, None))
""",
}
Z_IMAGE = "extensions_built_in/diffusion_models/z_image/z_image.py"
AI_TOOLKIT = {
    "version.py": 'VERSION = "0.2"\n',
    "toolkit/__init__.py": "",
    "toolkit/config_modules.py": """
class ModelConfig:
    def __init__(self, name_or_path, arch):
        pass


class NetworkConfig:
    def __init__(self, type, linear, linear_alpha):
        self.type, self.linear, self.linear_alpha, self.transformer_only = type, linear, linear_alpha, True
""",
    "toolkit/lora_special.py": """
import torch
from torch import nn


class LoRAModule(nn.Module):
    def __init__(self, linear, rank):
        super().__init__()
        self.org_module = [linear]
        self.lora_down = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def merge_in(self):
        weight = self.org_module[0].weight + self.lora_up.weight @ self.lora_down.weight
        self.org_module[0].load_state_dict({"weight": weight})


class LoRASpecialNetwork(nn.Module):
    def __init__(self, unet, lora_dim, base_model, **others):
        super().__init__()
        self.base_model = base_model
        for name, linear in unet.named_modules():
            if isinstance(linear, nn.Linear):
                self.add_module(("transformer." + name).replace(".", "$$"), LoRAModule(linear, lora_dim))

    def force_to(self, device, dtype):
        self.to(device, dtype)

    def _update_torch_multiplier(self):
        pass

    def apply_to(self, text_encoder, unet, apply_text_encoder, apply_unet):
        pass

    def get_all_modules(self):
        return list(self.children())

    def load_weights(self, lora):
        own, unknown = self.state_dict(), {}
        for key, tensor in self.base_model.convert_lora_weights_before_load(lora).items():
            if key.endswith(".alpha"):
                continue
            module, part = key.split(".lora_")
            part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            key = module.replace(".", "$$") + "." + part
            if key in own:
                own[key].copy_(tensor)
            else:
                unknown[key] = tensor
        return unknown or None
""",
    "extensions_built_in/diffusion_models/__init__.py": 'raise RuntimeError("another model needs a GPU")\n',
    "extensions_built_in/diffusion_models/z_image/__init__.py": "",
    Z_IMAGE: """
import sys
from torch import nn

assert "zimage_train" not in sys.modules


class ZImageTransformer2DModel(nn.Module):
    def __init__(self, dim, n_layers, **others):
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            parts = {f"to_{part}": nn.Linear(dim, dim, bias=False) for part in "qkv"}
            attention = nn.ModuleDict(parts | {"to_out": nn.ModuleList([nn.Linear(dim, dim, bias=False)])})
            sizes = {"w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}
            forward = {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
            self.layers.append(nn.ModuleDict({"attention": attention, "feed_forward": nn.ModuleDict(forward)}))


class ZImageModel:
    is_transformer = True
    target_lora_modules = ["ZImageTransformer2DModel"]

    def __init__(self, device, model_config):
        pass

    def convert_lora_weights_before_load(self, lora):
        return {key.replace("diffusion_model.", "transformer."): tensor for key, tensor in lora.items()}
""",
}


def stand_in(folder: Path, files: dict[str, str], file: str = "", old: str = "", new: str = "") -> Path:
    """Write `files` into `folder`, with `new` for `old` in one of them."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert name != file or old in text
        path.write_text(text.replace(old, new) if name == file else text)
    return folder


def numbers(claims: Claims, folder: Path, lora: Path) -> list[float | None]:
    """The number of keys that are not read, and the largest error."""
    return [claim.value for claim in claims(folder, lora, TINY)]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.safetensors", random_lora())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claims", "files", "scale", "program"),
    [(comfyui_claims, COMFYUI, 0.5, "ComfyUI 0.1"), (aitoolkit_claims, AI_TOOLKIT, 1.0, "AI Toolkit 0.2")],
)
def test_loaders_that_read_all(claims: Claims, files: dict, scale: float, program: str, tmp_path: Path):
    """A loader that reads every key, and computes what the file stores, is found to; alpha counts in ComfyUI alone."""
    path = write(tmp_path / "lora.safetensors", random_lora(scale=scale, targets=("attention",)))
    found = list(claims(stand_in(tmp_path / "folder", files), path, TINY))
    assert [claim.verdict(True) for claim in found] == ["holds", "holds"]
    assert found[0].value == 0 and found[1].value is not None and 0 < found[1].value < 1e-6
    assert found[0].note.startswith(f"{program}, 24 keys") and found[1].note.startswith(f"{program}, 8 modules")
    assert not list((tmp_path / "folder").rglob("*.pyc"))


@pytest.mark.slow
def test_comfyui_that_drops_an_alpha(tmp_path: Path):
    """A key that is not read is counted, and what it does to its module is measured: twice the change of one."""
    path = write(tmp_path / "lora.safetensors", random_lora(scale=0.5))
    changed = ("comfy/lora.py", 'WITHOUT_ALPHA = ""', f'WITHOUT_ALPHA = "diffusion_model.{Q}"')
    unread, error = numbers(comfyui_claims, stand_in(tmp_path / "folder", COMFYUI, *changed), path)
    assert unread == 1 and error == pytest.approx(1.0)


@pytest.mark.slow
def test_aitoolkit_that_drops_a_module(tmp_path: Path, lora: Path):
    """The keys of a module that is not there are counted, and its change is missing."""
    changed = ("toolkit/lora_special.py", "nn.Linear):", f'nn.Linear) and name != "{Q}":')
    folder = stand_in(tmp_path / "folder", AI_TOOLKIT, *changed)
    reads, changes = aitoolkit_claims(folder, lora, TINY)
    assert (reads.value, reads.verdict(True), changes.verdict(True)) == (2, "fails", "fails")
    assert f"such as transformer.{Q}" in reads.note


@pytest.mark.slow
def test_aitoolkit_that_scales(tmp_path: Path, lora: Path):
    """A loader that reads every key, but gives a module half of its change, is off by a half."""
    half = "self.org_module[0].weight + 0.5 * self.lora_up"
    changed = ("toolkit/lora_special.py", "self.org_module[0].weight + self.lora_up", half)
    unread, error = numbers(aitoolkit_claims, stand_in(tmp_path / "folder", AI_TOOLKIT, *changed), lora)
    assert unread == 0 and error == pytest.approx(0.5)


@pytest.mark.slow
def test_aitoolkit_that_changes_others(tmp_path: Path):
    """A module that the file does not hold has to stay as it is."""
    path = write(tmp_path / "lora.safetensors", random_lora(targets=("attention",)))
    changed = ("toolkit/lora_special.py", "nn.init.zeros_(", "nn.init.ones_(")
    assert numbers(aitoolkit_claims, stand_in(tmp_path / "folder", AI_TOOLKIT, *changed), path) == [0, math.inf]


@pytest.mark.slow
def test_comfyui_refuses_a_size(tmp_path: Path, lora: Path):
    """A model that ComfyUI does not build is no failure: nothing was tried, and the line says why."""
    changed = (
        "comfy/model_detection.py",
        "        return Model",
        "        assert False  # 96 px\n        return Model",
    )
    found = list(comfyui_claims(stand_in(tmp_path / "folder", COMFYUI, *changed), lora, TINY))
    assert [claim.verdict(True) for claim in found] == ["not tried", "not tried"]
    assert found[0].note == "ComfyUI 0.1 refuses a model of these sizes (assert False  # 96 px)"


@pytest.mark.slow
def test_comfyui_that_reports_nothing(tmp_path: Path, lora: Path):
    """Where keys that are left out are not reported, none are taken for read: the last line says so."""
    folder = stand_in(tmp_path / "folder", COMFYUI, "comfy/lora.py", "lora key not loaded", "not loaded")
    with pytest.raises(ZImageTrainError, match="ComfyUI does not report the keys") as caught:
        list(comfyui_claims(folder, lora, TINY))
    assert caught.value.problems[0].code == "command-failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claims", "files", "file"), [(comfyui_claims, COMFYUI, "comfy/lora.py"), (aitoolkit_claims, AI_TOOLKIT, Z_IMAGE)]
)
def test_missing_package_is_named(claims: Claims, files: dict, file: str, tmp_path: Path, lora: Path):
    """A package that the project needs is named, and what to do."""
    folder = stand_in(tmp_path / "folder", files | {file: NO_SUCH_MODULE})
    with pytest.raises(ZImageTrainError) as caught:
        list(claims(folder, lora, TINY))
    (problem,) = caught.value.problems
    assert problem.code == "missing-package" and "No module named 'no_such_module'" in problem.message
    assert problem.location in ("--comfyui", "--aitoolkit") and "requirements.txt" in problem.hint


@pytest.mark.parametrize(("claims", "option"), [(comfyui_claims, "--comfyui"), (aitoolkit_claims, "--aitoolkit")])
def test_folder_of_no_such_project(claims: Claims, option: str, tmp_path: Path, lora: Path):
    """A folder of something else is an error of the option, before anything is run."""
    with pytest.raises(ConfigError, match=f"{option}: is not the source of") as caught:
        list(claims(tmp_path, lora, TINY))
    assert caught.value.problems[0].code == "missing-file"


def test_other_adapters_are_not_tried(tmp_path: Path):
    """An adapter that is no plain LoRA is not compared, and the line says so."""
    pair = (torch.ones(96, 2), torch.ones(2, 96))
    path = tmp_path / "loha.safetensors"
    lora_file.export_lora(path, {Q: Hadamard(pair, pair, 1.0)}, "fp32", {})
    found = list(comfyui_claims(stand_in(tmp_path / "folder", COMFYUI), path, TINY))
    assert [claim.note for claim in found] == ["only plain LoRAs are compared"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["venv/bin/python", ".venv/bin/python"])
def test_environment_of_the_project(tmp_path: Path, lora: Path, place: str):
    """A project that has an environment of its own is run by its interpreter."""
    folder = stand_in(tmp_path / "project", COMFYUI)
    python = folder / place
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntouch "{tmp_path}/was used"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert numbers(comfyui_claims, folder, lora)[0] == 0
    assert (tmp_path / "was used").exists() and python_of(tmp_path) == sys.executable
