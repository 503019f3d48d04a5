"""Text encoder and VAE as single files, such as ComfyUI's, are the same models as in a diffusers folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from zimage_train import mini
from zimage_train.commands import download
from zimage_train.config.schema import ModelSettings
from zimage_train.errors import WeightsError
from zimage_train.io.digests import DigestCache
from zimage_train.models import components, locate, single_files, text_encoder, vae
from zimage_train.models.components import ExtrasPaths, ModelPaths
from zimage_train.training.context import digest_model

from checkpoints import STYLES, TRANSFORMER, comfyui, folder_tensors, ldm_vae, scaled, write

CPU = torch.device("cpu")
PROMPTS = ["", "a red zorb on a blue background", "x" * 40]


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """The miniature's text encoder as ComfyUI stores it."""
    return write(tmp_path / "qwen_3_4b.safetensors", folder_tensors(mini.TURBO / "text_encoder"))


@pytest.fixture
def vae_file(tmp_path: Path) -> Path:
    """The miniature's VAE under its original names."""
    return write(tmp_path / "ae.safetensors", ldm_vae(folder_tensors(mini.TURBO / "vae")))


def extras(**parts: Path) -> ExtrasPaths:
    folder = ExtrasPaths.in_folder(mini.TURBO)
    return ExtrasPaths(
        **({"text_encoder": folder.text_encoder, "tokenizer": folder.tokenizer, "vae": folder.vae} | parts)
    )


def encode(path: Path) -> dict[str, Tensor]:
    return dict(text_encoder.load_text_encoder(extras(text_encoder=path), CPU, torch.float32).encode_all(PROMPTS))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "text_encoders.qwen3_4b.transformer."])
def test_text_encoder_in_one_file(encoder_file: Path, prefix: str):
    """A single file gives the same embeddings, with a config that follows from its tensors."""
    write(encoder_file, folder_tensors(mini.TURBO / "text_encoder"), prefix)
    assert same(encode(encoder_file), encode(mini.TURBO / "text_encoder"))
    config = components.read_text_encoder(encoder_file)[0]
    published = components.read_text_encoder(mini.TURBO / "text_encoder")[0]
    assert {key: published.get(key) for key in config if key != "rope_theta"} == {
        key: value for key, value in config.items() if key != "rope_theta"
    }
    assert config["rope_theta"] == published["rope_parameters"]["rope_theta"]


def test_published_text_encoder_config():
    """The config of a Qwen3-4B follows from the shapes of its tensors."""
    vocabulary, width, inner, layers, heads, kv_heads, head = 151936, 2560, 9728, 36, 32, 8, 128
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, width), "norm.weight": (width,)}
    for index in range(layers):
        shapes |= {
            f"layers.{index}.self_attn.q_proj.weight": (heads * head, width),
            f"layers.{index}.self_attn.k_proj.weight": (kv_heads * head, width),
            f"layers.{index}.self_attn.q_norm.weight": (head,),
            f"layers.{index}.mlp.gate_proj.weight": (inner, width),
        }
    config = single_files.qwen3_config(Path("q.safetensors"), shapes)
    assert config == {
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
    }
    cut = {name: shape for name, shape in shapes.items() if not name.startswith("layers.35.")}
    with pytest.raises(WeightsError, match="has 35 layers, and the Qwen3 of this width has 36"):
        single_files.qwen3_config(Path("q.safetensors"), cut)


@pytest.mark.parametrize("style", STYLES)
def test_scaled_text_encoders(tmp_path: Path, style: str):
    """A text encoder in fp8 gives the embeddings of its true weights, which are numbers times scales."""
    stored, exact, metadata = scaled(folder_tensors(mini.TURBO / "text_encoder"), style)
    path = write(tmp_path / "q.safetensors", stored, "", metadata)
    true = write(tmp_path / "true.safetensors", {name: tensor.float() for name, tensor in exact.items()})
    for prompt, embeds in encode(path).items():
        assert torch.allclose(embeds, encode(true)[prompt], rtol=1e-4, atol=1e-4)


def test_embeddings_in_plain_fp8(tmp_path: Path):
    """The table of embeddings may be plain fp8 beside scaled layers, since it is no linear layer."""
    tensors = folder_tensors(mini.TURBO / "text_encoder")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    stored, _, _ = scaled(tensors, "new")
    path = write(tmp_path / "q.safetensors", stored)
    true = write(tmp_path / "true.safetensors", stored | {name: tensors[name].float()})
    assert same(encode(path), encode(true))


@pytest.mark.parametrize("names", ["ldm", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_vae_in_one_file(vae_file: Path, names: str, prefix: str):
    """A single file is the same VAE, under the original names or those of diffusers, alone or in a checkpoint."""
    tensors = folder_tensors(mini.TURBO / "vae")
    write(vae_file, ldm_vae(tensors) if names == "ldm" else tensors, prefix)
    ours, theirs = (vae.load_vae(path, CPU, torch.float32) for path in (vae_file, mini.TURBO / "vae"))
    assert same(ours.state_dict(), theirs.state_dict())
    ours_config, theirs_config = dict(ours.config), dict(theirs.config)
    assert {key: ours_config[key] for key in theirs_config} == theirs_config
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    assert torch.equal(vae.encode_images(ours, pixels), vae.encode_images(theirs, pixels))


def test_published_vae_file(tmp_path: Path):
    """A file with the sizes of ae.safetensors gets the config of the published VAE, and all its tensors."""
    with torch.device("meta"):
        published = AutoencoderKL.from_config(single_files.PUBLISHED_VAE)
    assert sum(parameter.numel() for parameter in published.parameters()) == 83_819_683
    tensors = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in published.named_parameters()}
    path = write(tmp_path / "ae.safetensors", ldm_vae(tensors))
    loaded = vae.load_vae(path, CPU, torch.bfloat16)
    assert (loaded.config["scaling_factor"], loaded.config["shift_factor"]) == (0.3611, 0.1159)


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vae", lambda t: {"x": torch.ones(2)}, "is no AutoencoderKL; give the ae.safetensors of Z-Image"),
        ("vae", lambda t: t | {"decoder.conv_in.weight": torch.ones(64, 4, 3, 3)}, "is a VAE with 4 channels"),
        ("vae", lambda t: t | {"encoder.down.0.block.0.conv1.weight": torch.ones(())}, "is no AutoencoderKL"),
        ("vae", lambda t: without(t, "encoder.mid.attn_1.q.weight"), "tensors of AutoencoderKL are missing"),
        ("vae", lambda t: without(t, "encoder.conv_out.bias"), "encoder.conv_out.bias"),
        ("text_encoder", lambda t: {"x": torch.ones(2)}, "is no Qwen3: it has no embed_tokens.weight"),
        (
            "text_encoder",
            lambda t: without(t, "model.layers.0.self_attn.q_norm.weight"),
            "it has no layers.0.self_attn.q",
        ),
        ("text_encoder", lambda t: without(t, "model.layers.1.mlp.up_proj.weight"), "1 tensors of Qwen3 are missing"),
        (
            "text_encoder",
            lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(0)},
            "has no layers.0.self_attn.q_norm.weight of 1 dimensions",
        ),
        (
            "text_encoder",
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(4)},
            "x.safetensors: 1 tensors are not of Qwen3: layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_wrong_single_files_are_named(tmp_path: Path, part: str, change: Any, said: str):
    """A single file of another model, or a part of one, is refused in a line of the parts that it names."""
    tensors = folder_tensors(mini.TURBO / part)
    path = write(tmp_path / "x.safetensors", change(ldm_vae(tensors) if part == "vae" else tensors))
    with pytest.raises(WeightsError) as refused:
        if part == "vae":
            vae.load_vae(path, CPU, torch.float32)
        else:
            components.read_text_encoder(path)
    assert said in str(refused.value) and refused.value.exit_code == 4


def test_unused_tensors_may_be_anything(tmp_path: Path):
    """A head in another precision, and what old exports hold beside the weights, change nothing."""
    tensors, _, _ = scaled(folder_tensors(mini.TURBO / "text_encoder"), "old")
    true = write(tmp_path / "true.safetensors", tensors)
    head = {"lm_head.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "lm_head.zero_point": torch.ones(2).int()}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    path = write(tmp_path / "q.safetensors", tensors | head | frequencies)
    assert same(encode(path), encode(true))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_one_of_several_files_is_named(part: str):
    """A file that by its name holds a part of the weights is not taken for all of them."""
    path = next((mini.TURBO / part).glob("*-00001-of-00002.safetensors"))
    with pytest.raises(WeightsError, match="is one of 2 files that hold the weights together; give the folder"):
        locate.transformer_tensors(path) if part == "transformer" else components.read_text_encoder(path)


def test_json_is_named():
    """The index of a folder, or any other JSON, is not called a damaged file."""
    for name in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors.index.json"):
        with pytest.raises(WeightsError, match=r"is JSON, not weights; give the \.safetensors itself, or the folder"):
            locate.transformer_tensors(mini.TURBO / name)


def test_configs_of_other_parts_are_named():
    """The folder of one part, given for another, is named by what its config says."""
    with pytest.raises(WeightsError, match="is AutoencoderKL, not a Qwen3"):
        components.read_text_encoder(mini.TURBO / "vae")
    with pytest.raises(WeightsError, match="is qwen3; Z-Image needs an AutoencoderKL"):
        components.read_vae(mini.TURBO / "text_encoder")
    with pytest.raises(WeightsError, match="is ZImageTransformer2DModel; Z-Image needs"):
        components.read_vae(mini.TURBO / "transformer")


def test_one_checkpoint_for_all_parts(tmp_path: Path):
    """A checkpoint that holds all three parts can be given for each of them."""
    parts = {
        "model.diffusion_model.": scaled(comfyui(folder_tensors(TRANSFORMER)), "old")[0],
        "text_encoders.qwen3_4b.transformer.": folder_tensors(mini.TURBO / "text_encoder"),
        "vae.": ldm_vae(folder_tensors(mini.TURBO / "vae")),
    }
    tensors: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        tensors |= {prefix + name: tensor for name, tensor in part.items()}
    path = write(tmp_path / "all.safetensors", tensors)
    assert locate.transformer_tensors(path)[0] == locate.transformer_tensors(TRANSFORMER)[0]
    assert same(encode(path), encode(mini.TURBO / "text_encoder"))
    loaded, expected = (vae.load_vae(file, CPU, torch.float32) for file in (path, mini.TURBO / "vae"))
    assert same(loaded.state_dict(), expected.state_dict())


# Where they come from


def located(fetch=locate.cached_only, **settings: str) -> ModelPaths:
    return locate.locate(ModelSettings.model_validate({"adapter": None} | settings), fetch)


def test_settings_override_extras(tmp_path: Path, encoder_file: Path, vae_file: Path):
    """`model.text_encoder`, `model.tokenizer` and `model.vae` come before the pipeline, each for its own part."""
    whole, folder = str(mini.TURBO), ExtrasPaths.in_folder(mini.TURBO)
    assert located(path=whole, vae=str(vae_file)).extras == extras(vae=vae_file)
    assert located(path=whole, text_encoder=str(encoder_file)).extras == extras(text_encoder=encoder_file)
    base = ExtrasPaths.in_folder(mini.BASE)
    assert located(path=whole, tokenizer=str(mini.BASE)).extras == extras(tokenizer=base.tokenizer)
    for name in (str(mini.BASE), str(base.vae)):
        assert located(path=whole, vae=name).extras == extras(vae=base.vae)
    parts = {"text_encoder": str(encoder_file), "vae": str(vae_file), "tokenizer": str(folder.tokenizer)}
    shutil.copytree(mini.TURBO / "transformer", tmp_path / "transformer")
    assert located(path=str(tmp_path / "transformer"), **parts).extras == ExtrasPaths(
        encoder_file, folder.tokenizer, vae_file
    )


def test_only_missing_parts_are_asked_for(encoder_file: Path, vae_file: Path, tmp_path: Path):
    """With two single files only the tokenizer is asked for on the hub; a part on the hub, by its own patterns."""
    asked: list[tuple[str, list[str]]] = []

    def fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((repository, patterns))
        return mini.TURBO

    transformer = str(mini.TURBO / "transformer")
    files = {"text_encoder": str(encoder_file), "vae": str(vae_file)}
    found = located(fetch, path=transformer, **files)
    assert found.extras == extras(**{part: Path(file) for part, file in files.items()})
    assert asked == [("Tongyi-MAI/Z-Image-Turbo", ["tokenizer/*"])]
    asked.clear()
    located(fetch, path=transformer, **files, tokenizer="org/qwen")
    assert asked == [("org/qwen", locate.PART_PATTERNS["tokenizer"])]
    settings = ModelSettings.model_validate({"path": transformer, "adapter": None} | files)
    assert download.required_files(settings, None) == {("Tongyi-MAI/Z-Image-Turbo", None): ["tokenizer/*"]}
    asked.clear()
    repository = {"text_encoder": "org/one/qwen.safetensors", "vae": str(vae_file), "tokenizer": "org/two"}

    def fetch_file(name: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((name, patterns))
        shutil.copy(encoder_file, tmp_path / "qwen.safetensors")
        return tmp_path if name == "org/one" else mini.TURBO

    assert located(fetch_file, path=transformer, **repository).extras.text_encoder == tmp_path / "qwen.safetensors"
    assert asked[0] == ("org/one", ["qwen.safetensors"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer": "FILE"}, "model.tokenizer: FILE: is a file; give the folder that tokenizer.json is in"),
        ({"tokenizer": "EMPTY"}, "model.tokenizer: EMPTY: holds neither tokenizer/tokenizer.json nor tokenizer.json"),
        ({"vae": "EMPTY"}, "model.vae: EMPTY: holds neither vae/config.json nor config.json; give a folder"),
        ({"vae": "gone.safetensors"}, "model.vae: gone.safetensors: does not exist"),
        ({"text_encoder": "org/repo/qwen-Q8_0.gguf"}, "model.text_encoder: org/repo/qwen-Q8_0.gguf: is a GGUF"),
        ({"tokenizer": "LLAMA"}, "model.tokenizer: LLAMA: is a GGUF"),
        ({"extras": "LLAMA"}, "model.extras: LLAMA: is a GGUF"),
        ({"vae": "ae.pt"}, "model.vae: ae.pt: is a pickle, which can run code and is never opened"),
        (
            {"extras": "EMPTY"},
            "EMPTY has no text_encoder, tokenizer, vae; give a diffusers folder or hub id that has",
        ),
    ],
)
def test_parts_that_are_not_there(tmp_path: Path, encoder_file: Path, settings: dict[str, str], said: str):
    """A part that cannot be found is named by its setting."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    places = {"FILE": str(encoder_file), "EMPTY": str(tmp_path / "empty"), "LLAMA": str(tmp_path / "x.gguf")}
    with pytest.raises(WeightsError) as refused:
        located(path=str(mini.TURBO), **{key: places.get(value, value) for key, value in settings.items()})
    for word, place in places.items():
        said = said.replace(word, place)
    assert said in str(refused.value) and refused.value.exit_code == 4


def test_digests_of_single_files(encoder_file: Path, vae_file: Path):
    """The digest of a part is that of its content: renamed, a file has the same; changed, another."""
    digester = DigestCache(None)

    def digests(**parts: Path):
        return digest_model(ModelPaths(mini.TURBO / "transformer", extras(**parts), None), digester)

    folder, single = digests(), digests(text_encoder=encoder_file, vae=vae_file)
    assert folder.text_encoder != single.text_encoder and folder.vae != single.vae and folder.model == single.model
    moved = vae_file.rename(vae_file.with_name("other.safetensors"))
    assert digests(vae=moved).vae == single.vae
    tensors = ldm_vae(folder_tensors(mini.TURBO / "vae"))
    write(moved, tensors | {"encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 1})
    assert digests(vae=moved).vae != single.vae
    other = shutil.copytree(mini.TURBO / "tokenizer", vae_file.parent / "tokenizer")
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert digests(tokenizer=other).text_encoder != folder.text_encoder
