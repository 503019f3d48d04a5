"""Loading: the same model from every layout, and every way in which a file can be wrong, by name."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from zimage_train import mini
from zimage_train.config.schema import ModelSettings
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.errors import WeightsError
from zimage_train.models import arch, loading, locate, text_encoder, transformer, vae
from zimage_train.models.arch import TransformerShape
from zimage_train.models.components import ExtrasPaths

from checkpoints import comfyui, folder_tensors
from helpers import load_all

CPU = torch.device("cpu")
STEM = "diffusion_pytorch_model"


def state(folder: Path) -> dict[str, Tensor]:
    return folder_tensors(folder / "transformer")


@pytest.fixture(scope="module")
def reference() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel.from_pretrained(mini.TURBO / "transformer").float()


def require_equal(model: ZImageTransformer2DModel, other: ZImageTransformer2DModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_folder_loads_as_in_diffusers(reference: ZImageTransformer2DModel):
    """A folder of diffusers is loaded as diffusers loads it."""
    require_equal(load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model, reference)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_file_loads_the_same(tmp_path: Path, reference: ZImageTransformer2DModel, prefix: str):
    native = comfyui(state(mini.TURBO)) | {"norm_final.weight": torch.ones(3)}
    save_file({prefix + name: tensor for name, tensor in native.items()}, tmp_path / "z.safetensors")
    require_equal(load_frozen(tmp_path / "z.safetensors", None, "fp32", CPU).model, reference)


def test_single_file_loads_the_same(tmp_path: Path, reference: ZImageTransformer2DModel):
    """A single file in the diffusers layout is loaded as the same model."""
    save_file(state(mini.TURBO), tmp_path / "z.safetensors")
    frozen = load_frozen(tmp_path / "z.safetensors", None, "fp32", CPU)
    require_equal(frozen.model, reference)
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())


def test_a_single_file_runs_like_the_folder(tmp_path: Path, reference: ZImageTransformer2DModel):
    save_file(comfyui(state(mini.TURBO)), tmp_path / "z.safetensors")
    frozen = load_frozen(tmp_path / "z.safetensors", None, "fp32", CPU)
    x, sigma, prompt = torch.randn(1, 16, 8, 12), torch.tensor([0.7]), [torch.randn(9, frozen.shape.cap_feat_dim)]
    one = transformer.velocity(frozen.model, x, sigma, prompt)
    assert torch.equal(one, transformer.velocity(reference, x, sigma, prompt))


def test_full_size_shape():
    """The full-size shape is that of the real model."""
    full = TransformerShape()
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**full.config())
    assert full.parameters == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == 6_154_908_736
    linears = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert full.linears == linears
    assert len(linears) == 276


def test_full_size_shape_from_tensors():
    """The shape of a full-size single file is read from its tensors."""
    assert arch.shape_from_tensors(TransformerShape().parameters) == TransformerShape()


def test_velocity_sign_and_time(reference: ZImageTransformer2DModel):
    """The velocity is the negated output at time 1 - sigma."""
    x, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.25, 0.9])
    prompts = [torch.randn(5, 64), torch.randn(40, 64)]
    expected = reference(list(x.unsqueeze(2)), 1 - sigma, prompts, return_dict=False)[0]
    got = transformer.velocity(reference, x, sigma, prompts)
    assert torch.equal(got, -torch.stack(list(expected)).squeeze(2))
    assert got.dtype == torch.float32


@pytest.mark.parametrize("lengths", [(1,), (9, 31), (32, 64), (33, 9, 70)])
def test_padded_prompts_change_nothing(reference: ZImageTransformer2DModel, lengths: tuple[int, ...]):
    """Prompts that are padded before give the velocity of prompts that the model pads, bit for bit."""
    x, sigma = torch.randn(len(lengths), 16, 8, 8), torch.rand(len(lengths))
    prompts = [torch.randn(length, 64) for length in lengths]
    padded = [transformer.pad_prompt(prompt) for prompt in prompts]
    assert all(len(prompt.embeds) % 32 == 0 and len(prompt.embeds) >= len(prompt.is_padding) for prompt in padded)
    expected = transformer.velocity(reference, x, sigma, prompts)
    assert torch.equal(transformer.velocity(reference, x, sigma, padded), expected)
    # The padding token replaces what stands there.
    spoiled = [replace(prompt, embeds=prompt.embeds + 9.0 * prompt.is_padding.unsqueeze(-1)) for prompt in padded]
    assert torch.equal(transformer.velocity(reference, x, sigma, spoiled), expected)
    assert torch.equal(transformer.velocity(reference, x, sigma, prompts), expected)  # nothing is left behind


def test_time_has_full_precision():
    """The time reaches a bf16 model in full precision."""
    model = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU).model
    seen = []
    model.t_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    transformer.velocity(model, torch.randn(1, 16, 8, 8), torch.tensor([0.2501]), [torch.randn(5, 64).bfloat16()])
    assert seen[0].dtype == torch.float32
    assert float(seen[0]) == pytest.approx(1000 * (1 - 0.2501), abs=1e-3)


# Text encoder and VAE


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import ZImagePipeline

    return ZImagePipeline.from_pretrained(mini.TURBO).to(torch.float32)


@pytest.mark.parametrize(
    "prompt", ["", "a red zorb on a blue background", "Ünïcode 猫, [trigger]\nsecond line", "w " * 700]
)
def test_prompts_are_encoded_as_diffusers(pipeline, prompt: str):
    """Prompts are encoded as the pipeline does."""
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    with torch.no_grad():
        (expected,), _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    got = encoder.encode(prompt)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()))
    assert not got.requires_grad


def test_encoder_layers_are_read_once(monkeypatch):
    """Each layer is read once for all prompts, and the last layer never."""
    read: list[str] = []
    stream = loading.stream_tensors

    def spy(tensors):
        read.extend(tensors)
        return stream(tensors)

    monkeypatch.setattr(loading, "stream_tensors", spy)
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    found = dict(encoder.encode_all([f"prompt {number}" + " and more" * (number % 4) for number in range(9)]))
    assert len(found) == 9
    layers = json.loads((mini.TURBO / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    names = [name.removeprefix("model.") for name in read]
    assert len(names) == len(set(names)) and "embed_tokens.weight" in names
    kept = {name.split(".")[1] for name in names if name.startswith("layers.")}
    assert kept == {str(index) for index in range(layers - 1)}
    assert not any(name.startswith(("norm", "lm_head")) for name in names)


def test_one_layer_is_there_at_a_time(monkeypatch):
    """So 8 GB of text encoder take a thirtieth of that on the device."""
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    made: list[weakref.ref] = []
    original = encoder._layer

    def layer(index: int):
        assert [one for one in made if one() is not None] == []
        found = original(index)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(encoder, "_layer", layer)
    encoder.encode("a red zorb")
    assert len(made) == encoder.config.num_hidden_layers and not any(one() for one in made)


def test_prompts_encoded_together(monkeypatch):
    """Prompts of equal length encoded together are the same as each alone."""
    encoder = text_encoder.load_text_encoder(ExtrasPaths.in_folder(mini.TURBO), CPU, torch.float32)
    prompts = ["a red zorb", "a tan zorb", "", "x" * 90, "a blue circle on a green background"]
    alone = {prompt: encoder.encode(prompt) for prompt in prompts}
    ticks: list[tuple[int, int]] = []
    monkeypatch.setattr(text_encoder, "GROUP_TOKENS", 60)  # several groups
    together = dict(encoder.encode_all(prompts, lambda done, total: ticks.append((done, total))))
    assert together.keys() == alone.keys()
    for prompt in prompts:
        assert together[prompt].shape == alone[prompt].shape
        assert torch.allclose(together[prompt], alone[prompt], atol=1e-5)
    assert ticks[-1][0] == ticks[-1][1] == len(ticks) > encoder.config.num_hidden_layers


@pytest.mark.slow
def test_vae_tiles_when_out_of_memory(monkeypatch):
    """If memory runs out, the VAE decodes in tiles, with a close result."""
    model = vae.load_vae(mini.TURBO / "vae", CPU, torch.float32)
    latents = torch.randn(1, 16, 96, 128, generator=torch.Generator().manual_seed(1)) * 0.3
    (whole,) = vae.decode_latents(model, latents)
    decode, failed = model.decode, []

    def once_too_large(*args, **options):
        if not model.use_tiling:
            failed.append(1)
            raise torch.OutOfMemoryError
        return decode(*args, **options)

    monkeypatch.setattr(model, "decode", once_too_large)
    (tiled,) = vae.decode_latents(model, latents)
    assert failed == [1] and tiled.size == whole.size and not model.use_tiling
    difference = np.abs(np.asarray(tiled, dtype=float) - np.asarray(whole, dtype=float)).mean()
    assert 0 < difference < 8


def test_latents_are_the_posterior_mean():
    """Latents are the posterior mean, shifted and scaled."""
    ours, theirs = (
        vae.load_vae(mini.TURBO / "vae", CPU, torch.float32),
        AutoencoderKL.from_pretrained(mini.TURBO / "vae"),
    )
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(pixels).latent_dist.mean
    expected = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert torch.allclose(vae.encode_images(ours, pixels), expected, atol=1e-5)


# What can be wrong with weights


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ("transformer/config.json", {"siglip_feat_dim": 8}, "Omni"),
        ("text_encoder/config.json", {"model_type": "t5"}, "t5"),
        ("vae/config.json", {"latent_channels": 4}, "4 channels"),
    ],
)
def test_another_family_is_named(broken: Path, path: str, content: dict, message: str):
    file = broken / path
    file.write_text(json.dumps(json.loads(file.read_text()) | content))
    with pytest.raises(WeightsError, match=message):
        load_all(broken)


# Where parts come from


def test_extras_default_to_the_folder():
    """Extras come by default from the folder that has them."""
    found = locate.locate(ModelSettings(path=str(mini.TURBO), adapter=None))
    assert found.extras == ExtrasPaths.in_folder(mini.TURBO)


def test_extras_are_named(tmp_path: Path):
    """A transformer without extras takes those that are named."""
    shutil.copytree(mini.TURBO / "transformer", tmp_path / "only" / "transformer")
    found = locate.locate(ModelSettings(path=str(tmp_path / "only"), extras=str(mini.TURBO), adapter=None))
    assert found.transformer == tmp_path / "only" / "transformer"
    assert found.extras == ExtrasPaths.in_folder(mini.TURBO)


def test_hub_requests_of_a_config(tmp_path: Path):
    """Hub IDs, revisions and files are requested by name."""
    asked = []

    def fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((repository, revision, patterns[0]))
        if "adapter" in repository:
            (tmp_path / "a").mkdir(exist_ok=True)
            shutil.copy(mini.ADAPTER_V1, tmp_path / "a" / patterns[0])
            return tmp_path / "a"
        return mini.TURBO

    locate.locate(ModelSettings(variant="turbo", path="org/model@v9", adapter="v1"), fetch)
    assert asked == [
        ("org/model", "v9", "transformer/*"),
        ("org/model", "v9", "text_encoder/*"),
        ("ostris/zimage_turbo_training_adapter", None, "zimage_turbo_training_adapter_v1.safetensors"),
    ]
    asked.clear()
    locate.locate(ModelSettings(variant="deturbo"), fetch)
    assert asked == [
        ("ostris/Z-Image-De-Turbo", None, "transformer/*"),
        ("Tongyi-MAI/Z-Image-Turbo", None, "text_encoder/*"),
    ]


def test_hub_snapshot_needs_no_connection(tmp_path: Path, monkeypatch, no_network: list):
    """A hub snapshot on this machine is used without a connection."""
    repository = tmp_path / "hub" / "models--org--z"
    commit = "0" * 40
    shutil.copytree(mini.TURBO, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = locate.locate(ModelSettings(path="org/z", adapter=None), locate.cached_only)
    assert found.transformer == repository / "snapshots" / commit / "transformer"
    with pytest.raises(locate.NotDownloadedError, match="not on this machine"):
        locate.locate(ModelSettings(path="org/other", adapter=None), locate.cached_only)
    # Only a part of the repository was downloaded, such as by another program.
    shutil.rmtree(repository / "snapshots" / commit / "tokenizer")
    parts = {part: str(mini.TURBO / part) for part in ("text_encoder", "vae")}
    with pytest.raises(locate.NotDownloadedError, match="org/z: is not on this machine"):
        locate.locate(ModelSettings(path=str(mini.TURBO / "transformer"), extras="org/z", **parts), locate.cached_only)
    assert no_network == []


@pytest.mark.parametrize("path", ["no/such/folder", "./here", "nothing", "/a/b.safetensors"])
def test_path_without_a_model(path: str):
    """A path without a model is refused, naming `model.path`."""
    with pytest.raises(WeightsError, match=r"model\.path"):
        locate.locate(ModelSettings(path=path, extras=str(mini.TURBO), adapter=None))


def test_local_paths_need_no_connection(no_network: list):
    """Loading from local paths makes no connection."""
    load_all(mini.TURBO)
    assert no_network == []


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantized_modules(kind: str):
    """Only attention and feed-forward layers are quantised."""
    model = transformer.empty_transformer(TransformerShape(), torch.bfloat16, kind)
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.bfloat16}
    assert {name.rpartition(".")[0] for name in packed} == {
        name for name in TransformerShape().linears if ".attention." in name or ".feed_forward." in name
    }
    assert len(packed) == 34 * 7
    other = [name for name in dict(model.named_parameters()) if name not in packed and not name.endswith(".scales")]
    assert any("adaLN" in name for name in other) and any("norm" in name for name in other)
