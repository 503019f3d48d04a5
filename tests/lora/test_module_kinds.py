"""Kinds of adapters whose layers run as modules: their formulas, files, and what the plan counts of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig
from peft.tuners.loha import Linear as PeftLoHa
from peft.tuners.lora import Linear as PeftLora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.errors import ConfigError, WeightsError
from zimage_train.lora import fused_block, headers, lora_file, swap, verify
from zimage_train.lora.deltas import Dora, Rotation, cayley
from zimage_train.lora.module_kinds import (
    DoraLinear,
    HadamardLinear,
    RotatedLinear,
    TrainedModule,
    _from_above,
    _turn,
)
from zimage_train.models import locate
from zimage_train.planning.preflight import check_run, workload_of
from zimage_train.planning.workload import fuses_blocks

from steps import gradients, loss_of, unfused

LOHA = LoraSettings(type="loha", rank=3, alpha=1.5)
DORA = LoraSettings(type="dora", rank=3, alpha=1.5)
OFT = LoraSettings(type="oft", rank=8)
KINDS = pytest.mark.parametrize("lora", [LOHA, DORA, OFT], ids=lambda lora: lora.type)
SIZE = st.integers(1, 6)


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def loha_weight(weight: Tensor, parts: dict[str, Tensor], scale: float) -> Tensor:
    """W'[i, j] = W[i, j] + scale * sum_r B1[i, r] A1[r, j] * sum_s B2[i, s] A2[s, j]."""
    return weight + scale * torch.einsum("ir,rj,is,sj->ij", parts["w1_a"], parts["w1_b"], parts["w2_a"], parts["w2_b"])


def layer_of(kind: type[TrainedModule], weight: Tensor, parts: dict[str, Tensor], scale: float) -> TrainedModule:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return kind(base, {name: nn.Parameter(part.clone()) for name, part in parts.items()}, scale)


def compare_in_float64(kind: type[TrainedModule], formula, parts: dict[str, Tensor], size: tuple[int, int]) -> None:
    """The output and every gradient of a layer are those of a linear layer with the weight that `formula` gives."""
    draw = torch.Generator().manual_seed(size[0])
    weight = torch.randn(*size, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 3, size[1], generator=draw, dtype=torch.float64)
    leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
    x_leaf, x_own = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = x_leaf @ formula(weight, leaves, 0.7).T
    grad = torch.randn(wanted.shape, generator=draw, dtype=torch.float64)
    wanted.backward(grad)
    layer = layer_of(kind, weight, parts, 0.7)
    found = layer(x_own)
    found.backward(grad)
    assert torch.allclose(found, wanted, atol=1e-12) and torch.allclose(x_own.grad, x_leaf.grad, atol=1e-12)
    for name, leaf in leaves.items():
        assert torch.allclose(layer.parts[name].grad, leaf.grad, atol=1e-12), name


def random_parts(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(SIZE, SIZE), rank=SIZE)
def test_loha_and_gradients(size: tuple[int, int], rank: int):
    shapes = {"w1_a": (size[0], rank), "w1_b": (rank, size[1]), "w2_a": (size[0], rank), "w2_b": (rank, size[1])}
    compare_in_float64(HadamardLinear, loha_weight, random_parts(shapes, rank), size)


def dora_weight(weight: Tensor, parts: dict[str, Tensor], scale: float) -> Tensor:
    """W'[i, j] = (1 + gain[i]) (W[i, j] + scale * sum_r B[i, r] A[r, j])."""
    return (1.0 + parts["gain"])[:, None] * (weight + scale * torch.einsum("ir,rj->ij", parts["B"], parts["A"]))


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(SIZE, SIZE), rank=SIZE)
def test_dora_and_gradients(size: tuple[int, int], rank: int):
    shapes = {"A": (rank, size[1]), "B": (size[0], rank), "gain": (size[0],)}
    compare_in_float64(DoraLinear, dora_weight, random_parts(shapes, rank), size)


def comfyui_dora(weight: Tensor, lora_diff: Tensor, dora_scale: Tensor, strength: float) -> Tensor:
    """What ComfyUI 0.29 makes of a weight by a dora_scale (out, 1)."""
    moved = (weight + lora_diff) * (dora_scale / weight.norm(dim=1, keepdim=True))
    return weight + strength * (moved - weight)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora_is_that_of_comfyui_and_peft(strength: float):
    """The weights are ComfyUI's, and those of peft's own layer whose magnitude is scaled by ||W + B A|| / ||W||."""
    parts = {name: part.float() for name, part in random_parts({"A": (4, 10), "B": (12, 4), "gain": (12,)}, 1).items()}
    weight = torch.randn(12, 10)
    delta = DoraLinear.delta(parts, 0.5, weight.norm(dim=1)).times(strength)
    assert isinstance(delta, Dora)
    product = 0.5 * parts["B"] @ parts["A"]
    found = weight + delta.change(weight)
    assert relative(found, comfyui_dora(weight, product, delta.magnitude[:, None], strength)) < 1e-6
    x = torch.randn(7, 10)
    trained = layer_of(DoraLinear, weight, parts, 0.5)(x)
    assert relative(x @ found.T, x @ weight.T + strength * (trained - x @ weight.T)) < 1e-5
    if strength == 1.0:
        base = nn.Linear(10, 12, bias=False)
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        config = LoraConfig(r=4, lora_alpha=2, use_dora=True)
        peft = PeftLora(base, "default", config=config, r=4, lora_alpha=2)
        peft.lora_A["default"].weight.data.copy_(parts["A"])
        peft.lora_B["default"].weight.data.copy_(parts["B"])
        magnitude = delta.magnitude * (weight + product).norm(dim=1) / weight.norm(dim=1)
        peft.lora_magnitude_vector["default"].weight.data.copy_(magnitude)
        assert relative(x @ found.T, peft(x)) < 1e-5


def oft_weight(weight: Tensor, parts: dict[str, Tensor], scale: float) -> Tensor:
    """W' = R' W in each group of three rows, with R = (I + Q) (I - Q)^-1 by the inverse."""
    groups: list[Tensor] = []
    for rows, (a, b, c) in zip(weight.split(3), parts["above"], strict=True):
        zero = torch.zeros_like(a)
        q = torch.stack([torch.stack(row) for row in ((zero, a, b), (-a, zero, c), (-b, -c, zero))])
        identity = torch.eye(3, dtype=weight.dtype)
        groups.append(((identity + q) @ torch.linalg.inv(identity - q)).T @ rows)
    return torch.cat(groups)


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 4), inputs=SIZE)
def test_oft_and_gradients(groups: int, inputs: int):
    compare_in_float64(RotatedLinear, oft_weight, random_parts({"above": (groups, 3)}, groups), (3 * groups, inputs))


def comfyui_oft(weight: Tensor, blocks: Tensor, strength: float) -> Tensor:
    """What ComfyUI 0.29 makes of a weight by oft_blocks without a constraint."""
    q, identity = blocks - blocks.transpose(1, 2), torch.eye(blocks.shape[1])
    r = (identity + q) @ torch.linalg.inv(identity - q)
    rows = weight.view(*blocks.shape[:2], -1)
    change = torch.einsum("knm,kni->kmi", r * strength - strength * identity, rows)
    return weight + strength * change.reshape(weight.shape)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_oft_is_that_of_comfyui(strength: float):
    """The blocks of a file, of which LyCORIS trains both sides of the diagonal, give ComfyUI's weights."""
    blocks, weight = torch.randn(3, 4, 4) / 4, torch.randn(12, 10)
    delta = Rotation(blocks).times(strength)
    found = weight + delta.change(weight)
    assert relative(found, comfyui_oft(weight, blocks, strength)) < 1e-6
    if strength == 1.0:
        assert relative(found.norm(dim=0), weight.norm(dim=0)) < 1e-6  # of all groups together
        parts = {name: part.float() for name, part in RotatedLinear.parts_of(delta, 1.0, None).items()}
        assert relative(layer_of(RotatedLinear, weight, parts, 1.0)(torch.eye(10)), found.T) < 1e-6


def test_small_rotations_are_kept():
    """In bf16 the output moves by a rotation whose matrix rounds to the identity."""
    weight = torch.randn(64, 32).bfloat16()
    parts = {"above": torch.full((8, 28), 1e-4)}
    layer, x = layer_of(RotatedLinear, weight, parts, 1.0), torch.randn(9, 32).bfloat16()
    exact = layer_of(RotatedLinear, weight.float(), parts, 1.0)(x.float()) - x.float() @ weight.float().T
    with torch.no_grad():
        turned = _turn(x @ weight.T, cayley(_from_above(parts["above"]) - _from_above(parts["above"]).mT))
    assert (torch.eye(8) + 2e-4).bfloat16().diagonal().eq(1.0).all()
    assert relative(turned, exact) < 0.02 and layer(x).dtype == torch.bfloat16


def test_loha_is_that_of_peft():
    """peft's own layer on an nn.Linear computes the same, forward and backward."""
    size, rank = (12, 10), 4
    shapes = {"w1_a": (12, rank), "w1_b": (rank, 10), "w2_a": (12, rank), "w2_b": (rank, 10)}
    parts = {name: part.float() for name, part in random_parts(shapes, 1).items()}
    weight = torch.randn(size)
    ours, base = layer_of(HadamardLinear, weight, parts, 0.5), nn.Linear(10, 12, bias=False)
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    peft = PeftLoHa(base, "default", LoHaConfig(r=rank, alpha=2), r=rank, alpha=2)
    for name, part in parts.items():
        getattr(peft, f"hada_{name}")["default"].data.copy_(part)
    x = torch.randn(7, 10)
    one, other = ours(x), peft(x)
    assert relative(one, other) < 1e-6
    one.square().sum().backward()
    other.square().sum().backward()
    for name in parts:
        assert relative(ours.parts[name].grad, getattr(peft, f"hada_{name}")["default"].grad) < 1e-5


@KINDS
def test_a_new_adapter_changes_nothing(lora: LoraSettings):
    """The first step has the loss of the model alone, and a gradient for what starts at zero."""
    frozen, attached = unfused("none", lora=lora)
    for name, view in attached.flat.views.items():
        if name.endswith((".w2_b", ".B", ".gain", ".above")):
            view.data.zero_()
    loss, *grads = gradients(frozen, attached)
    with swap.replaced_lora(frozen.model, {}):
        assert torch.equal(loss, loss_of(frozen))
    assert sum(bool(grad.any()) for grad in grads) == len(attached.modules) * len(attached.kind.zeros)


@KINDS
@pytest.mark.parametrize(("kind", "streamed"), [("int8", 0), (None, 2), ("int8", 2)])
def test_quantised_and_streamed(lora: LoraSettings, kind: str | None, streamed: int):
    """Streaming keeps the bits, in which a mode recomputes; each part has a gradient on a quantised model."""
    wanted = gradients(*unfused("none", kind, lora=lora))
    found = gradients(*unfused("full", kind, streamed=streamed, lora=lora))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(grad.abs().max() > 0 for grad in found[1:])


@KINDS
def test_finished_deltas_compute_the_same(lora: LoraSettings):
    """What sampling attaches computes what the training computes, and so does a model with the change in its weights.

    On a quantised model as well, where nothing is added to weights.
    """
    for kind in (None, "int8"):
        frozen, attached = unfused("none", kind, lora=lora)
        loss, deltas = gradients(frozen, attached)[0], attached.deltas()
        with swap.replaced_lora(frozen.model, deltas):
            fixed = loss_of(frozen)
        with swap.replaced_lora(frozen.model, {}):
            without = loss_of(frozen)
            if kind is None:
                for module, delta in deltas.items():
                    weight = frozen.model.get_submodule(module).weight
                    weight.data.copy_(weight + delta.change(weight))
                assert relative(loss_of(frozen), loss) < 1e-5
        assert relative(fixed, loss) < 1e-6 < 1e-5 < relative(without, loss)


@KINDS
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("bf16", 2**-7)])
def test_export_reads_back(tmp_path: Path, lora: LoraSettings, dtype: str, limit: float):
    """ComfyUI and this package read the trained weights, under keys that ComfyUI knows."""
    deltas, shape = unfused("none", lora=lora)[1].deltas(), locate.transformer_tensors(mini.TURBO / "transformer")[0]
    path = tmp_path / "x.safetensors"
    lora_file.export_lora(path, deltas, dtype, {"format": "pt"})
    prefix = "diffusion_model.layers.0.attention.to_q."
    found = {key.removeprefix(prefix) for key in load_file(path) if key.startswith(prefix)}
    keys = {
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        "dora": {"lora_A.weight", "lora_B.weight", "dora_scale", "alpha"},
        "oft": {"oft_blocks", "alpha"},
    }
    assert found == keys[lora.type]
    for loaded in (verify.as_comfyui(path, shape.linears), lora_file.read_deltas(path, headers.READ)):
        assert loaded.keys() == deltas.keys()
        for module, delta in deltas.items():
            weight = torch.randn(shape.linears[module], generator=torch.Generator().manual_seed(2)) / 10
            assert relative(loaded[module].change(weight), delta.change(weight)) < limit
    assert verify.verify_export(path, deltas, dtype, shape) < limit


def test_an_oft_with_a_constraint(tmp_path: Path):
    """What its alpha limits in ComfyUI is not read, and the line says what to do."""
    path = tmp_path / "x.safetensors"
    name = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{name}.oft_blocks": torch.randn(12, 8, 8), f"{name}.alpha": torch.tensor(0.001)}, path)
    with pytest.raises(WeightsError, match=r"to_q has a constraint \(alpha 0.001\); use it in ComfyUI"):
        lora_file.read_deltas(path, headers.READ)


def test_oft_groups_must_divide_rows(make_config):
    config = make_config(lora={"type": "oft", "rank": 40}, model={"adapter": None})
    with pytest.raises(ConfigError, match=r"layers.0.* has 96 rows, which are no groups of 40; set lora.rank: 32"):
        check_run(config)


@KINDS
def test_plan_runs_it_as_modules(make_config, lora: LoraSettings):
    """The plan counts the parameters of the layers, and blocks that are not fused."""
    chosen = lora.model_dump(include={"type", "rank", "alpha"})
    config = make_config(lora=chosen, model={"adapter": None})
    workload = workload_of(check_run(config), gpu=True)
    frozen, attached = unfused("none", lora=lora)
    assert workload.trained == attached.flat.numel and not workload.is_fused
    assert not fuses_blocks(config, attached.modules, gpu=False)
    assert not any(fused_block.is_served(block) for block in frozen.model.layers)
