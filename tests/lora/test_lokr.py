"""LoKr: the change is a Kronecker product, in training, in files, and as other programs read it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.config.types import RECOMPUTE_MODES
from zimage_train.dataset.buckets import Bucket
from zimage_train.lora import fused_block, lora_file, verify
from zimage_train.lora.deltas import Kronecker
from zimage_train.lora.kronecker import KroneckerLinear, KroneckerTerm
from zimage_train.lora.kronecker_shapes import divide, kronecker_shape, shapes_of
from zimage_train.models import locate
from zimage_train.planning.flops import step_seconds
from zimage_train.planning.gpus import get_gpu
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.preflight import check_run, workload_of

import workloads
from steps import FULL, gradients, trained, unfused

WHOLE = LoraSettings(type="lokr", factor=4)
LOW_RANK = LoraSettings(type="lokr", factor=4, rank=3, alpha=1.5)
BOTH = pytest.mark.parametrize("lora", [WHOLE, LOW_RANK], ids=["whole", "low rank"])
SIZE = st.integers(1, 6)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@given(size=st.integers(1, 20_000), factor=st.none() | st.integers(1, 256))
def test_sizes_are_divided_as_in_peft(size: int, factor: int | None):
    divided = divide(size, factor)
    assert divided == factorization(size, -1 if factor is None else factor) and type(divided[1]) is int


@pytest.mark.parametrize(
    ("rank", "parts"),
    [
        (None, {"w1": (16, 16), "w2": (640, 240)}),
        (320, {"w1": (16, 16), "w2": (640, 240)}),  # from half of the longer side on
        (319, {"w1": (16, 16), "w2_a": (640, 319), "w2_b": (319, 240)}),
    ],
)
def test_shapes_at_full_size(rank: int | None, parts: dict[str, tuple[int, int]]):
    shape = kronecker_shape((10240, 3840), 16, rank)
    assert shape.parts == parts and shape.numel == sum(rows * columns for rows, columns in parts.values())


def dense(parts: dict[str, Tensor], scale: float) -> Tensor:
    """The change as its definition has it: weight[i k + p, j n + q] = W1[i, j] W2[p, q]."""
    w2 = parts["w2"] if "w2" in parts else torch.einsum("kr,rn->kn", parts["w2_a"], parts["w2_b"])
    product = torch.einsum("ij,pq->ipjq", parts["w1"], w2)
    return scale * product.reshape(product.shape[0] * product.shape[1], -1)


@settings(max_examples=40, deadline=None)
@given(outer=st.tuples(SIZE, SIZE), inner=st.tuples(SIZE, SIZE), rank=st.none() | SIZE, rows=SIZE)
def test_product_and_gradients(outer: tuple[int, int], inner: tuple[int, int], rank: int | None, rows: int):
    """Output and every gradient are those of the dense change, in float64."""
    draw = torch.Generator().manual_seed(rows)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    parts = {"w1": random(*outer)}
    parts |= (
        {"w2": random(*inner)} if rank is None else {"w2_a": random(inner[0], rank), "w2_b": random(rank, inner[1])}
    )
    x, y = random(rows, outer[1] * inner[1]), random(rows, outer[0] * inner[0])
    leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
    x_leaf = x.clone().requires_grad_()
    wanted = y + x_leaf @ dense(leaves, 0.7).T
    grad = random(*wanted.shape)
    wanted.backward(grad)
    term, found = KroneckerTerm(parts, 0.7), y.clone()
    term.add(x, found)
    grads, grad_x = (
        KroneckerTerm({name: torch.full_like(part, 9.0) for name, part in parts.items()}, 0.7),
        y.new_ones(x.shape),
    )
    term.backward(x, grad, grads, grad_x)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(grad_x - 1.0, x_leaf.grad, atol=1e-12)  # added to what was there
    for name, leaf in leaves.items():
        assert torch.allclose(grads.parts[name], leaf.grad, atol=1e-12), name


@BOTH
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_fused_blocks_equal_modules(lora: LoraSettings, kind: str | None):
    loss, *grads = gradients(*trained("none", kind, lora=lora))
    wanted_loss, *wanted = gradients(*unfused("none", kind, lora=lora))
    assert relative(loss, wanted_loss) < 1e-6 and all(grad.abs().max() > 0 for grad in grads)
    assert max(relative(one, other) for one, other in zip(grads, wanted, strict=True)) < 1e-5


@BOTH
@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
def test_modes_and_streaming_keep_the_bits(lora: LoraSettings, mode: str):
    wanted = gradients(*trained("none", lora=lora))
    streamed = 2 if mode != "none" else 0
    found = gradients(*trained(mode, streamed=streamed, lora=lora))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_some_layers_of_a_product():
    """A LoKr on k and v alone is served in the product of q, k and v, and one outside the blocks as a module."""
    for groups in ((".to_k", ".to_v"), ("attention", "adaln")):
        loss, *grads = gradients(*trained("full", groups=groups, lora=WHOLE))
        wanted_loss, *wanted = gradients(*unfused("none", groups=groups, lora=WHOLE))
        assert relative(loss, wanted_loss) < 1e-6
        assert max(relative(one, other) for one, other in zip(grads, wanted, strict=True)) < 1e-5


def test_all_blocks_are_fused():
    frozen, _ = unfused("none", lora=WHOLE)
    assert all(fused_block.is_served(block) for block in frozen.model.layers)


@BOTH
def test_step_equals_the_dense_change(lora: LoraSettings):
    """The loss with a LoKr is that of a model whose weights have the change added, as float64 forms it."""
    frozen, attached = unfused("none", lora=lora)
    merged, nothing = unfused("none", lora=lora)
    for name, view in nothing.flat.views.items():
        if name.endswith((".w2", ".w2_b")):
            view.data.zero_()
    unchanged = gradients(merged, nothing)[0]
    for name, layer in frozen.model.named_modules():
        if isinstance(layer, KroneckerLinear):
            parts = {part: matrix.detach().double() for part, matrix in layer.parts.items()}
            weight = merged.model.get_submodule(name).get_base_layer().weight
            weight.data.copy_(weight.double() + dense(parts, 0.5 if lora.rank else 1.0))
    loss = gradients(frozen, attached)[0]
    assert relative(loss, gradients(merged, nothing)[0]) < 1e-6 < 1e-5 < relative(loss, unchanged)


def deltas_of(lora: LoraSettings) -> dict[str, Kronecker]:
    return unfused("none", lora=lora)[1].deltas()


@BOTH
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("bf16", 2**-7)])
def test_export_reads_back_everywhere(tmp_path: Path, lora: LoraSettings, dtype: str, limit: float):
    """diffusers, ComfyUI and this package read the trained change, under the keys that AI Toolkit writes."""
    deltas, shape = deltas_of(lora), locate.transformer_tensors(mini.TURBO / "transformer")[0]
    path = tmp_path / "x.safetensors"
    lora_file.export_lora(path, deltas, dtype, {"format": "pt"})
    keys = {
        key.removeprefix("diffusion_model.layers.0.attention.to_q.")
        for key in load_file(path)
        if ".0.attention.to_q." in key
    }
    second = {"lokr_w2"} if lora.rank is None else {"lokr_w2_a", "lokr_w2_b"}
    assert keys == {"lokr_w1", "alpha", *second}
    for loaded in (
        verify.as_diffusers(path, shape),
        verify.as_comfyui(path, shape.linears),
        lora_file.read_deltas(path),
    ):
        assert loaded.keys() == deltas.keys()
        for module, delta in deltas.items():
            parts = {
                f"w{i}{end}": matrix
                for i, factor in ((1, delta.w1), (2, delta.w2))
                for end, matrix in zip(["_a", "_b"] if len(factor) == 2 else [""], factor, strict=True)
            }
            assert relative(loaded[module].delta(), dense(parts, delta.scale)) < limit
    assert verify.verify_export(path, deltas, dtype, shape) < limit


def test_products_are_counted():
    """`KroneckerShape.products` are the multiplications of W1 X W2', as torch counts them."""
    shape = kronecker_shape((120, 50), 8, None)
    with FlopCounterMode(display=False) as counter:
        for x in torch.randn(5, 5, 10):
            torch.randn(shape.w1) @ x @ torch.randn(shape.w2).T
    assert counter.get_total_flops() == 2 * 5 * shape.products
    assert shape.between == (torch.randn(shape.w1) @ x).numel()


@BOTH
def test_plan_counts_the_parameters(make_config, lora: LoraSettings):
    """The plan's number of parameters is that of the layers, and a step takes longer than one of a LoRA."""
    chosen = lora.model_dump(exclude={"targets", "init_from", "dropout"})
    workload = workload_of(check_run(make_config(lora=chosen)), gpu=True)
    assert workload.trained == unfused("none", lora=lora)[1].flat.numel
    full = workloads.workload((1024,), trained=0)
    shapes = shapes_of(lora, FULL.linears, workloads.MODULES)
    lokr = replace(full, lokr=tuple(shapes.values()))
    card = get_gpu("h100")
    seconds = [step_seconds(one, WeightPlacement(), "none", Bucket(1024, 1024), card) for one in (lokr, full)]
    assert 1.02 < seconds[0] / seconds[1] < 1.5
