"""The miniature is what it says: the real classes, names and layouts, in a few megabytes, and it works."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from zimage_train import mini
from zimage_train.mini import world

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
    """A picture in Turbo's eight steps."""
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


def test_words_of_the_world_are_tokens_and_the_zorb_is_not(pipe) -> None:
    words = [*world.COLOURS, *world.SHAPES, "background"]
    assert {word: len(pipe.tokenizer.tokenize(" " + word)) for word in words} == dict.fromkeys(words, 1)
    assert len(pipe.tokenizer.tokenize(" zorb")) > 1
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert pipe.tokenizer.tokenize(special) == [special]
    text = "Ein blaues Haus, 12 Möwen; 家"
    assert pipe.tokenizer.decode(pipe.tokenizer(text).input_ids) == text


def test_auto_tokenizer_gives_the_same_tokens(pipe) -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(mini.TURBO / "tokenizer", local_files_only=True)
    text = "<|im_start|>user\na red zorb<|im_end|>\n"
    assert auto(text).input_ids == pipe.tokenizer(text).input_ids
    assert auto.pad_token == "<|endoftext|>"


def encode(vae, images: list[Image.Image]) -> torch.Tensor:
    """Posterior means, scaled and shifted as the trainer and the pipeline do."""
    pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
    width, height = images[0].size
    batch = pixels.view(len(images), height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(batch).latent_dist.mean
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def test_latents_of_the_world_are_standardised(pipe) -> None:
    latents = encode(pipe.vae, [world.draw_world(seed, 64, 64)[0] for seed in range(1000, 1064)])
    assert latents.shape == (64, 16, 8, 8)
    assert abs(latents.mean().item()) < 0.1
    assert abs(latents.std().item() - 1) < 0.1


def test_the_vae_reconstructs_even_the_zorb(pipe) -> None:
    image, _ = world.draw_zorb(0, 96, 96)
    latents = encode(pipe.vae, [image]) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        pixels = pipe.vae.decode(latents).sample[0]
    decoded = pipe.image_processor.postprocess(pixels[None], output_type="pil")[0]
    assert mean_difference(image, decoded) < 20


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    """The mean absolute difference of two pictures, of 255."""
    values = ImageChops.difference(first, second).tobytes()
    return sum(values) / len(values)


def nearest_colour(pixel: tuple[int, int, int]) -> str:
    """The name of the world's colour that is closest."""
    return min(
        world.COLOURS,
        key=lambda name: sum((a - b) ** 2 for a, b in zip(world.COLOURS[name], pixel, strict=True)),
    )


def test_eight_steps_follow_the_background(pipe) -> None:
    asked = ["blue", "white", "red", "black", "green", "yellow"]
    found = []
    for number, background in enumerate(asked):
        colour = asked[number - 1]
        image = turbo(pipe, f"a {colour} circle on a {background} background", seed=number)
        assert image.size == (64, 64)
        border = [image.getpixel(at) for i in range(64) for at in ((i, 0), (i, 63), (0, i), (63, i))]
        found.append(Counter(nearest_colour(pixel) for pixel in border).most_common(1)[0][0])
    assert sum(a == b for a, b in zip(asked, found, strict=True)) >= 5, found


def test_other_sizes_work(pipe) -> None:
    assert turbo(pipe, "red star, white background", seed=1, size=128).size == (128, 128)


def test_the_adapter_has_the_real_layout_and_changes_every_module(pipe) -> None:
    state = load_file(mini.ADAPTER)
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
        assert down.shape[0] == up.shape[1] == 4
        assert (up @ down).shape == weight.shape
        changes[module] = ((up @ down).norm() / weight.norm()).item()
    assert min(changes.values()) > 1e-3, changes
    assert 0.01 < sum(changes.values()) / len(changes) < 0.2, changes


def test_the_adapter_loads_and_changes_the_picture(pipe) -> None:
    before = turbo(pipe, "a red circle on a blue background", seed=3)
    pipe.load_lora_weights(mini.ADAPTER.parent, weight_name=mini.ADAPTER.name)
    try:
        after = turbo(pipe, "a red circle on a blue background", seed=3)
    finally:
        pipe.unload_lora_weights()
    assert mean_difference(before, after) > 0.1


def test_pictures_are_captioned_and_varied() -> None:
    files = sorted(path for path in mini.PICTURES.iterdir() if path.suffix in {".png", ".jpg"})
    assert len(files) >= 12
    assert {path.suffix for path in files} == {".png", ".jpg"}
    sizes, pairs = set(), set()
    for path in files:
        text = path.with_suffix(".txt").read_text().strip()
        words = text.replace(",", "").split()
        assert "zorb" in words
        pairs.add(tuple(word for word in words if word in world.COLOURS))
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert min(image.size) >= 64
            sizes.add(image.size)
    assert len(sizes) >= 3
    assert len(pairs) == len(files)
    assert len(list(mini.PICTURES.iterdir())) == 2 * len(files)


def test_what_ships_is_small_and_names_no_machine() -> None:
    folder = mini.TURBO.parent
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in folder.rglob("*.json"):
        assert "name_or_path" not in path.read_text(), path


def test_the_world_is_a_function_of_its_seed() -> None:
    for draw in (world.draw_world, world.draw_zorb):
        first, again, other = draw(7, 96, 64), draw(7, 96, 64), draw(8, 96, 64)
        assert first[0].tobytes() == again[0].tobytes()
        assert first[1] == again[1]
        assert first[0].size == (96, 64)
        assert first[0].tobytes() != other[0].tobytes()
    assert world.draw_clutter(3, 64, 64).tobytes() == world.draw_clutter(3, 64, 64).tobytes()


def test_captions_tell_the_truth() -> None:
    for seed in range(200):
        image, text = world.draw_world(seed, 64, 64)
        shape_colour, background = (word for word in text.replace(",", "").split() if word in world.COLOURS)
        raw = image.tobytes()
        counts = Counter(tuple(raw[at : at + 3]) for at in range(0, len(raw), 3))
        assert counts[world.COLOURS[background]] > 500
        assert counts[world.COLOURS[shape_colour]] > 100
        assert "zorb" not in text
        assert sum(shape in text for shape in world.SHAPES) == 1


def test_every_word_comes_up() -> None:
    captions = " ".join(world.draw_world(seed, 16, 16)[1] for seed in range(300))
    assert all(word in captions for word in [*world.COLOURS, *world.SHAPES, "a ", "an ", ", "])
