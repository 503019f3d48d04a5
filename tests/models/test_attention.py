"""Attention's kernels: backward by groups of heads, and what `model.attention` stands for."""

import math

import pytest
import torch
from torch import Tensor

from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.models import attention, attention_choice
from zimage_train.models.attention_choice import attention_by, resolve_attention

from helpers import folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def drawn(b: int, heads: int, t: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    # As a block has them: the heads of a token side by side.
    return [torch.randn(b, t, heads, d, generator=draw).to(dtype).transpose(1, 2) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("groups", [(1, 4), (2, 3), (1, 1, 3)])
def test_groups_of_heads_give_the_same_bits(dtype: torch.dtype, has_bias: bool, groups: tuple[int, ...]):
    """The backward on groups of heads, one after the other, is the backward on all of them."""
    q, k, v, g = drawn(2, 5, 40, 16, dtype)
    mask = torch.arange(40).expand(2, -1) < torch.tensor([[40], [33]])
    bias = attention.bias_of(mask, 5, dtype) if has_bias else None
    kernel = attention.FLASH_CPU
    result, rest = kernel.forward(q, k, v, bias)
    whole = kernel.backward(g, q, k, v, bias, result, rest)
    parts = attention.in_head_groups(kernel.backward, groups, g, q, k, v, bias, result, rest)
    assert all(torch.equal(one, other) for one, other in zip(parts, whole, strict=True))
    assert all(part.transpose(1, 2).is_contiguous() for part in parts)


@pytest.mark.parametrize(
    ("multiprocessors", "tokens", "groups"),
    [
        (132, 4160, (8, 22)),  # H100: 30 heads would start 150 thread blocks
        (132, 1088, (30,)),
        (108, 4160, (3, 27)),  # A100
        (128, 4160, (14, 16)),  # 4090
    ],
)
def test_head_groups_fill_the_waves(multiprocessors: int, tokens: int, groups: tuple[int, ...]):
    assert attention.head_groups(1, 30, tokens, multiprocessors) == groups


@pytest.mark.parametrize("multiprocessors", [46, 76, 84, 132, 170])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_head_groups_never_lose(multiprocessors: int, batch: int):
    """Groups hold all heads, and take less time by the same model, computed here by hand."""
    groups = attention.head_groups(batch, 30, 4160, multiprocessors)
    assert sum(groups) == 30 and len(groups) <= 2
    assert sum(makespan(batch * group, multiprocessors) for group in groups) <= makespan(batch * 30, multiprocessors)


def makespan(heads: int, multiprocessors: int, tiles: int = 33) -> int:
    """The end of the last thread block, each of which goes to the multiprocessor that is free first."""
    blocks = math.ceil(multiprocessors / heads)
    ends = [0] * multiprocessors
    for _ in range(heads):
        for index in range(blocks):
            first = ends.index(min(ends))
            ends[first] += len(range(index, tiles, blocks))
    return max(ends)


def test_auto_is_torch_without_a_gpu():
    assert resolve_attention("auto", CPU) == "sdpa" and resolve_attention("sdpa", CPU) == "sdpa"


@pytest.mark.parametrize("name", ["cudnn", "flash3", "flash4"])
def test_what_cannot_be_used_is_refused(name, monkeypatch):
    """What needs a GPU or a package is refused where it is not there."""
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU") as error:
        resolve_attention(name, CPU)
    assert error.value.problems[0].code == "no-attention" and error.value.exit_code == 2
    if name != "cudnn":
        monkeypatch.setattr(attention_choice, "_is_installed", lambda module: False)
        with pytest.raises(ConfigError, match=r"needs the package flash-attn"):
            resolve_attention(name, CUDA)


def test_refusal_leaves_the_run(make_config):
    """A run is not moved aside by --fresh for attention that cannot be used."""
    config = make_config(train={"steps": 1})
    run_training(config, fresh=False)
    with pytest.raises(ConfigError, match=r"model\.attention"):
        run_training(make_config(train={"steps": 1}, model={"attention": "flash4"}), fresh=True)
    assert [path.name for path in folder(config).parent.iterdir()] == [config.name]


def test_implementations_are_tried_first(monkeypatch):
    """What is installed and does not compute attention is not used; `auto` takes the next."""
    monkeypatch.setattr(attention_choice, "_is_installed", lambda module: True)
    tried = []

    def error_on(device: torch.device) -> float:
        tried.append(device)
        return (0.3, 0.004)[len(tried) - 1]

    monkeypatch.setattr(attention_choice, "error_on", error_on)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: None)
    assert resolve_attention("auto", CUDA) == "flash3" and len(tried) == 2
    tried.clear()
    with pytest.raises(ConfigError, match=r"flash4 is off by 0.3 on a small example; take auto"):
        resolve_attention("flash4", CUDA)


def test_an_implementation_that_fails(monkeypatch):
    """An error while it is tried is told with the setting."""
    monkeypatch.setattr(attention_choice, "_is_installed", lambda module: True)
    with pytest.raises(ConfigError, match=r"model.attention: flash3 failed on a small example \(\w+: "):
        resolve_attention("flash3", CUDA)
    assert resolve_attention("auto", CUDA) == "sdpa"
    assert attention.active_flash() is None


def test_older_torch_has_one_flash(monkeypatch):
    """A version of torch that knows no other FlashAttention says so, and computes attention as ever."""
    monkeypatch.setattr(attention_choice, "_is_installed", lambda module: True)
    for name in ("activate_flash_attention_impl", "current_flash_attention_impl", "restore_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name)
    with pytest.raises(ConfigError, match=r"flash4 needs a newer PyTorch than 2\."):
        resolve_attention("flash4", CUDA)
    assert resolve_attention("auto", CUDA) == "sdpa" and attention.active_flash() is None


def test_error_of_this_machine():
    """The example that decides tells torch's own attention from a wrong one."""
    with attention_by("sdpa"):
        assert attention_choice.error_on(CPU) < attention_choice.LARGEST_ERROR


def test_cudnn_has_no_fixed_order():
    data = [{"folder": "x", "trigger": "zorb"}]
    with pytest.raises(ValueError, match=r"cudnn has no fixed order of sums"):
        Config.model_validate({"name": "a", "data": data, "model": {"attention": "cudnn"}})
    changes = {"model": {"attention": "cudnn"}, "train": {"reproducible": False}}
    assert Config.model_validate({"name": "a", "data": data} | changes).model.attention == "cudnn"
