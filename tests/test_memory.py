"""The memory estimate, against bytes counted on the real graph at the full width."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model

from zimage_train import memory
from zimage_train.config.schema import Config
from zimage_train.data.buckets import Bucket
from zimage_train.lora import names
from zimage_train.model.shapes import TransformerShape
from zimage_train.model.transformer import velocity

FULL = TransformerShape()
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def counted(shape: TransformerShape, side: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one forward pass, weights not counted, without allocating any."""
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**shape.config()).to(dtype).requires_grad_(False)
        config = LoraConfig(r=16, target_modules=names.select(["attention", "feed_forward"], shape.linears))
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        x, prompt = torch.randn(1, 16, side // 8, side // 8), torch.randn(64, shape.cap_feat_dim, dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            velocity(model, x, torch.rand(1), [prompt])
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_bytes_of_a_block_are_those_of_the_estimate(dtype: str):
    """On the meta device attention keeps its matrices, quadratic in tokens; two sizes separate them from the rest."""

    def a_block(side: int) -> tuple[int, float]:
        tokens = (side // 16) ** 2 + 64
        more, fewer = (counted(replace(FULL, n_layers=n), side, DTYPES[dtype]) for n in (3, 2))
        return tokens, (more - fewer) / tokens

    (tokens_a, bytes_a), (tokens_b, bytes_b) = a_block(512), a_block(1024)
    quadratic = (bytes_b - bytes_a) / (tokens_b - tokens_a)
    linear = bytes_a - quadratic * tokens_a
    assert linear / FULL.dim == pytest.approx(memory.SAVED_BYTES_PER_DIM[dtype], rel=0.03)


def estimate(config, checkpointing: bool, side: int = 1024) -> memory.Estimate:
    modules = names.select(config.lora.targets, FULL.linears)
    return memory.estimate(config, FULL, modules, Counter([Bucket(side, side)] * 99), checkpointing, gpu=True)


def test_the_full_model_needs_recomputation_on_24_gb_and_fits_with_it(make_config):
    config = make_config(
        model={"dtype": "bf16"}, train={"batch_size": 1}, lora={"rank": 16}, optimizer={"name": "adamw8bit"}
    )
    card = int(25.8e9)
    modules = names.select(config.lora.targets, FULL.linears)
    chosen, why = memory.choose_checkpointing(config, FULL, modules, Counter([Bucket(1024, 1024)] * 99), card, True)
    assert chosen and "GB" in why
    assert estimate(config, True).total < card < estimate(config, False).total
    assert estimate(config, True).weights == 2 * 6_154_908_736
    assert not memory.choose_checkpointing(config, FULL, modules, Counter([Bucket(1024, 1024)] * 99), int(141e9), True)[
        0
    ]


def test_the_config_has_the_last_word_on_checkpointing(make_config):
    for wanted in (True, False):
        config = make_config(memory={"checkpointing": wanted})
        modules = names.select(config.lora.targets, FULL.linears)
        assert memory.choose_checkpointing(config, FULL, modules, Counter([Bucket(64, 64)] * 99), 1, True)[0] is wanted


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"lora": {"rank": 64}}, "lora"),
        ({"train": {"batch_size": 2}}, "activations"),
        ({"model": {"dtype": "fp32"}}, "weights"),
    ],
)
def test_what_costs_memory_raises_its_part(make_config, change: dict, part: str):
    base = {"model": {"dtype": "bf16"}, "train": {"batch_size": 1}}
    smaller, larger = estimate(make_config(**base), True), estimate(make_config(**(base | change)), True)
    assert getattr(larger, part) > getattr(smaller, part)


def test_a_batch_is_never_larger_than_the_data(make_config):
    config = make_config(train={"batch_size": 64})
    few = memory.estimate(config, FULL, list(FULL.linears), Counter([Bucket(512, 512)] * 3), False, gpu=True)
    assert few.tokens == 3 * (1024 + memory.CAPTION_TOKENS)


SIZES = Counter({Bucket(1024, 1024): 20, Bucket(768, 1024): 20})


def published(**changes: Any) -> tuple[Config, TransformerShape, list[str]]:
    config = Config.model_validate({"name": "x", "data": [{"folder": "p"}], **changes})
    return config, TransformerShape(), names.select(config.lora.targets, TransformerShape().linears)


@pytest.mark.parametrize("limit_gb", [80, 48, 24, 20, 16, 14.5])
def test_the_smaller_plan_that_is_named_is_predicted_to_fit(limit_gb: float):
    config, shape, modules = published(train={"batch_size": 4}, lora={"rank": 64})
    said = memory.smaller(config, shape, modules, SIZES, int(limit_gb * 1e9), True)
    wanted = dict(re.findall(r"([a-z_.]+): (\w+)", said.partition(" (predicted")[0]))
    sizes = SIZES
    if side := wanted.get("data.resolution"):
        sizes = Counter({Bucket(int(side), int(side)): 40})
    batch, rank = int(wanted.get("train.batch_size", 4)), int(wanted.get("lora.rank", 64))
    changed, _, _ = published(train={"batch_size": batch}, lora={"rank": rank})
    total = memory.estimate(changed, shape, modules, sizes, wanted["memory.checkpointing"] == "true", True).total
    assert total <= limit_gb * 1e9
    assert f"predicted: {total / 1e9:.2f} GB" in said


def test_where_no_plan_fits_the_least_is_named():
    config, shape, modules = published()
    said = memory.smaller(config, shape, modules, SIZES, int(8e9), True)
    least = published(lora={"rank": 8}, train={"batch_size": 1})[0]
    total = memory.estimate(least, shape, modules, Counter({Bucket(512, 512): 1}), True, True).total
    assert said == f"a step takes {total / 1e9:.2f} GB at the least (predicted), so more memory is needed"


def test_what_is_small_already_is_not_asked_for():
    config, shape, modules = published(lora={"rank": 4}, memory={"checkpointing": True}, train={"batch_size": 1})
    said = memory.smaller(config, shape, modules, SIZES, int(15e9), True)
    assert "rank" not in said and "batch_size" not in said and "checkpointing" not in said
