"""LoRA names, files and modules: counts, layouts, exactness, and what other loaders make of an export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.errors import ConfigError, WeightsError
from zimage_train.lora import arithmetic, keys, layers, lora_file, verify
from zimage_train.lora.deltas import Factors, Lora
from zimage_train.lora.targets import group_of, select_modules
from zimage_train.models.arch import TransformerShape
from zimage_train.models.transformer import velocity

CPU = torch.device("cpu")
Q = "layers.0.attention.to_q"
FULL = TransformerShape()
TINY = TransformerShape(dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, cap_feat_dim=64, axes_dims=(8, 12, 12))


def random_lora(shape: TransformerShape = TINY, rank: int = 4, scale: float = 1.0, seed: int = 0) -> Lora:
    """Factors that differ in every module, so that a mix-up of q, k and v cannot pass."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Factors(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw), scale)
        for name, (outputs, inputs) in shape.linears.items()
        if group_of(name) in ("attention", "feed_forward")
    }


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["attention", "feed_forward"], 210),
        (["attention", "feed_forward", "adaln"], 240),
        (["attention", "feed_forward", "refiners"], 238),
        (["attention"], 120),
        (r".*", 276),
        (r"layers\.\d+\.attention\.to_q", 30),
    ],
)
def test_targets_select_known_counts(targets, count: int):
    """Targets select the known numbers of modules."""
    assert len(select_modules(targets, FULL.linears)) == count


@pytest.mark.parametrize("pattern", ["to_q", "layers", "ff.net.0.proj"])
def test_targets_without_a_match(pattern: str):
    """A pattern that matches no whole name is an error."""
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        select_modules(pattern, FULL.linears)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.layers.0.attention.to_q.lora_A.weight",
        "transformer.layers.0.attention.to_q.lora_A.weight",
        "base_model.model.layers.0.attention.to_q.lora_A.weight",
        "layers.0.attention.to_q.lora_A.default.weight",
        "layers.0.attention.to_q.lora_A.weight",
        "diffusion_model.layers.0.attention.to_q.lora_down.weight",
    ],
)
def test_every_known_layout_is_parsed(key: str):
    assert keys.parse_key(key) == ("layers.0.attention.to_q", "A")


def test_exported_keys_are_golden(tmp_path: Path):
    lora_file.export_lora(tmp_path / "x.safetensors", random_lora(), "bf16", {"format": "pt"})
    golden = Path(__file__).parents[1] / "golden" / "lora_keys.txt"
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        keys = sorted(file.keys())
    assert "\n".join(keys) + "\n" == golden.read_text()


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 2**-7), ("fp32", 1e-6)])
@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
def test_export_reads_back_everywhere(tmp_path: Path, dtype: str, limit: float, scale: float):
    """An export is read back here, by diffusers and by ComfyUI, within the rounding of its type."""
    lora = random_lora(scale=scale)
    path = tmp_path / "x.safetensors"
    lora_file.export_lora(path, lora, dtype, {"format": "pt"})
    assert verify.verify_export(path, lora, dtype, TINY) <= limit
    back = lora_file.read_lora(path)
    assert back.keys() == lora.keys()
    for module in lora:
        assert back[module].scale == 1.0
        assert torch.allclose(back[module].delta(), lora[module].delta(), rtol=0, atol=limit * 100)
    alphas = {float(tensor) for key, tensor in load_file(path).items() if key.endswith(".alpha")}
    assert alphas == {4.0}


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    for part in ("lora_A.weight", "lora_B.weight"):
        a, b = f"diffusion_model.{one}.{part}", f"diffusion_model.{other}.{part}"
        tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: swap(t, "layers.0.attention.to_q", "layers.0.attention.to_v"), "relative error"),
        (
            lambda t: t.update({k: v * 2 for k, v in t.items() if k.endswith("0.attention.to_q.alpha")}),
            "relative error",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("diffusion_model.layers.1.")], "of 14 modules"),
        (lambda t: t.update({k.replace("diffusion_model.", "lora_unet_"): t.pop(k) for k in list(t)}), "."),
    ],
    ids=["q and v exchanged", "alpha doubled", "a layer lost", "renamed"],
)
def test_verify_notices_wrong_loading(tmp_path: Path, spoil, message: str):
    """Verification notices whatever a loader would get wrong."""
    lora, path = random_lora(), tmp_path / "x.safetensors"
    lora_file.export_lora(path, lora, "fp32", {})
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises((WeightsError, ValueError), match=message):
        verify.verify_export(path, lora, "fp32", TINY)


def test_export_bytes_are_reproducible(tmp_path: Path):
    """Equal exports have equal bytes and sorted metadata."""
    metadata = {f"key{index}": str(index) for index in range(9)}
    for name in ("a", "b"):
        lora_file.export_lora(
            tmp_path / name, random_lora(), "bf16", dict(reversed(metadata.items())) if name == "b" else metadata
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_export_refuses_non_finite_values(tmp_path: Path):
    """Values that are not finite are never exported."""
    lora = random_lora()
    lora["layers.0.attention.to_q"].b[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        lora_file.export_lora(tmp_path / "x.safetensors", lora, "bf16", {})
    assert not list(tmp_path.iterdir())


def test_distance_equals_the_dense_one():
    one, other = random_lora(seed=1, scale=0.5), random_lora(seed=2)
    module = "layers.0.feed_forward.w1"
    dense = torch.linalg.norm((one[module].delta() - other[module].delta()).double())
    dense = dense / torch.linalg.norm(one[module].delta().double())
    assert verify.relative_error(one[module], other[module]) == pytest.approx(float(dense), rel=1e-5)
    assert verify.relative_error(one[module], one[module]) < 1e-7


@pytest.mark.parametrize(
    "layout", ["diffusion_model.{m}.lora_{p}.weight", "{m}.lora_{p}.default.weight", "transformer.{m}.lora_{p}.weight"]
)
def test_loras_of_other_tools_are_read(tmp_path: Path, layout: str):
    lora, path = random_lora(), tmp_path / "x.safetensors"
    tensors = {layout.format(m=m, p=p): t for m, f in lora.items() for p, t in (("A", f.a), ("B", f.b))}
    save_file(tensors, path)
    back = lora_file.read_lora(path)
    assert all(torch.equal(back[m].delta(), lora[m].delta()) for m in lora)


def test_alpha_in_a_file_scales_the_change(tmp_path: Path):
    lora, path = random_lora(), tmp_path / "x.safetensors"
    tensors = {
        f"diffusion_model.{m}.{k}": t
        for m, f in lora.items()
        for k, t in (("lora_down.weight", f.a), ("lora_up.weight", f.b))
    }
    tensors |= {f"diffusion_model.{m}.alpha": torch.tensor(1.0) for m in lora}
    save_file(tensors, path)
    assert all(torch.allclose(factors.delta(), lora[m].delta() / 4) for m, factors in lora_file.read_lora(path).items())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 4), "text.x": torch.zeros(1)},
            "Stable Diffusion LoRA",
        ),
        ({"layers.0.attention.to_q.lora_A.weight": torch.zeros(2, 4)}, "A, B or alpha are missing or do not fit"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 4), f"{Q}.lora_B.weight": torch.zeros(4, 3)}, "do not fit"),
        ({f"{Q}.lora_A.weight": torch.zeros(0, 4), f"{Q}.lora_B.weight": torch.zeros(4, 0)}, "do not fit"),
        (
            {f"{Q}.lora_A.weight": torch.full((2, 4), float("nan")), f"{Q}.lora_B.weight": torch.zeros(4, 2)},
            "not finite",
        ),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 4).int(), f"{Q}.lora_B.weight": torch.zeros(4, 2)}, "holds int32"),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(2, 4),
                f"{Q}.lora_B.weight": torch.zeros(4, 2),
                f"{Q}.alpha": torch.zeros(2),
            },
            "alpha are missing or do not fit",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(2, 4),
                f"{Q}.lora_B.weight": torch.zeros(4, 2),
                f"diffusion_model.{Q}.lora_down.weight": torch.ones(2, 4),
            },
            "holds 1 tensors twice",
        ),
        ({}, "holds no LoRA"),
    ],
)
def test_files_that_are_no_lora_are_refused(tmp_path: Path, tensors, message: str):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=message) as error:
        lora_file.read_lora(path)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("alpha", [True, float("nan"), -1, 0, 1e9, "8", [8]])
def test_alpha_that_is_invalid(tmp_path: Path, alpha):
    """An invalid alpha in the metadata is refused."""
    path = tmp_path / "x.safetensors"
    tensors = {f"transformer.{Q}.lora_A.weight": torch.ones(2, 4), f"transformer.{Q}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})})
    with pytest.raises(WeightsError, match="its metadata says that alpha is"):
        lora_file.read_lora(path)


@pytest.mark.parametrize(("more", "alphas"), [({}, (4.0, 2.0)), ({"use_rslora": True}, (4 * 2**0.5, 2 * 2**0.5))])
def test_alpha_for_each_module(tmp_path: Path, more, alphas):
    """An alpha for each module is taken from the header, as peft does."""
    path = tmp_path / "x.safetensors"
    modules = ["layers.0.attention.to_q", "layers.1.attention.to_q"]
    shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
    tensors = {f"transformer.{m}.{part}.weight": torch.ones(size) for m in modules for part, size in shapes.items()}
    config = {"lora_alpha": 4, "r": 2, "alpha_pattern": {"layers.1.attention.to_q": 2}, **more}
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata)})
    found = lora_file.read_lora(path)
    assert [found[module].scale for module in modules] == pytest.approx([alpha / 2 for alpha in alphas])


def test_fp8_lora_is_read(tmp_path: Path):
    """A LoRA in fp8 is read, and a LoRA with a bad value is refused."""
    path = tmp_path / "x.safetensors"
    values = {f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora_B.weight": torch.full((4, 2), 0.5)}
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in values.items()}, path)
    assert torch.equal(lora_file.read_lora(path)[Q].delta(), torch.ones(4, 4))
    values[f"{Q}.lora_B.weight"][0, 0] = float("nan")
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in values.items()}, path)
    with pytest.raises(WeightsError, match="not finite"):
        lora_file.read_lora(path)


# In the model


@pytest.fixture
def frozen() -> FrozenTransformer:
    return load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)


def inputs(shape: TransformerShape) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return (
        torch.randn(1, 16, 8, 8, generator=draw),
        torch.tensor([0.6]),
        [torch.randn(9, shape.cap_feat_dim, generator=draw)],
    )


def test_a_fresh_lora_changes_nothing(frozen: FrozenTransformer):
    before = velocity(frozen.model, *inputs(frozen.shape))
    layers.attach_lora(frozen.model, LoraSettings(rank=4), select_modules(["attention"], frozen.shape.linears), 1)
    assert torch.equal(velocity(frozen.model, *inputs(frozen.shape)), before)


def test_init_depends_on_seed_and_name(frozen: FrozenTransformer):
    """The initial LoRA depends on the seed and the module's name alone."""
    first = layers.attach_lora(
        frozen.model, LoraSettings(rank=4), select_modules(["attention"], frozen.shape.linears), 1
    )
    torch.randn(100)
    other_model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model
    second = layers.attach_lora(
        other_model, LoraSettings(rank=4), select_modules(["attention", "adaln"], frozen.shape.linears), 1
    )
    assert all(torch.equal(first.a[module], second.a[module]) for module in first.a)
    third_model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model
    third = layers.attach_lora(third_model, LoraSettings(rank=4), list(first.a), 2)
    assert not any(torch.equal(first.a[module], third.a[module]) for module in first.a)


def test_masters_are_fp32():
    """Master weights are fp32 on a bf16 model, and only they are trained."""
    model = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU)
    attached = layers.attach_lora(
        model.model, LoraSettings(rank=4), select_modules(["attention"], model.shape.linears), 1
    )
    assert {parameter.dtype for parameter in attached.parameters()} == {torch.float32}
    trainable = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in attached.parameters()}
    x, sigma, prompt = inputs(model.shape)
    velocity(model.model, x, sigma, [prompt[0].bfloat16()]).sum().backward()
    assert all(parameter.grad is not None for parameter in attached.b.values())


@pytest.mark.parametrize("alpha", [None, 2.0, 8.0])
def test_attached_equals_merged(frozen: FrozenTransformer, alpha: float | None):
    modules = select_modules(["attention", "feed_forward"], frozen.shape.linears)
    attached = layers.attach_lora(frozen.model, LoraSettings(rank=4, alpha=alpha), modules, 1)
    with torch.no_grad():
        for module, b in attached.b.items():
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(len(module))) * 0.05)
    merged = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU)
    with torch.no_grad():
        for module, factors in attached.deltas().items():
            merged.model.get_submodule(module).weight += (alpha or 4) / 4 * (factors.b @ factors.a)
    got, expected = (velocity(model, *inputs(frozen.shape)) for model in (frozen.model, merged.model))
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(
        got,
        velocity(load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model, *inputs(frozen.shape)),
        atol=1e-2,
    )


def test_stacked_loras_are_summed(frozen: FrozenTransformer):
    """Stacked LoRAs are the weighted sum of their changes."""
    one, other = random_lora(frozen.shape, rank=4, scale=0.5, seed=1), random_lora(frozen.shape, rank=2, seed=2)
    other.pop("layers.0.attention.to_q")
    stacked = arithmetic.sum_deltas([(one, 0.8), (other, -0.6)])
    for module in one:
        expected = 0.8 * one[module].delta() - (0.6 * other[module].delta() if module in other else 0)
        assert torch.allclose(stacked[module].delta(), expected, atol=1e-4)
    assert stacked["layers.0.attention.to_k"].rank == 6
    attached = layers.attach_fixed_lora(frozen.model, stacked)
    assert {m: a.shape[0] for m, a in attached.a.items()} == {m: f.rank for m, f in stacked.items()}
    for module, factors in attached.deltas().items():
        assert torch.allclose(factors.delta(), stacked[module].delta(), atol=1e-5)


def test_a_state_of_another_rank_is_refused(frozen: FrozenTransformer):
    attached = layers.attach_lora(
        frozen.model, LoraSettings(rank=4), select_modules(["attention"], frozen.shape.linears), 1
    )
    state = {name: torch.zeros(3, *tensor.shape[1:]) for name, tensor in attached.state().items()}
    with pytest.raises(WeightsError, match="rank"):
        attached.load_state(state, "here")
