"""The ComfyUI workflow beside a LoRA: whole, and equal to the preview in noise, sigmas and guidance."""

import json
from pathlib import Path

import pytest

from zimage_train.commands.train import run_training
from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion import comfyui, flow
from zimage_train.diffusion.request import SamplingRequest

from helpers import PREVIEWED, folder

# What ComfyUI's nodes take and give, by name: node -> (inputs with the type of a link or None, output types).
# From its nodes.py, nodes_sd3.py and nodes_model_advanced.py.
NODES = {
    "UNETLoader": ({"unet_name": None, "weight_dtype": None}, ["MODEL"]),
    "CLIPLoader": ({"clip_name": None, "type": None, "device": None}, ["CLIP"]),
    "VAELoader": ({"vae_name": None}, ["VAE"]),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": None, "strength_model": None}, ["MODEL"]),
    "ModelSamplingAuraFlow": ({"model": "MODEL", "shift": None, "sampling": None}, ["MODEL"]),
    "CLIPTextEncode": ({"clip": "CLIP", "text": None}, ["CONDITIONING"]),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"]),
    "EmptySD3LatentImage": ({"width": None, "height": None, "batch_size": None}, ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
        | dict.fromkeys(("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")),
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": None}, []),
}


def recipe(steps: int = 8, guidance: float = 0.0, shift: float = 3.0) -> SamplingRequest:
    return SamplingRequest(
        prompt='a "red" zorb',
        negative="blurry",
        seed=43,
        width=832,
        height=1216,
        steps=steps,
        guidance=guidance,
        shift=shift,
    )


def by_kind(nodes: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for node in nodes.values():
        found.setdefault(node["class_type"], []).append(node["inputs"])
    return found


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_workflow_links_are_valid(guidance: float):
    """Every node has all its inputs, and every link has its type."""
    nodes = comfyui.comfyui_workflow(recipe(guidance=guidance), ModelSettings(), "x.safetensors")
    for node in nodes.values():
        takes, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == takes.keys()
        for name, kind in takes.items():
            value = node["inputs"][name]
            assert isinstance(value, list) == (kind is not None)
            if kind is not None:
                assert NODES[nodes[value[0]]["class_type"]][1][value[1]] == kind
    reached, todo = set(), [key for key, node in nodes.items() if node["class_type"] == "SaveImage"]
    while todo:
        key = todo.pop()
        reached.add(key)
        todo += [value[0] for value in nodes[key]["inputs"].values() if isinstance(value, list)]
    assert reached == nodes.keys()


def test_it_samples_as_the_preview_does():
    found = by_kind(
        comfyui.comfyui_workflow(
            recipe(guidance=2.0, steps=25), ModelSettings(variant="deturbo"), "my lora.safetensors"
        )
    )
    (sampler,), (size,) = found["KSampler"], found["EmptySD3LatentImage"]
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (43, 25, 3.0)
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["denoise"]) == ("euler", "simple", 1.0)
    assert (size["width"], size["height"], size["batch_size"]) == (832, 1216, 1)
    assert {one["text"] for one in found["CLIPTextEncode"]} == {'a "red" zorb', "blurry"}
    assert found["LoraLoaderModelOnly"][0]["lora_name"] == "my lora.safetensors"
    assert found["UNETLoader"][0]["unet_name"] == "z_image_de_turbo_v1_bf16.safetensors"
    assert "ConditioningZeroOut" not in found


def test_guidance_0_is_scale_1():
    """At guidance 0 the scale is 1, and no negative prompt is written."""
    found = by_kind(comfyui.comfyui_workflow(recipe(), ModelSettings(path="weights/mine.safetensors"), "x.safetensors"))
    assert found["KSampler"][0]["cfg"] == 1.0 and len(found["CLIPTextEncode"]) == 1
    assert found["UNETLoader"][0]["unet_name"] == "mine.safetensors"


@pytest.mark.parametrize(("steps", "shift", "far"), [(8, 3.0, 1e-6), (25, 3.0, 1e-6), (30, 6.0, 6e-3), (9, 3.0, 3e-3)])
def test_simple_schedule_has_the_sigmas(steps: int, shift: float, far: float):
    """ComfyUI's simple schedule has the sigmas of the pipeline."""
    found = by_kind(comfyui.comfyui_workflow(recipe(steps=steps, shift=shift), ModelSettings(), "x"))
    shift = found["ModelSamplingAuraFlow"][0]["shift"]
    table = [k / 1000 for k in range(1, 1001)]
    table = [shift * u / (1 + (shift - 1) * u) for u in table]
    simple = [table[-(1 + int(k * 1000 / steps))] for k in range(steps)] + [0.0]
    ours = flow.sampling_sigmas(steps, shift)
    assert [float(sigma) for sigma in ours] == pytest.approx(simple, abs=far)


@pytest.mark.slow
def test_exports_have_a_workflow(make_config):
    """Each export has a workflow, which is removed with it."""
    config = make_config(train={"steps": 6}, save={"every": 1, "keep": 1}, sample=PREVIEWED | {"every": 9})
    run_training(config, fresh=False)
    root: Path = folder(config) / "lora"
    names = sorted(path.name for path in root.iterdir())
    assert names == ["tiny-000005.comfyui.json", "tiny-000005.safetensors", "tiny.comfyui.json", "tiny.safetensors"]
    nodes = json.loads((root / "tiny-000005.comfyui.json").read_text())
    assert by_kind(nodes)["LoraLoaderModelOnly"][0]["lora_name"] == "tiny-000005.safetensors"
    assert by_kind(nodes)["CLIPTextEncode"][0]["text"] == PREVIEWED["prompts"][0]
