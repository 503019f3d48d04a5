"""Checkpoints in every precision in use are read alike by everything that reads them, or refused in a line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage_train import mini
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen, original_weights
from zimage_train.errors import WeightsError
from zimage_train.lora import lora_file
from zimage_train.lora.training_adapter import load_adapter
from zimage_train.models import loading, locate, transformer
from zimage_train.models.stored_weights import Part, read_part, scale_counts

from checkpoints import (
    E4M3,
    STYLES,
    TRANSFORMER,
    comfyui,
    folder_tensors,
    marked,
    of_diffusers,
    scaled,
    write,
)
from lora_commands import lora_command

CPU = torch.device("cpu")


def state(frozen: FrozenTransformer) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in frozen.model.named_parameters()}


def nearly_all_equal(ours: dict[str, Tensor], exact: dict[str, Tensor], share: float = 1e-5) -> bool:
    """Whether all weights are the nearest bf16 to those in float64, but for the few that lie between two in fp32."""
    assert ours.keys() == exact.keys()
    differ = sum(int((ours[name] != exact[name].bfloat16()).sum()) for name in ours)
    return differ <= share * sum(tensor.numel() for tensor in ours.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_scales_that_are_no_scales(tmp_path: Path, part: Part, value: float):
    """A scale that is negative or not finite is refused with the name of its weight, by whatever reads it."""
    tensors = folder_tensors(mini.TURBO / part)
    stored, _, _ = scaled(comfyui(tensors) if part == "transformer" else tensors, "old")
    name = min(name for name in stored if name.endswith(".scale_weight"))
    stored[name] = torch.tensor(value)
    path = write(tmp_path / "z.safetensors", stored)
    with pytest.raises(WeightsError, match=r"z.safetensors: .* has scales that are negative or not finite, such as"):
        dict(loading.stream_tensors(read_part(path, part)))
    if part == "transformer":
        out = tmp_path / "out.safetensors"
        words = ("--lora", mini.ADAPTER_V1, "--to", "comfyui", "--dtype", "bf16", "-o", out)
        assert lora_command("bake", path, *words)[0] == 4 and not out.exists()


@pytest.mark.parametrize("style", STYLES)
def test_scale_adapter_and_one_rounding(tmp_path: Path, style: str):
    """Weights are numbers times scales, plus the adapter, rounded once to the precision of the model."""
    stored, exact, metadata = scaled(comfyui(folder_tensors(TRANSFORMER)), style)
    path = write(tmp_path / "z.safetensors", stored, "", metadata)
    shape = locate.transformer_tensors(path)[0]
    adapter = load_adapter(mini.ADAPTER_V1, 0.7, shape)
    true = of_diffusers(exact)
    assert nearly_all_equal(state(load_frozen(path, None, "bf16", CPU)), true)
    rounded_twice = dict(true)
    for module, factors in lora_file.read_lora(mini.ADAPTER_V1).items():
        name, delta = f"{module}.weight", 0.7 * factors.scale * (factors.b.double() @ factors.a.double())
        rounded_twice[name] = true[name].bfloat16().double() + delta
        true[name] = true[name] + delta
    ours = state(load_frozen(path, adapter, "bf16", CPU))
    assert nearly_all_equal(ours, true)
    # Numbers without scales are exact in bf16, so there the order makes no difference.
    assert style.startswith("plain") or not nearly_all_equal(ours, rounded_twice)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("names", ["comfyui", "diffusers"])
@pytest.mark.parametrize("style", ["header", "musubi block", "plain"])
def test_every_reader_reads_the_same(tmp_path: Path, prefix: str, names: str, style: str):
    """Prefixes and names make no difference, with scales neither, and every reader returns the same bits."""
    tensors = folder_tensors(TRANSFORMER)
    layout = comfyui(tensors) if names == "comfyui" else tensors
    stored, exact, metadata = scaled(layout, style)
    path = write(tmp_path / "z.safetensors", stored, prefix, metadata)
    true = of_diffusers(exact) if names == "comfyui" else exact
    shape, stream = transformer.read_weights(path)
    read = dict(stream)
    assert shape == locate.transformer_tensors(TRANSFORMER)[0] and read.keys() == true.keys()
    for name, tensor in read.items():
        assert torch.allclose(tensor.double(), true[name], rtol=1e-7, atol=0), name
    some = set(list(true)[::3])
    selected = dict(transformer.read_selected_weights(path, some))
    assert selected.keys() == some and all(torch.equal(selected[name], read[name]) for name in some)
    with transformer.open_weights(path) as opened:
        assert all(torch.equal(opened.get(name), read[name]) for name in true)
        assert {name: weight.shape for name, weight in opened.weights.items()} == shape.parameters


def test_a_folder_with_scales(tmp_path: Path):
    """A diffusers folder may hold scaled weights too, with a scale in another shard than its weight."""
    stored, exact, _ = scaled(folder_tensors(TRANSFORMER), "row")
    folder = tmp_path / "transformer"
    folder.mkdir()
    shutil.copy(TRANSFORMER / "config.json", folder)
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in stored.items():
        shards["b.safetensors" if name.endswith("weight_scale") else "a.safetensors"][name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert nearly_all_equal(state(load_frozen(folder, None, "bf16", CPU)), exact)


@pytest.mark.parametrize("style", ["old", "musubi block", "plain"])
def test_previews_see_the_file_again(tmp_path: Path, style: str):
    """Within `original_weights` the model is that of the file, and after it the training weights, bit for bit."""
    stored, _, metadata = scaled(comfyui(folder_tensors(TRANSFORMER)), style)
    path = write(tmp_path / "z.safetensors", stored, "", metadata)
    without = state(load_frozen(path, None, "bf16", CPU))
    frozen = load_frozen(path, load_adapter(mini.ADAPTER_V1, 1.0, locate.transformer_tensors(path)[0]), "bf16", CPU)
    before = state(frozen)
    with original_weights(frozen):
        inside = state(frozen)
    after = state(frozen)
    assert all(torch.equal(inside[name], without[name]) and torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(before[name], without[name]) for name in before)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scaled_files_are_quantised_once(tmp_path: Path, kind):
    """`model.quantize` packs the fp32 product, and not weights that were rounded to bf16 before."""
    stored, exact, _ = scaled(comfyui(folder_tensors(TRANSFORMER)), "musubi block")
    path = write(tmp_path / "z.safetensors", stored)
    full = write(tmp_path / "full.safetensors", {name: tensor.float() for name, tensor in exact.items()})
    ours, theirs = (state(load_frozen(file, None, "bf16", CPU, kind)) for file in (path, full))
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)


def test_a_checkpoint_of_all_parts(tmp_path: Path):
    """A checkpoint that holds text encoder and VAE too is read as the transformer that it holds."""
    stored, exact, _ = scaled(comfyui(folder_tensors(TRANSFORMER)), "old")
    all_parts = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    all_parts["vae.decoder.conv_in.weight"] = torch.ones(3)
    all_parts["text_encoders.qwen3_4b.transformer.model.norm.weight"] = torch.ones(4)
    path = write(tmp_path / "z.safetensors", all_parts)
    assert nearly_all_equal(state(load_frozen(path, None, "bf16", CPU)), of_diffusers(exact))


def test_thirds_within_a_block(tmp_path: Path):
    """A third of q, k and v may begin within a block of rows that share a scale."""
    weight = torch.randn(12, 8).to(E4M3)
    scale = torch.tensor([[0.5, 2.0], [3.0, 0.25]])
    path = write(tmp_path / "x.safetensors", {"a.weight": weight, "a.weight_scale": scale})
    whole = read_part(path, "transformer")["a.weight"]
    expected = weight.double() * torch.kron(scale.double(), torch.ones(6, 4).double())
    with loading.WeightReader() as reader:
        parts = [reader.read(whole.split(third)) for third in range(3)]
    assert torch.equal(torch.cat(parts).double(), expected)


@pytest.mark.parametrize(
    ("scale", "counts"),
    [
        ((), (1, 1)),
        ((1,), (1, 1)),
        ((1, 1, 1), (1, 1)),
        ((6,), (6, 1)),
        ((6, 1), (6, 1)),
        ((6, 4), (6, 4)),
        ((6, 4, 1), (6, 4)),
        ((3, 2), (3, 2)),
        ((4,), None),
        ((6, 3), None),
        ((6, 4, 2), None),
        ((8, 6), None),
        ((0,), None),
    ],
)
def test_shapes_of_scales(scale: tuple[int, ...], counts: tuple[int, ...] | None):
    """Scales of a tensor, of rows and of blocks fit; any other shape does not."""
    assert scale_counts((6, 8), scale) == counts
    assert scale_counts((), scale) is None


QKV = "layers.0.attention.qkv"


def without_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{QKV}.weight_scale"]


def nvfp4(tensors: dict[str, Tensor]) -> None:
    weight = tensors[f"{QKV}.weight"]
    tensors[f"{QKV}.weight"] = torch.zeros(len(weight), weight.shape[1] // 2, dtype=torch.uint8)
    tensors[f"{QKV}.weight_scale"] = torch.zeros(len(weight), weight.shape[1] // 16).to(E4M3)
    tensors[f"{QKV}.weight_scale_2"] = torch.tensor(1.0)
    tensors[f"{QKV}.comfy_quant"] = marked({"format": "nvfp4"})


def convrot(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.weight"] = torch.zeros(tensors[f"{QKV}.weight"].shape, dtype=torch.int8)
    tensors[f"{QKV}.comfy_quant"] = marked({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64})


def convrot_in_params(tensors: dict[str, Tensor]) -> None:
    convrot(tensors)
    tensors[f"{QKV}.comfy_quant"] = marked({"format": "int8_tensorwise", "params": {"convrot": True}})


def changed(name: str, tensor: Tensor | None):
    def change(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_scale, f"1 of its fp8 weights have no scale, such as {QKV}.weight; get the file again"),
        (changed(f"{QKV}.weight_scale", torch.ones(5)), f"{QKV}.weight is [288, 96], and its scale [5]"),
        (changed(f"{QKV}.weight_scale", torch.ones(96, 288)), "and its scale [96, 288]"),
        (changed(f"{QKV}.weight_scale", torch.ones(288, 3, dtype=torch.uint8)), "has scales in U8"),
        (changed(f"{QKV}.scale_weight", torch.tensor(1.0)), f"{QKV} has two scales"),
        (changed(f"{QKV}.weight", None), f"{QKV} has a scale, but no weight"),
        (changed("x_embedder.weight_scale", torch.tensor(2.0)), "x_embedder.weight is BF16 and has a scale"),
        (changed(f"{QKV}.comfy_quant", marked({"format": "float6"})), "is quantised as float6, which is not read here"),
        (changed(f"{QKV}.comfy_quant", marked({"format": ["x"]})), "that .comfy_quant does not name"),
        (changed(f"{QKV}.comfy_quant", marked([1])), "as a format that .comfy_quant does not name"),
        (changed(f"{QKV}.comfy_quant", torch.tensor([255, 0], dtype=torch.uint8)), "that .comfy_quant does not name"),
        (changed(f"{QKV}.comfy_quant", marked({"format": "mxfp8"})), "is quantised as mxfp8"),
        (nvfp4, "is quantised as nvfp4, which is not read here; take the .safetensors of the same weights in bf16"),
        (convrot, "is quantised as int8_tensorwise with ConvRot"),
        (convrot_in_params, "is quantised as int8_tensorwise with ConvRot"),
        (changed("layers.0.feed_forward.w1.qweight", torch.ones(3, dtype=torch.int32)), "as GPTQ, AWQ or SVDQuant"),
        (changed("layers.0.feed_forward.w1.weight.absmax", torch.ones(3)), "as bitsandbytes"),
        (changed("cap_embedder.1.weight", torch.ones(3, dtype=torch.uint8)), "holds U8 weights of an unknown format"),
        (changed("cap_embedder.1.weight", torch.tensor(1.0)), "tensors have another shape: "),
        (changed(f"{QKV}.weight", torch.ones(289, 96)), f"{QKV}.weight is F32 and has a scale"),
        (changed("layers.0.attention.to_q.weight", torch.ones(96, 96)), "holds layers.0.attention.to_q.weight twice"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, change, said: str):
    """Other formats and scales that do not fit are refused in a line that names them, by every reader."""
    stored, _, _ = scaled(comfyui(folder_tensors(TRANSFORMER)), "new")
    change(stored)
    path = write(tmp_path / "z.safetensors", stored, "model.diffusion_model.")
    with pytest.raises(WeightsError) as refused:
        locate.transformer_tensors(path)
    assert said in str(refused.value) and refused.value.exit_code == 4, str(refused.value)
    assert str(refused.value).count("\n") <= 1
    for command in (
        [
            "bake",
            path,
            "--lora",
            mini.ADAPTER_V1,
            "--to",
            "comfyui",
            "--dtype",
            "bf16",
            "-o",
            tmp_path / "x.safetensors",
        ],
        ["extract", path, mini.TURBO, "-o", tmp_path / "x.safetensors"],
        ["extract", mini.TURBO, path, "-o", tmp_path / "x.safetensors"],
    ):
        code, text = lora_command(*command)
        assert code == 4 and said in text


def test_rows_that_are_no_thirds(tmp_path: Path):
    """A fused tensor whose rows are not three times as many is refused, not cut."""
    tensors = comfyui(folder_tensors(TRANSFORMER))
    tensors[f"{QKV}.weight"] = torch.zeros(289, 96)
    with pytest.raises(WeightsError, match=r"to_k.weight is \[289, 96\], expected \[96, 96\]"):
        locate.transformer_tensors(write(tmp_path / "z.safetensors", tensors))


def test_bake_and_extract_scaled_files(tmp_path: Path):
    """A LoRA is baked into the true weights of a scaled file, and extracted from them again."""
    stored, exact, _ = scaled(comfyui(folder_tensors(TRANSFORMER)), "new")
    path, baked = write(tmp_path / "z.safetensors", stored), tmp_path / "baked.safetensors"
    command = ["bake", path, "--lora", f"{mini.ADAPTER_V1}=20", "--to", "comfyui", "-o", baked]
    code, said = lora_command(*command)
    assert code == 4 and "give --dtype bf16, or bake into a bf16 checkpoint" in said and not baked.exists()
    code, said = lora_command(*command, "--dtype", "bf16")
    assert code == 0, said
    true = of_diffusers(exact)
    for module, factors in lora_file.read_lora(mini.ADAPTER_V1).items():
        true[f"{module}.weight"] += 20 * factors.scale * (factors.b.double() @ factors.a.double())
    assert nearly_all_equal(dict(transformer.read_weights(baked)[1]), true, share=1e-3)
    extracted = tmp_path / "x.safetensors"
    assert lora_command("extract", baked, path, "--rank", "8", "--dtype", "fp32", "-o", extracted)[0] == 0
    found, lora = lora_file.read_lora(extracted), lora_file.read_lora(mini.ADAPTER_V1)
    assert lora.keys() <= found.keys()
    for module, factors in lora.items():
        delta, again = 20 * factors.delta().double(), found[module].delta().double()
        assert float((again - delta).norm() / delta.norm()) < 0.02, module


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; get the file again"),
        (
            b"GGUF\x03\x00\x00\x00" + b"\x01" * 200,
            "is a GGUF, the format of llama.cpp, which is not read here; take the",
        ),
        (b"PK\x03\x04" + b"0" * 200, "is a pickle, which can run code and is never opened; get the .safetensors"),
        (b"\x80\x02\x8a\nl\xfc\x9cF" + b"0" * 200, "is a pickle, which can run code and is never opened"),
    ],
)
@pytest.mark.parametrize("name", ["z.safetensors", "z.gguf", "z.ckpt"])
def test_other_files_are_named(tmp_path: Path, content: bytes, said: str, name: str):
    """What is no safetensors file is named by its first bytes, whatever it is called."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError) as refused:
        locate.transformer_tensors(path)
    assert said in str(refused.value) and refused.value.exit_code == 4
    with pytest.raises(WeightsError, match=said.split(";")[0]):
        lora_file.read_lora(path)


def test_scaled_file_cut_off(tmp_path: Path):
    """A scaled file that was cut off is refused before a `.comfy_quant` is read."""
    stored, _, _ = scaled(comfyui(folder_tensors(TRANSFORMER)), "new")
    path = write(tmp_path / "z.safetensors", stored)
    path.write_bytes(path.read_bytes()[: math.ceil(path.stat().st_size * 0.6)])
    with pytest.raises(WeightsError, match="cut off or overwritten"):
        locate.transformer_tensors(path)


@pytest.mark.parametrize("name", ["org/repo/z-Q4_K_M.gguf", "models/z.ckpt", "gone.pt", "org/model.bin"])
def test_names_of_other_files(name: str):
    """A name that ends like a GGUF or a pickle is not looked up on a hub."""

    def asked(*arguments: object) -> Path:
        raise AssertionError(arguments)

    with pytest.raises(WeightsError, match=r"model\.path: .*(is a GGUF|is a pickle)"):
        locate.transformer_at(name, locate.Location(key="model.path"), asked)


def test_a_folder_of_other_files(tmp_path: Path):
    """A folder that holds a GGUF alone is refused with what it holds."""
    (tmp_path / "z.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"holds no transformer/config.json; z.gguf is a GGUF"):
        locate.transformer_at(str(tmp_path), locate.Location(key="model.path"))
