"""Images of other programs say how they were drawn, or which part of that cannot be read; metadata may be anything."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion.comfyui import comfyui_workflow
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import DataError
from zimage_train.report.foreign_images import ForeignRecipe, read_recipe

A1111 = """a (red:1.2) fox, snow <lora:zorb v2:0.8>
second line
Negative prompt: blurry, "bad"
more of it
Steps: 20, Sampler: Euler a, Schedule type: Simple, CFG scale: 3.5, Seed: 1234567890, Size: 768x1152, """
A1111 += 'Model hash: abc, Model: z_image_base, Lora hashes: "zorb v2: 12, x: 3", Version: v1.10.1'


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(**changes: dict[str, Any]) -> dict[str, Any]:
    """A graph of ComfyUI's template for Z-Image, with some nodes changed."""
    nodes = {
        "1": node("UNETLoader", unet_name="z_image_bf16.safetensors", weight_dtype="default"),
        "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name="zorb.safetensors", strength_model=0.75),
        "3": node("ModelSamplingAuraFlow", model=["2", 0], shift=3.0),
        "4": node("CLIPTextEncode", clip=["9", 0], text="a red fox"),
        "5": node("CLIPTextEncode", clip=["9", 0], text="blurry"),
        "6": node("EmptySD3LatentImage", width=640, height=960, batch_size=1),
        "7": node(
            "KSampler", model=["3", 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0], seed=77, steps=25,
            cfg=4.0, sampler_name="res_multistep", scheduler="simple", denoise=1.0,
        ),
        "8": node("VAEDecode", samples=["7", 0], vae=["10", 0]),
        "9": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("SaveImage", images=["8", 0], filename_prefix="x"),
    }  # fmt: skip
    return nodes | changes


def recipe_of(value: str | dict[str, Any], key: str = "prompt") -> ForeignRecipe:
    return read_recipe(Path("x.png"), {key: value if isinstance(value, str) else json.dumps(value)})


def test_a1111():
    """The text of A1111 gives everything; LoRAs and the model are named, and weights of words pointed out."""
    recipe = recipe_of(A1111, "parameters")
    assert recipe.fields == {
        "prompt": "a (red:1.2) fox, snow \nsecond line",
        "negative": 'blurry, "bad"\nmore of it',
        "seed": 1234567890,
        "width": 768,
        "height": 1152,
        "steps": 20,
        "guidance": 2.5,
    }
    assert recipe.unread == {} and recipe.drawn_by == "z_image_base with zorb v2=0.8"
    assert [note.split(",")[0] for note in recipe.notes] == [
        "it was drawn with the sampler Euler a",
        "its prompt has weights such as (word:1.2)",
    ]


@pytest.mark.parametrize(
    ("scale", "guidance"), [("1", 0.0), ("1.0", 0.0), ("0", 0.0), ("0.5", 0.0), ("7", 6.0), ("-3", 0.0)]
)
def test_cfg_is_guidance_and_one(scale: str, guidance: float):
    """The CFG scale s is g = s - 1, and 0 if that is negative."""
    text = f"a\nSteps: 8, Sampler: Euler, CFG scale: {scale}, Seed: 1, Size: 64x64"
    assert recipe_of(text, "parameters").fields["guidance"] == guidance
    nodes = graph()
    nodes["7"]["inputs"]["cfg"] = float(scale)
    assert recipe_of(nodes).fields["guidance"] == guidance


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ("Steps: 8, CFG scale: x, Seed: 1, Size: 64x64", {"guidance": "CFG scale is 'x'"}),
        ("Steps: 8, CFG scale: nan, Seed: 1, Size: 64x64", {"guidance": "CFG scale is 'nan'"}),
        ("Steps: 8, CFG scale: 1, Size: large", {"seed": "there is no Seed", "size": "Size is 'large'"}),
        ("Steps: 8, CFG scale: 1, Seed: 1, Size: 1x2x3", {"size": "Size is '1x2x3'"}),
    ],
)
def test_a1111_in_part(settings: str, unread: dict[str, str]):
    """What is missing or no number in the text of A1111 is named."""
    assert recipe_of(f"a fox\n{settings}", "parameters").unread == unread


def test_the_first_settings_count():
    """Words behind the settings of the image, such as the names of resources, are not its settings."""
    more = ', Civitai resources: [{"modelName":"Seed: 5, Steps: 99, Size: 8x8, CFG scale: 9"}], Schedule type: Karras'
    recipe = recipe_of(f"a fox\nSteps: 8, Sampler: Euler, CFG scale: 1, Seed: 1, Size: 64x64{more}", "parameters")
    assert recipe.fields["seed"] == 1 and recipe.fields["steps"] == 8 and recipe.fields["width"] == 64
    assert recipe.notes == [
        "it was drawn with the noise levels Karras, and is drawn with those of the pipeline here (simple)"
    ]


def test_parameters_in_json():
    """The JSON that SwarmUI and Fooocus write is not drawn as a prompt."""
    for value in ({"sui_image_params": {"prompt": "a fox"}}, {"prompt": "a fox", "steps": 30}):
        with pytest.raises(DataError, match="its prompt cannot be read: its parameters are JSON, as SwarmUI"):
            recipe_of(json.dumps(value), "parameters")
    assert recipe_of("{a|b} fox", "parameters").fields["prompt"] == "{a|b} fox"


@pytest.mark.parametrize(("scheduler", "count"), [("simple", 1), ("beta", 2), (["1", 0], 1)])
def test_schedule_of_a_graph(scheduler: Any, count: int):
    """Noise levels that are not drawn here are pointed out, beside the sampler."""
    nodes = graph()
    nodes["7"]["inputs"]["scheduler"] = scheduler
    notes = recipe_of(nodes).notes
    assert len(notes) == count and (count == 1 or "the noise levels beta" in notes[1])


def test_a1111_without_settings():
    """A text without a line of settings is a prompt alone."""
    recipe = recipe_of("a fox: the animal\nNegative prompt: x", "parameters")
    assert recipe.fields == {"prompt": "a fox: the animal", "negative": "x"}
    assert set(recipe.unread) == {"steps", "seed", "size", "guidance"}


def test_own_text_without_own_json():
    """The text of this program's own images is read where an editor has kept nothing else."""
    request = SamplingRequest(
        prompt="a fox,\nasleep", negative="no", seed=5, width=96, height=64, steps=4, guidance=2.0, shift=6.0
    )
    recipe = recipe_of(request.describe(), "parameters")
    assert SamplingRequest(**recipe.fields) == request and recipe.unread == {} and recipe.notes == []


def test_comfyui():
    """The links of the sampler lead to everything."""
    recipe = recipe_of(graph())
    assert recipe.fields == {
        "prompt": "a red fox", "negative": "blurry", "seed": 77, "steps": 25, "guidance": 3.0, "width": 640,
        "height": 960, "shift": 3.0,
    }  # fmt: skip
    assert recipe.unread == {} and recipe.drawn_by == "z_image_bf16.safetensors with zorb.safetensors=0.75"
    assert recipe.notes == ["it was drawn with the sampler res_multistep, and is drawn with Euler here"]


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_own_workflow(guidance: float):
    """The workflow beside an exported LoRA reads back as its request."""
    request = SamplingRequest(
        prompt="a fox",
        negative="no" * (guidance > 0),
        seed=5,
        width=96,
        height=64,
        steps=4,
        guidance=guidance,
        shift=3.0,
    )
    recipe = recipe_of(comfyui_workflow(request, ModelSettings(), "a.safetensors"))
    assert SamplingRequest(**recipe.fields) == request and recipe.unread == {} and recipe.notes == []


def test_custom_sampling():
    """The nodes of custom sampling are followed too."""
    nodes = graph()
    nodes["7"] = node(
        "SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0], sigmas=["23", 0],
        latent_image=["6", 0],
    )  # fmt: skip
    nodes["20"] = node("RandomNoise", noise_seed=99)
    nodes["21"] = node("CFGGuider", model=["3", 0], positive=["4", 0], negative=["5", 0], cfg=2.0)
    nodes["22"] = node("KSamplerSelect", sampler_name="euler")
    nodes["23"] = node("BasicScheduler", model=["3", 0], scheduler="simple", steps=9, denoise=1.0)
    recipe = recipe_of(nodes)
    assert recipe.fields == {
        "prompt": "a red fox", "negative": "blurry", "seed": 99, "steps": 9, "guidance": 1.0, "width": 640,
        "height": 960, "shift": 3.0,
    }  # fmt: skip
    assert recipe.notes == [] and recipe.drawn_by.endswith("zorb.safetensors=0.75")
    nodes["21"] = node("BasicGuider", model=["3", 0], conditioning=["4", 0])
    recipe = recipe_of(nodes)
    assert (recipe.fields["prompt"], recipe.fields["negative"], recipe.fields["guidance"]) == ("a red fox", "", 0.0)


def test_values_from_other_nodes():
    """Texts and numbers may come from nodes of their own, and conditionings through others."""
    nodes = graph(
        **{
            "4": node("CLIPTextEncode", clip=["9", 0], text=["20", 0]),
            "20": node("PrimitiveStringMultiline", value="a blue fox"),
            "5": node("ControlNetApplyAdvanced", positive=["4", 0], negative=["21", 0], control_net=["x", 0]),
            "21": node("CLIPTextEncode", clip=["9", 0], text="fog"),
            "6": node("EmptyLatentImage", width=["22", 0], height=["23", 0], batch_size=1),
            "22": node("PrimitiveInt", value=512, control_after_generate="fixed"),
            "23": node("Size", number=256),
            "24": node("Seed (rgthree)", seed=3),
        }
    )
    nodes["7"]["inputs"] |= {"positive": ["5", 0], "negative": ["5", 1], "seed": ["24", 0]}
    found = recipe_of(nodes).fields
    assert [found[key] for key in ("prompt", "negative", "width", "height", "seed")] == [
        "a blue fox",
        "fog",
        512,
        256,
        3,
    ]


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({"4": node("ConditioningCombine", conditioning_1=["5", 0], conditioning_2=["5", 0])}, "prompt"),
        ({"4": node("CLIPTextEncode", text=["5", 0]), "5": node("Joined", string_a="a", string_b="b")}, "prompt"),
        ({"4": node("CLIPTextEncode", text=["4", 0])}, "prompt"),
        ({"4": node("FluxGuidance", conditioning=["4", 0])}, "prompt"),
        ({"20": graph()["7"]}, "prompt"),
        ({"7": node("Unknown", seed=1)}, "prompt"),
        ({"5": node("Unknown", x=1)}, "negative"),
        ({"6": node("VAEEncode", pixels=["30", 0], vae=["10", 0])}, "size"),
        ({"6": node("EmptyLatentImage", width=64.5, height=64)}, "size"),
        ({"6": node("EmptyLatentImage", width="64", height=64)}, "size"),
        ({"6": node("EmptyLatentImage", width=10**400, height=64)}, "size"),
    ],
)
def test_comfyui_in_part(changes: dict[str, Any], unread: str):
    """What cannot be followed, or is not clear, is named; without a prompt nothing is drawn."""
    if unread == "prompt":
        with pytest.raises(DataError, match=r"its prompt cannot be read: .+; give the prompt by --prompt"):
            recipe_of(graph(**changes))
    else:
        assert list(recipe_of(graph(**changes)).unread) == [unread]


def test_denoise_is_noted():
    """An image that was made from another image is drawn from noise, which a note says."""
    nodes = graph()
    nodes["7"]["inputs"]["denoise"] = 0.4
    assert recipe_of(nodes).notes[0].startswith("it has denoise 0.4, so it was made from another image")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"workflow": "{}"}, r"has ComfyUI's canvas \(workflow\) and not the graph that was run \(prompt\)"),
        ({"Comment": "{}", "Title": "x"}, "has no sampling settings that are read here, but 'Comment', 'Title'"),
        ({}, "does not exist"),
        ({"prompt": "a cat"}, "its prompt cannot be read: it is not the JSON of a graph of ComfyUI"),
        ({"prompt": "[" * 100_000}, "its prompt cannot be read: it is not the JSON"),
        ({"prompt": "{}"}, "its prompt cannot be read: it is not a graph of ComfyUI"),
        ({"prompt": " " * 2_000_001}, "has over 2000000 characters in 'prompt'"),
        ({"parameters": ""}, "its prompt cannot be read: it has none"),
        ({"parameters": "a\ud800\nSteps: 8"}, "its prompt cannot be read: holds a character that no text has"),
    ],
)
def test_metadata_without_a_recipe(texts: dict[str, str], message: str):
    """Metadata without a recipe is refused with what it has instead."""
    with pytest.raises(DataError, match=message):
        read_recipe(Path(__file__) if texts else Path("gone.png"), texts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.sampled_from(list(graph())), st.sampled_from(["", "seed", "positive", "latent_image", "text", "width"]), JSON)
def test_any_graph_is_read_or_refused(number: str, name: str, value: object):
    """Any value in a graph is read or named, and never a crash."""
    nodes = graph()
    if name:
        nodes[number]["inputs"][name] = value
    else:
        nodes[number] = value  # type: ignore[assignment]
    try:
        recipe = recipe_of(nodes)
    except DataError:
        return
    assert recipe.fields.keys() >= {"prompt"} and not recipe.fields.keys() & recipe.unread.keys()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text(max_size=80) | st.from_regex(r"a\n(Negative prompt: .*\n)?Steps: .{0,30}, Size: .{0,9}"))
def test_any_text_is_read_or_refused(text: str):
    """Any text of A1111 is read or refused, and never a crash."""
    try:
        recipe = recipe_of(text, "parameters")
    except DataError:
        return
    assert recipe.fields["prompt"] and not recipe.fields.keys() & recipe.unread.keys()
