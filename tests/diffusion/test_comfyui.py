"""The ComfyUI workflow beside a LoRA: whole, and equal to the preview in noise, sigmas and guidance."""

import itertools
import json
from pathlib import Path

import pytest

from zimage_train.commands.train import run_training
from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion import comfyui, comfyui_canvas, flow
from zimage_train.diffusion.request import SamplingRequest

from helpers import PREVIEWED, folder

# What ComfyUI's nodes take and give, by name: node -> (inputs in the order of their definition, with the type of a link
# or None, and output types). From nodes.py, nodes_sd3.py and nodes_model_advanced.py of ComfyUI 0.29 (4f874c5e).
NODES = {
    "UNETLoader": ({"unet_name": None, "weight_dtype": None}, ["MODEL"]),
    "CLIPLoader": ({"clip_name": None, "type": None, "device": None}, ["CLIP"]),
    "VAELoader": ({"vae_name": None}, ["VAE"]),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": None, "strength_model": None}, ["MODEL"]),
    "ModelSamplingAuraFlow": ({"model": "MODEL", "shift": None}, ["MODEL"]),
    "CLIPTextEncode": ({"text": None, "clip": "CLIP"}, ["CONDITIONING"]),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"]),
    "EmptySD3LatentImage": ({"width": None, "height": None, "batch_size": None}, ["LATENT"]),
    "KSampler": (
        {"model": "MODEL"}
        | dict.fromkeys(("seed", "steps", "cfg", "sampler_name", "scheduler"))
        | {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": None},
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


def canvas(guidance: float, extra_loras: list[tuple[str, float]]) -> tuple[dict, dict]:
    nodes = comfyui.comfyui_workflow(recipe(guidance=guidance), ModelSettings(), "x.safetensors", extra_loras)
    return nodes, comfyui_canvas.canvas_workflow(nodes)


CANVASES = pytest.mark.parametrize(("guidance", "extra_loras"), [(0.0, []), (2.0, [("y.safetensors", 0.5)])])


@CANVASES
def test_canvas_is_the_same_graph(guidance: float, extra_loras: list[tuple[str, float]]):
    """The canvas, read as ComfyUI's editor reads it, is the workflow in the API format."""
    nodes, drawn = canvas(guidance, extra_loras)
    links = {link[0]: link for link in drawn["links"]}
    read: dict[str, dict] = {}
    for node in drawn["nodes"]:
        takes, _ = NODES[node["type"]]
        # The editor takes values in the order of the definition, with one more of its own after a seed.
        values, inputs = iter(node["widgets_values"]), {}
        for name in (name for name, kind in takes.items() if kind is None):
            inputs[name] = next(values)
            if name == "seed":
                assert next(values) == "fixed"
        assert list(values) == []
        for one in node["inputs"]:
            _, source, slot, target, _, _ = links[one["link"]]
            assert target == node["id"]
            inputs[one["name"]] = [str(source), slot]
        read[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["title"]}}
    assert read == nodes


@CANVASES
def test_canvas_links_are_consistent(guidance: float, extra_loras: list[tuple[str, float]]):
    """Each link is known at both of its ends, by slot and type, and no number is used twice."""
    _, drawn = canvas(guidance, extra_loras)
    by_id = {node["id"]: node for node in drawn["nodes"]}
    assert len(by_id) == len(drawn["nodes"]) and drawn["last_node_id"] == max(by_id)
    assert [link[0] for link in drawn["links"]] == list(range(1, drawn["last_link_id"] + 1))
    for link, source, source_slot, target, target_slot, kind in drawn["links"]:
        out, into = by_id[source]["outputs"][source_slot], by_id[target]["inputs"][target_slot]
        assert link in out["links"] and into["link"] == link
        assert kind == out["type"] == into["type"]
        assert NODES[by_id[source]["type"]][1][source_slot] == kind == NODES[by_id[target]["type"]][0][into["name"]]
    assert sum(len(node["inputs"]) for node in drawn["nodes"]) == len(drawn["links"])
    assert sum(len(out["links"]) for node in drawn["nodes"] for out in node["outputs"]) == len(drawn["links"])
    assert sorted(node["order"] for node in drawn["nodes"]) == list(range(len(by_id)))
    assert all(by_id[link[1]]["order"] < by_id[link[3]]["order"] for link in drawn["links"])
    assert drawn["version"] == 0.4


@CANVASES
def test_canvas_is_laid_out(guidance: float, extra_loras: list[tuple[str, float]]):
    """No node covers another, with the title above it, and links run from left to right."""
    _, drawn = canvas(guidance, extra_loras)
    boxes = {}
    for node in drawn["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y - 30, x + width, y + height)
        rows = max(len(node["inputs"]), len(node["outputs"])) * 20 + len(node["widgets_values"]) * 24
        assert height >= rows, "the editor would make it higher"
    for (_, one), (_, other) in itertools.combinations(boxes.items(), 2):
        apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
        assert apart, (one, other)
    assert all(boxes[link[1]][2] < boxes[link[3]][0] for link in drawn["links"])


def test_extra_loras_are_chained():
    """LoRAs that previews use in addition are applied too, at their strengths."""
    nodes, _ = canvas(0.0, [("y.safetensors", 0.5), ("z.safetensors", -1.0)])
    found = by_kind(nodes)["LoraLoaderModelOnly"]
    assert [(one["lora_name"], one["strength_model"]) for one in found] == [
        ("x.safetensors", 1.0), ("y.safetensors", 0.5), ("z.safetensors", -1.0)
    ]  # fmt: skip
    applied, at = [], by_kind(nodes)["ModelSamplingAuraFlow"][0]["model"][0]
    while nodes[at]["class_type"] == "LoraLoaderModelOnly":
        applied.append(nodes[at]["inputs"]["lora_name"])
        at = nodes[at]["inputs"]["model"][0]
    assert applied == ["z.safetensors", "y.safetensors", "x.safetensors"]


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
    """Each export has both forms of the workflow of the first prompt with the trigger, which are removed with it."""
    prompts = ["a red circle", "a red zorb on a blue background"]
    config = make_config(
        train={"steps": 6}, save={"every": 1, "keep": 1}, sample=PREVIEWED | {"every": 9, "prompts": prompts}
    )
    run_training(config, fresh=False)
    root: Path = folder(config) / "lora"
    names = sorted(path.name for path in root.iterdir() if path.suffix == ".json")
    assert names == [f"tiny{step}.{kind}.json" for step in ("-000005", "") for kind in ("comfyui", "workflow")]
    nodes = json.loads((root / "tiny-000005.comfyui.json").read_text())
    assert by_kind(nodes)["LoraLoaderModelOnly"][0]["lora_name"] == "tiny-000005.safetensors"
    assert by_kind(nodes)["CLIPTextEncode"][0]["text"] == prompts[1]
    assert by_kind(nodes)["KSampler"][0]["seed"] == 43
    drawn = json.loads((root / "tiny-000005.workflow.json").read_text())
    assert drawn == comfyui_canvas.canvas_workflow(nodes)
