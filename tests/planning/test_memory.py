"""The predicted memory, against bytes counted on the real graph, storage by storage, at full size, on meta."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL

from zimage_train import mini
from zimage_train.config.types import RECOMPUTE_MODES
from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.measure.counting import LiveBytes, flash_attention
from zimage_train.models import region_ops, transformer
from zimage_train.models.transformer import velocity
from zimage_train.planning import memory
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.recompute_costs import recompute_costs
from zimage_train.planning.workload import caption_tokens

from steps import FULL, counted_step
from workloads import CAPTION, MODULES, recipe, workload

CPU = torch.device("cpu")
SIDES = (512, 768, 1024)


def predicted(mode: str, side: int, kind: str | None, layers: int = 30, dtype: str = "bf16") -> int:
    """Weights, LoRA without optimizer, and activations: what the count below sees."""
    made = workload((side,), shape=replace(FULL, n_layers=layers), dtype=dtype)
    tokens = made.tokens(Bucket(side, side))
    assert tokens == (side // 16) ** 2 + CAPTION
    found = memory.step_memory(made, WeightPlacement(kind), mode, tokens)
    trained = 16 * sum(sum(FULL.linears[module]) for module in MODULES) * layers // 30
    return found.weights + found.activations + 8 * trained  # the LoRA and its gradients


@cache
def count(mode: str, side: int, kind: str | None, is_fused: bool = True) -> tuple[int, int]:
    """Bytes at the peak of a step of all 30 layers, and those of the weights, from those of two and three."""
    (peak, weights), (more, more_weights) = (of_layers(mode, side, kind, layers, is_fused) for layers in (2, 3))
    return peak + 28 * (more - peak), weights + 28 * (more_weights - weights)


def of_layers(mode: str, side: int, kind: str | None, layers: int, is_fused: bool = True) -> tuple[int, int]:
    step = counted_step(mode, side, layers, kind, region_ops if is_fused else None)
    return step.peak_bytes, step.weight_bytes


def counted(mode: str, side: int, kind: str | None) -> int:
    return count(mode, side, kind)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), [("none", None), ("w1w3", "int8")])
def test_two_layers_tell_what_thirty_take(mode: str, kind: str | None):
    assert count(mode, 768, kind) == pytest.approx(of_layers(mode, 768, kind, 30), rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "kind"),
    [(512, None), (768, None), (1024, None), (512, "fp8"), (768, "int8"), (1024, "nf4"), (1024, "fp8_fast")],
)
@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
def test_step_memory_within_5_percent(mode: str, side: int, kind: str | None):
    """The step of the full model is predicted within 5 % of the count."""
    assert predicted(mode, side, kind) == pytest.approx(counted(mode, side, kind), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
def test_activations_within_5_percent(mode: str):
    """Activations alone are predicted within 5 %, too.

    Without this, a constant that is wrong by half would hide behind 12 GB of weights.
    """
    for side in (512, 1024):
        for is_fused in (True, False):
            peak, weights = count(mode, side, None, is_fused)
            made = workload((side,), is_fused=is_fused)
            found = memory.step_memory(made, WeightPlacement(), mode, (side // 16) ** 2 + CAPTION).activations
            assert found == pytest.approx(peak - weights, rel=0.05)


@pytest.mark.slow
def test_quantized_takes_less_than_bf16():
    """With kept activations, a quantised model takes less than bf16 by what its weights save."""
    taken = {kind: counted("none", 512, kind) for kind in (None, "fp8", "int8", "nf4")}
    assert taken["fp8"] == taken["int8"] < taken[None] - 5.5e9
    assert taken["nf4"] < taken[None] - 8.5e9


@pytest.mark.parametrize(("dtype", "batch"), [("bf16", 1), ("bf16", 2), ("fp32", 1)])
def test_sampling_within_5_percent(dtype: str, batch: int):
    """Sampling is predicted within 5 % of the count."""
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = transformer.empty_transformer(replace(FULL, n_layers=3), torch_dtype, None)

    @torch.no_grad()
    def run() -> int:
        with torch.device("meta"), flash_attention(), LiveBytes() as live:
            for parameter in model.parameters():
                live.watch(parameter)
            weights = live.now
            x, prompt = torch.empty(batch, 16, 128, 128), torch.empty(CAPTION, 2560, dtype=torch_dtype)
            velocity(model, x, torch.empty(batch), [prompt] * batch)
            return live.peak - weights

    made = workload(dtype=dtype, previews=(recipe(1024, float(batch - 1)),))
    sampling = memory.FORWARD_BYTES[dtype] * FULL.dim * (4096 + CAPTION) * batch
    assert sampling == pytest.approx(run(), rel=0.05)
    assert memory.preview_memory(made, WeightPlacement()).activations >= sampling * 0.95


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).to(torch.bfloat16)


@pytest.mark.parametrize("side", SIDES)
def test_decoding_within_5_percent(side: int):
    """Decoding is predicted within 5 % of the count."""

    @torch.no_grad()
    def run() -> int:
        model = vae()
        with torch.device("meta"), flash_attention(), LiveBytes() as live:
            for parameter in model.parameters():
                live.watch(parameter)
            model.decode(torch.empty(1, 16, side // 8, side // 8, dtype=torch.bfloat16))
            return live.peak

    found = memory.preview_memory(workload(previews=(recipe(side),)), WeightPlacement()).activations
    assert found == pytest.approx(run(), rel=0.05)


@pytest.mark.parametrize("kind", [None, "fp8", "fp8_fast", "int8", "nf4"])
@pytest.mark.parametrize("streamed", [0, 1, 2, 3, 6])
def test_miniature_weights_to_the_byte(kind: str | None, streamed: int):
    """The weights of the miniature are counted to the byte."""
    frozen = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU, kind, streamed)
    made = workload(shape=frozen.shape, gpu=False)
    on_device = sum(tensor.untyped_storage().nbytes() for tensor in distinct_storages(frozen))
    if frozen.offloader is not None:
        at_home = sum(host.nbytes for host in frozen.offloader._host_blocks)
        assert at_home == pytest.approx(memory.host_bytes(made, WeightPlacement(kind, streamed)), rel=0.02)
    assert on_device == pytest.approx(memory.device_bytes(made, WeightPlacement(kind, streamed)), rel=0.02)
    if not streamed:
        weights = sum(parameter.nbytes for parameter in frozen.model.parameters())
        assert weights == memory.model_bytes(made, kind)


def distinct_storages(frozen: FrozenTransformer) -> list[torch.Tensor]:
    """A tensor of each storage on the device: of parameters, slots, and what weights are unpacked into."""
    tensors = list(frozen.model.parameters())
    tensors += [] if frozen.offloader is None else frozen.offloader._slots
    tensors += [layer.scratch for layer in frozen.model.modules() if getattr(layer, "scratch", None) is not None]
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())


def test_published_model_sizes():
    """The published model takes its known numbers of bytes."""
    assert memory.model_bytes(workload(), None) == 2 * 6_154_908_736
    assert memory.model_bytes(workload(), "int8") / 1e9 == pytest.approx(6.48, abs=0.01)
    assert memory.model_bytes(workload(), "nf4") / 1e9 == pytest.approx(3.47, abs=0.01)
    assert memory.block_bytes(workload(), None) / 1e6 == pytest.approx(361.8, abs=1)


def test_modes_are_ordered_by_memory():
    """The modes are in the order of the memory that they keep."""
    for is_fused in (True, False):
        costs = recompute_costs(is_fused)
        assert list(costs) == list(RECOMPUTE_MODES)
        for dtype in ("bf16", "fp32"):
            kept = [cost.kept_bytes[dtype] for cost in costs.values()]
            assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("mode", RECOMPUTE_MODES)
def test_the_most_tokens_that_fit_just_fit(mode: str):
    made = workload()
    most = memory.max_tokens_within(made, WeightPlacement(), mode, 24e9)
    assert (
        memory.step_memory(made, WeightPlacement(), mode, most).total
        <= 24e9
        < memory.step_memory(made, WeightPlacement(), mode, most + 20).total
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"trained": 10**9}, "lora"),
        ({"optimizer": "prodigy"}, "lora"),
        ({"batch_size": 2}, "activations"),
        ({"caption_tokens": 512}, "activations"),
        ({"dtype": "fp32"}, "weights"),
    ],
)
def test_what_costs_memory_raises_its_part(change: dict, part: str):
    plain, heavy = workload(), workload(**change)
    size = Bucket(1024, 1024)
    one, other = (memory.step_memory(made, WeightPlacement(), "full", made.tokens(size)) for made in (plain, heavy))
    assert getattr(other, part) > getattr(one, part)


def test_batch_is_at_most_the_data():
    """A batch is never larger than the dataset."""
    made = workload((512,), sizes=Counter({Bucket(512, 512): 3}), batch_size=64)
    assert made.max_tokens == 3 * (1024 + CAPTION)


@pytest.mark.parametrize(("text", "least", "most"), [("", 8, 32), ("a red circle", 12, 32), ("word " * 900, 512, 512)])
def test_caption_tokens_from_length(text: str, least: int, most: int):
    """The tokens of a caption are estimated from its length."""
    assert least <= caption_tokens(text) <= most
