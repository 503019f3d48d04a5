"""`lora verify` and `lora inspect`: what a file is, what each module changes, and who loads it."""

from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.errors import WeightsError
from zimage_train.lora import headers, inspect, lora_file, targets
from zimage_train.lora.deltas import Factors
from zimage_train.lora.keys import PREFIXES, layout_name, layout_of
from zimage_train.report import heatmap


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["lora", *arguments])
    return (getattr(done.exception, "exit_code", 1) if done.exception else 0), done.output + str(done.exception or "")


def relabelled(path: Path, change) -> Path:
    """The miniature's adapter under other keys; a key that `change` maps to None is left out."""
    tensors = {change(key): tensor for key, tensor in load_file(mini.ADAPTER_V1).items()}
    save_file({key: tensor for key, tensor in tensors.items() if key is not None}, path)
    return path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["lora_unet_down_blocks_1_attentions_0_transformer_blocks_9_attn1_to_q.lora_down.weight"], "SDXL LoRA (UNet"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "SDXL LoRA (UNet keys)"),
        (["lora_unet_mid_block_attentions_0_proj_in.alpha"], "Stable Diffusion LoRA (UNet keys)"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "FLUX LoRA"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "FLUX LoRA"),
        (["transformer_blocks.0.img_mlp.net.2.lora_A.weight", "transformer_blocks.0.attn.to_q.x"], "Qwen-Image LoRA"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "Stable Diffusion 3 LoRA"),
        (["diffusion_model.blocks.0.self_attn.q.lora_down.weight"], "Wan LoRA"),
    ],
)
def test_another_family_is_named(tmp_path: Path, keys: list[str], said: str):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    for command in ("verify", "inspect"):
        code, output = run(command, str(tmp_path / "x.safetensors"))
        assert code == 4 and said in output and output.endswith(": cannot work on Z-Image; retrain from the dataset")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "layers.0.attention.to_q.lokr_t2",
            "has a LoRA of convolutions: 1 keys, such as {}; Z-Image has no convolutions",
        ),
        (
            "layers.0.attention.to_q.oft_diag",
            "has an OFT that is not LyCORIS's diag-oft: 1 keys, such as {}; it is not",
        ),
        (
            "base_model.model.layers.0.attention.to_q.oft_R.weight",
            "has an OFT that is not LyCORIS's diag-oft: 1 keys, such as {}; it is not read here",
        ),
        ("something.else", "has 1 keys that are not of a Z-Image LoRA, such as {}; is it a LoRA of Z-Image?"),
        *(
            (key, "has whole weights or biases beside the LoRA: 1 keys, such as {}; a LoRA without them")
            for key in (
                "diffusion_model.layers.0.attention.norm_q.diff",
                "diffusion_model.layers.0.attention.to_q.diff_b",
                "lora_unet_layers_0_attention_qkv.diff",
                "diffusion_model.layers.0.attention_norm1.w_norm",
                "diffusion_model.layers.0.attention_norm1.weight",
                "base_model.model.all_x_embedder.2-1.weight",
                "transformer.layers.1.feed_forward.w1.bias",
                "transformer.cap_pad_token",
                "base_model.model.layers.0.attention.to_q.lora_B.bias",
            )
        ),
        *(
            (key, "has a LoRA of the text encoder: 1 keys, such as {}; the text encoder is not changed here")
            for key in (
                "lora_te_model_layers_0_self_attn_q_proj.lora_down.weight",
                "lora_te1_model_layers_0_self_attn_q_proj.alpha",
                "model.layers.0.self_attn.q_proj.lora_A.weight",
                "base_model.model.layers.0.mlp.gate_proj.lora_B.weight",
                "lora_qwen3_layers_0_mlp_up_proj.lora_down.weight",
                "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
                "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_A.weight",
                "te1.model.layers.0.self_attn.q_proj.lora_A.weight",
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                "base_model.model.text_encoder.layers.0.q.lora_A.default.weight",
            )
        ),
    ],
)
def test_other_kinds_are_told_apart(key: str, said: str, tmp_path: Path):
    """Keys beside those of a LoRA are named for what they are, with what to do, by every command and layout."""
    tensors = {f"diffusion_model.layers.0.attention.to_k.lora_{part}.weight": torch.ones(64, 64) for part in "AB"}
    save_file(tensors | {key: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    for words in (["inspect"], ["verify"], ["convert", "--to", "kohya", "-o", str(tmp_path / "y.safetensors")]):
        code, output = run(words[0], str(tmp_path / "x.safetensors"), *words[1:])
        assert code == 4 and said.format(key) in output


@pytest.mark.parametrize("adapter", ["default", "default_0", "my-lora"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model.transformer."])
def test_any_adapter_name_of_peft_is_read(adapter: str, prefix: str, tmp_path: Path):
    """The name that peft gives an adapter in the keys has no meaning; several adapters in a file are refused."""
    module = "layers.0.attention.to_k"
    tensors = {f"{prefix}{module}.lora_{part}.{adapter}.weight": torch.randn(64, 64) for part in "AB"}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = lora_file.read_lora(tmp_path / "x.safetensors")
    assert list(lora) == [module]
    assert torch.equal(lora[module].a, tensors[f"{prefix}{module}.lora_A.{adapter}.weight"])
    magnitude = {f"{prefix}{module}.lora_magnitude_vector.{adapter}.weight": torch.ones(64)}
    save_file(tensors | magnitude, tmp_path / "dora.safetensors")
    changes = lora_file.read_changes(tmp_path / "dora.safetensors").changes
    assert lora_file.kind_of(changes[module]) == "DoRA"
    others = {key.replace(adapter, "second"): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | others, tmp_path / "two.safetensors")
    code, output = run("inspect", str(tmp_path / "two.safetensors"))
    assert code == 4 and f"holds several adapters of peft ({adapter}, second); save one of them alone" in output


def test_unusual_adapter_name_has_no_reader(tmp_path: Path):
    """A layout whose adapter has another name than `default` is not called one that other tools read."""
    keys = [f"transformer.layers.0.attention.to_k.lora_{part}.default_0.weight" for part in "AB"]
    assert layout_name(keys) is None
    assert layout_of(keys) == "another layout (transformer.*.lora_A/lora_B.default_0)"


def test_z_image_keys_are_no_other_family():
    """No key of a Z-Image LoRA is taken for a key of another model family."""
    from zimage_train.models.arch import TransformerShape

    keys = [f"{prefix}{module}.lora_A.weight" for module in TransformerShape().linears for prefix in PREFIXES]
    assert headers.detect_family(keys) is None


def test_verify_a_good_file():
    """`verify` proves a good file, and says what it is."""
    code, output = run("verify", str(mini.ADAPTER_V1), "--model", str(mini.TURBO))
    assert code == 0
    for line in (
        "ComfyUI's layout (diffusion_model.*.lora_A/lora_B), BF16",
        "modules  48 (adaln 6, attention 24, feed_forward 18)",
        "rank     8 (48 modules)",
        "alpha / rank  1 (48 modules)",
        f"fits {mini.TURBO}: 48/48 modules",
        f"diffusers {diffusers.__version__} loads 48/48, ComfyUI loads 48/48",
    ):
        assert line in output
    assert "warning" not in output


def test_verify_model_by_default(tmp_path: Path):
    """Without `--model`, `verify` compares a file with the published model."""
    code, output = run("verify", str(mini.ADAPTER_V1))
    assert code == 0 and "fits the miniature: 48/48 modules" in output
    tensors = load_file(mini.ADAPTER_V1)
    other = {name: one[:, :-8].contiguous() if "lora_A" in name else one for name, one in tensors.items()}
    save_file(other, tmp_path / "x.safetensors")
    code, output = run("verify", str(tmp_path / "x.safetensors"))
    assert code == 4 and "matched 0/48 modules; not matched: layers.0.adaLN_modulation.0 ((384, 88) there" in output
    assert "compared with Z-Image (6 B); is the LoRA of another size? give --model" in output


def test_verify_unknown_type(tmp_path: Path):
    """`verify` names a data type that cannot be computed with."""
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(mini.ADAPTER_V1).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    code, output = run("verify", str(tmp_path / "x.safetensors"), "--model", str(mini.TURBO))
    assert code == 4 and "holds F8_E4M3 tensors" in output and "save it as bf16 or fp32" in output


def test_the_layout_is_read_from_all_keys():
    keys = [f"lora_unet_layers_0_attention_to_q.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]
    assert layout_of(keys) == "musubi-tuner's layout, separate q, k, v (lora_unet_*.lora_down/lora_up)"
    bare = [key.replace("lora_unet_layers_0_attention_to_q", "layers.0.attention.to_q") for key in keys]
    assert layout_of(bare) == "another layout (*.lora_down/lora_up)"


def test_verify_layout_not_loaded(tmp_path: Path):
    """`verify` says which program would not load a layout."""
    path = tmp_path / "x.safetensors"
    assert run("convert", str(mini.ADAPTER_V1), "--to", "musubi", "-o", str(path))[0] == 0
    assert len(lora_file.read_lora(path)) == 48
    code, output = run("verify", str(path), "--model", str(mini.TURBO))
    assert code == 4 and "ComfyUI would report 72 keys as not loaded" in output
    assert "zimage-train lora convert FILE --to comfyui" in output


@pytest.mark.parametrize(("prefix", "loaded"), [("transformer.", True), ("", False)])
def test_verify_layouts_of_comfyui(tmp_path: Path, prefix: str, loaded: bool):
    """Of the other layouts that ComfyUI reads, diffusers adds no layer for names without a prefix."""
    path = relabelled(
        tmp_path / "x.safetensors",
        lambda key: None if key.endswith(".alpha") else prefix + key.removeprefix("diffusion_model."),
    )
    code, output = run("verify", str(path), "--model", str(mini.TURBO))
    assert code == (0 if loaded else 4), output
    assert loaded or f"diffusers {diffusers.__version__} would load 0 of 48 modules" in output


def test_verify_modules_without_change(tmp_path: Path):
    """`verify` warns of modules that change nothing."""
    tensors = load_file(mini.ADAPTER_V1)
    key = "diffusion_model.layers.3.attention.to_k.lora_B.weight"
    save_file(tensors | {key: torch.zeros_like(tensors[key])}, tmp_path / "x.safetensors")
    code, output = run("verify", str(tmp_path / "x.safetensors"), "--model", str(mini.TURBO))
    assert code == 0
    assert "warning: 1 of 48 modules change nothing, such as layers.3.attention.to_k" in output


def test_delta_norm_equals_dense():
    """The norm from the factors is that of the dense change."""
    g = torch.Generator().manual_seed(1)
    factors = Factors(torch.randn(3, 20, generator=g), torch.randn(30, 3, generator=g), 0.7)
    dense = torch.linalg.matrix_norm(0.7 * (factors.b.double() @ factors.a.double()))
    assert factors.norm() == pytest.approx(float(dense), rel=1e-12)


def test_table_has_every_module():
    """The table has every module in its block and component."""
    found = inspect.summarize_lora(mini.ADAPTER_V1)
    rows, columns, values = targets.modules_table(found.norms)
    assert rows == [f"layers.{index}" for index in range(6)]
    assert columns == ["to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3", "adaLN"]
    assert values[2][4] == found.norms["layers.2.feed_forward.w1"]
    assert sorted(v for line in values for v in line if v is not None) == sorted(found.norms.values())


def test_table_orders_blocks_by_number():
    """Blocks are in the order of their numbers, and gaps stay empty."""
    energy = {f"layers.{index}.attention.to_q": 1.0 for index in (10, 2, 0)}
    energy |= {"noise_refiner.0.feed_forward.w3": 2.0, "all_final_layer.2-1.linear": 3.0}
    rows, columns, values = targets.modules_table(energy)
    assert rows == ["all_final_layer.2-1.linear", "layers.0", "layers.2", "layers.10", "noise_refiner.0"]
    assert columns == ["to_q", "w3", "other"]
    assert values == [[None, None, 3.0], [1.0, None, None], [1.0, None, None], [1.0, None, None], [None, 2.0, None]]


def test_inspect_output(tmp_path: Path):
    """`inspect` shows shares, metadata and a heat map."""
    code, output = run("inspect", str(mini.ADAPTER_V1), "--plot", str(tmp_path / "heat.png"))
    assert code == 0
    lines = output.splitlines()
    shares = [float(line.split()[-1].rstrip("%")) for line in lines if line.startswith("layers.")]
    assert len(shares) == 6 and sum(shares) == pytest.approx(100, abs=0.4)
    assert any(line.startswith("metadata:") for line in lines)
    with Image.open(tmp_path / "heat.png") as image:
        assert image.width > 8 * heatmap.CELL_WIDTH_PX and image.height > 6 * heatmap.CELL_HEIGHT_PX


def test_heat_map_colours(tmp_path: Path):
    """The heat map is dark for small values and bright for large values."""
    heatmap.save_heatmap(tmp_path / "x.png", "t", ["a", "b"], ["one", "two"], [[0.0, 1.0], [None, 0.5]], 1.0)
    with Image.open(tmp_path / "x.png") as image:
        width, height, left, top = heatmap.CELL_WIDTH_PX, heatmap.CELL_HEIGHT_PX, heatmap.LABEL_PX, heatmap.TOP_PX
        corner = [image.getpixel((left + x * width + 1, top + y * height + 1)) for y in (0, 1) for x in (0, 1)]
    assert corner == [heatmap.COLOURS[0], heatmap.COLOURS[-1], (255, 255, 255), heatmap.COLOURS[2]]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_missing_file_is_one_line(command: str, tmp_path: Path):
    """A missing file is an error of a single line."""
    code, output = run(command, str(tmp_path / "none.safetensors"))
    assert code == 4 and output.endswith("none.safetensors: does not exist; check the path")


def test_a_model_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"--model: .*nowhere: is neither"):
        from zimage_train.commands import lora

        lora.verify_file(mini.ADAPTER_V1, str(tmp_path / "nowhere"))
