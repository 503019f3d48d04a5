"""The miniature is what it says: the real classes, names and layouts, in a few megabytes, and it works."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from zimage_train import mini

from miniature import scores, world

MODULES = [
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "adaLN_modulation.0",
]


@pytest.fixture(scope="module")
def pipe():
    """The stock pipeline from the shipped folder, offline, in float32."""
    diffusers = pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        loaded = diffusers.ZImagePipeline.from_pretrained(mini.TURBO, local_files_only=True)
    loaded.to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def turbo(pipe, prompt: str, seed: int, size: int = 64) -> Image.Image:
    """An image in Turbo's eight steps."""
    return pipe(
        prompt=prompt,
        width=size,
        height=size,
        sigmas=[1 - step / 8 for step in range(8)],
        num_inference_steps=8,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def test_the_paths_cost_no_import() -> None:
    code = "import sys, zimage_train.mini; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    root = Path(mini.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_classes_are_the_real_ones(pipe) -> None:
    names = {name: type(part).__name__ for name, part in pipe.components.items()}
    assert names == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    config = json.loads((mini.TURBO / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert pipe.vae_scale_factor == 8
    assert pipe.vae.config.latent_channels == 16
    assert pipe.scheduler.config.shift == 3.0
    assert not pipe.scheduler.config.use_dynamic_shifting


@pytest.mark.parametrize(
    ("part", "index", "first_key"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors.index.json", "layers.0.attention.to_q.weight"),
        ("text_encoder", "model.safetensors.index.json", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_weights_come_in_two_shards(part: str, index: str, first_key: str) -> None:
    weight_map = json.loads((mini.TURBO / part / index).read_text())["weight_map"]
    files = set(weight_map.values())
    assert len(files) == 2
    assert first_key in weight_map
    held = {name: tensor for file in files for name, tensor in load_file(mini.TURBO / part / file).items()}
    assert held.keys() == weight_map.keys()
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}


def test_the_template_text_is_exact(pipe) -> None:
    def render(**options: bool) -> str:
        message = [{"role": "user", "content": "a red circle"}]
        return pipe.tokenizer.apply_chat_template(message, tokenize=False, **options)

    asked = "<|im_start|>user\na red circle<|im_end|>\n"
    assert render() == asked
    assert render(add_generation_prompt=True, enable_thinking=True) == asked + "<|im_start|>assistant\n"
    assert (
        render(add_generation_prompt=True, enable_thinking=False)
        == asked + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_tokens_of_the_world(pipe) -> None:
    """Words of the world are single tokens, and "zorb" is not."""
    words = [*world.COLOURS, *world.SHAPES, "background"]
    assert {word: len(pipe.tokenizer.tokenize(" " + word)) for word in words} == dict.fromkeys(words, 1)
    assert len(pipe.tokenizer.tokenize(" zorb")) > 1
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert pipe.tokenizer.tokenize(special) == [special]
    text = "Ein blaues Haus, 12 Möwen; 家"
    assert pipe.tokenizer.decode(pipe.tokenizer(text).input_ids) == text


def test_auto_tokenizer_is_equal(pipe) -> None:
    """`AutoTokenizer` gives the same tokens."""
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(mini.TURBO / "tokenizer", local_files_only=True)
    text = "<|im_start|>user\na red zorb<|im_end|>\n"
    assert auto(text).input_ids == pipe.tokenizer(text).input_ids
    assert auto.pad_token == "<|endoftext|>"


def encode(vae, images: list[world.Pixels]) -> torch.Tensor:
    """Posterior means, scaled and shifted as the trainer and the pipeline do."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(batch).latent_dist.mean
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def test_latents_are_standardised(pipe) -> None:
    """Latents of the world are standardised."""
    latents = encode(pipe.vae, [world.draw_world(seed, 64, 64)[0] for seed in range(1000, 1064)])
    assert latents.shape == (64, 16, 8, 8)
    assert abs(latents.mean().item()) < 0.1
    assert abs(latents.std().item() - 1) < 0.1


@pytest.mark.parametrize("scene", [world.zorb_scene(0), world.world_scene(0)], ids=["zorb", "world"])
def test_vae_keeps_shape_and_grain(pipe, scene: world.Scene) -> None:
    """The VAE keeps the shape and the grain, even of the zorb."""
    image = world.draw(scene, 96, 96)
    latents = encode(pipe.vae, [image]) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        pixels = pipe.vae.decode(latents).sample[0]
    decoded = np.asarray(pipe.image_processor.postprocess(pixels[None], output_type="pil")[0])
    assert np.abs(decoded.astype(int) - image).mean() < 8
    before, after = scores.look(image), scores.look(decoded)
    assert scores.fidelity(after, scene) == 1
    assert after.sharpness > 0.85 * before.sharpness


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    """The mean absolute difference of two images, of 255."""
    values = ImageChops.difference(first, second).tobytes()
    return sum(values) / len(values)


@pytest.mark.slow
def test_turbo_draws_in_eight_steps(pipe) -> None:
    """Turbo draws what is asked for in eight steps.

    Drawn with the stock pipeline here; the scores of the manifest were measured when the miniature was made.
    """
    scenes = [shown for seed in range(2_000_000, 2_000_040) if (shown := world.world_scene(seed)).called is None][:12]
    seen = [
        scores.look(np.asarray(turbo(pipe, world.caption(shown, 64, 64), seed=number)))
        for number, shown in enumerate(scenes)
    ]
    assert np.mean([scores.fidelity(found, asked) for found, asked in zip(seen, scenes, strict=True)]) > 0.8
    assert np.mean([found.sharpness for found in seen]) > 0.6


def test_base_is_worse_in_eight_steps() -> None:
    """In eight steps, Base is clearly worse than Turbo.

    The laboratory depends on this: otherwise training could take nothing from Turbo.
    """
    measured = manifest()["scores"]
    base, own = (measured[f"{name}, 8 steps, g 0, shift 3"]["quality"] for name in ("base", "turbo"))
    assert own > base + 0.1
    assert measured["base, 30 steps, g 1, shift 6"]["fidelity"] > 0.9


def manifest() -> dict:
    """What `scripts/make_miniature.py` says of what it made."""
    return json.loads((mini.HERE / "manifest.json").read_text())


def test_manifest_names_every_weight_file() -> None:
    """The manifest names every file of weights with its digest."""
    digests = manifest()["sha256"]
    for name, digest in digests.items():
        assert hashlib.sha256((mini.HERE / name).read_bytes()).hexdigest() == digest, name
    assert {path.relative_to(mini.HERE).as_posix() for path in mini.HERE.rglob("*.safetensors")} <= digests.keys()
    assert manifest()["made_with"]["effort"] == 1


def test_other_sizes_work(pipe) -> None:
    assert turbo(pipe, "red star, white background", seed=1, size=128).size == (128, 128)


@pytest.mark.parametrize(("file", "rank"), [(mini.ADAPTER_V1, 8), (mini.ADAPTER_V2, 16), (mini.DISTILLPATCH, 16)])
def test_lora_layout_and_modules(pipe, file: Path, rank: int) -> None:
    """A LoRA has the real layout, and changes every module."""
    state = load_file(file)
    layers = len(pipe.transformer.layers)
    expected = {
        f"diffusion_model.layers.{layer}.{module}.lora_{side}.weight"
        for layer in range(layers)
        for module in MODULES
        for side in "AB"
    }
    assert state.keys() == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    changes = {}
    for key in sorted(name for name in expected if ".lora_A." in name):
        down, up = state[key].float(), state[key.replace("lora_A", "lora_B")].float()
        module = re.sub(r"^diffusion_model\.|\.lora_A\.weight$", "", key)
        weight = pipe.transformer.get_submodule(module).weight
        assert down.shape[0] == up.shape[1] == rank
        assert (up @ down).shape == weight.shape
        changes[module] = ((up @ down).norm() / weight.norm()).item()
    assert min(changes.values()) > 1e-3, changes
    assert 0.01 < sum(changes.values()) / len(changes) < 0.2, changes


def test_adapter_changes_the_image(pipe) -> None:
    """The adapter is loaded, and changes the image."""
    before = turbo(pipe, "a red circle on a blue background", seed=3)
    pipe.load_lora_weights(mini.ADAPTER_V1.parent, weight_name=mini.ADAPTER_V1.name)
    try:
        after = turbo(pipe, "a red circle on a blue background", seed=3)
    finally:
        pipe.unload_lora_weights()
    assert mean_difference(before, after) > 0.1


@pytest.mark.parametrize(("folder", "word"), [(mini.IMAGES, world.ZORB), (mini.STYLE, world.ETCHED)])
def test_images_are_captioned_and_varied(folder: Path, word: str) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix in {".png", ".jpg"})
    assert len(files) >= 12
    assert {path.suffix for path in files} == {".png", ".jpg"}
    sizes, pairs = set(), set()
    for path in files:
        text = path.with_suffix(".txt").read_text().strip()
        words = text.replace(",", "").split()
        assert word in words
        pairs.add(tuple(word for word in words if word in world.COLOURS))
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert min(image.size) >= 64
            sizes.add(image.size)
    assert len(sizes) >= 3
    assert len(pairs) == len(files)
    assert len(list(folder.iterdir())) == 2 * len(files)


def test_shipped_files_are_small() -> None:
    """The shipped files are small, and name no machine."""
    folder = mini.HERE
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    for path in folder.rglob("*.json"):
        assert "name_or_path" not in path.read_text(), path


def test_world_depends_on_its_seed() -> None:
    """The world is a function of its seed."""
    for draw in (world.draw_world, world.draw_zorb, world.draw_etched):
        first, again, other = draw(7, 96, 64), draw(7, 96, 64), draw(8, 96, 64)
        assert np.array_equal(first[0], again[0])
        assert first[1] == again[1]
        assert first[0].shape == (64, 96, 3) and first[0].dtype == np.uint8
        assert not np.array_equal(first[0], other[0])
    assert np.array_equal(world.draw_clutter(3, 64, 64), world.draw_clutter(3, 64, 64))


@pytest.mark.parametrize("wording", range(world.WORDINGS))
def test_captions_tell_the_truth(wording: int) -> None:
    for seed in range(100):
        shown = dataclasses.replace(world.world_scene(seed), wording=wording, detailed=True)
        image, text = world.drawn(shown, 128, 96)
        assert [word for word in re.findall(r"\w+", text) if word in world.COLOURS].count(shown.ground) == 1
        ground = np.abs(image.astype(int) - world.COLOURS[shown.ground]).max(2) < 4 * world.GRAIN
        rows, columns = np.nonzero(~ground & (np.abs(image - np.array(world.COLOURS[shown.colour])).max(2) < 72))
        if len(rows) < 60:
            continue  # colours too close to be told apart by a threshold
        row, column = (1 + (off > 8) - (off < -8) for off in (rows.mean() - 48, columns.mean() - 64))
        place = world.PLACES[row][column]
        assert re.search(rf"(the|,) {place}\b", text), (text, place)
        assert world.ZORB not in text and world.ETCHED not in text
        assert (shown.called or shown.shape) in text


def test_scores_recognize_every_image() -> None:
    """Scores recognize every image of the world."""
    for scene_of in (world.world_scene, world.zorb_scene):
        for seed in range(100):
            asked = scene_of(seed)
            seen = scores.look(world.draw(asked, 64, 64))
            assert scores.fidelity(seen, asked) == 1, asked
            assert scores.has_concept(seen, world.ZORB) == (asked.shape == world.ZORB)


def test_scores_see_what_is_wrong() -> None:
    asked = dataclasses.replace(world.world_scene(3), shape="square", colour="red", ground="white", size="large")
    for wrong in ({"shape": "circle"}, {"colour": "blue"}, {"ground": "green"}, {"etched": True}):
        seen = scores.look(world.draw(dataclasses.replace(asked, **wrong), 64, 64))
        assert scores.fidelity(seen, asked) == pytest.approx(2 / 3), wrong
    empty = np.full((64, 64, 3), world.COLOURS["white"], np.uint8)
    assert scores.fidelity(scores.look(empty), asked) == pytest.approx(1 / 3)
    assert scores.look(empty).sharpness == 0


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 0.25), (1.0, 1.0), (1.5, 1 / 2.25)])
def test_sharpness_is_grain_energy(monkeypatch, share: float, wanted: float) -> None:
    """Sharpness is the energy of the grain."""
    monkeypatch.setattr(world, "COLOURS", {"red": (128, 128, 128), "blue": (100, 100, 160)})
    monkeypatch.setattr(scores, "PALETTE", np.array(list(world.COLOURS.values()), np.float32))
    flat = np.full((256, 256, 3), 128.0) + share * world.grain(5, 256, 256)
    found = scores.sharpness(flat.round().astype(np.uint8), np.zeros((256, 256), bool))
    assert found == pytest.approx(wanted, rel=0.1)


def test_made_up_words_have_known_letters(pipe) -> None:
    """Made-up words use letters that the encoder knows."""
    words = {shown.called for seed in range(3000) if (shown := world.world_scene(seed)).called}
    assert len(words) > 200 and world.ZORB not in words
    pieces = {piece for word in words for piece in pipe.tokenizer.tokenize(f" {word}")}
    assert set(pipe.tokenizer.tokenize(f" {world.ZORB}")) <= pieces


def test_every_word_comes_up() -> None:
    captions = " ".join(world.draw_world(seed, 128, 128)[1] for seed in range(600))
    assert all(word in captions for word in [*world.COLOURS, *world.SHAPES, *world.RADII, "a ", "an ", ", "])
