"""Streamed blocks: the same numbers at any share, one copy ahead of the block that computes, a ring of room."""

import pytest
import torch

from zimage_train import mini
from zimage_train.diffusion.frozen import load_frozen, original_weights
from zimage_train.lora import training_adapter
from zimage_train.models import loading, offload
from zimage_train.models.transformer import velocity

from steps import gradients, trained

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("mode", ["elementwise", "full"])
def test_streaming_changes_no_bit(mode: str, kind: str | None):
    """Loss and gradients are the same bits, however many blocks are streamed."""
    resident = gradients(*trained(mode, kind))
    for streamed in (1, 3, 6):
        frozen, attached = trained(mode, kind, streamed=streamed)
        for _ in range(2):  # the second pass begins where the backward of the first ended
            found = gradients(frozen, attached)
            assert all(torch.equal(one, other) for one, other in zip(resident, found, strict=True)), streamed


@pytest.mark.parametrize(("number", "wanted"), [(0, []), (3, [5, 15, 25]), (15, list(range(1, 30, 2)))])
def test_streamed_blocks_are_spread_evenly(number: int, wanted: list[int]):
    assert offload.streamed_blocks(30, number) == wanted


@pytest.mark.parametrize("number", range(31))
def test_streamed_blocks_are_distinct(number: int):
    """As many blocks are streamed as requested, and none is named twice."""
    found = offload.streamed_blocks(30, number)
    assert len(found) == len(set(found)) == number
    assert all(0 <= index < 30 for index in found)


def fetches(ring: offload.BlockOffloader, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happens from now on, in order: ("copy", block) and ("enter", block)."""
    seen: list[tuple[str, int]] = []
    fetch, enter = offload.BlockOffloader._fetch, offload.BlockOffloader._enter

    def spy_fetch(self, index):
        seen.append(("copy", index))
        return fetch(self, index)

    def spy_enter(self, index, following):
        seen.append(("enter", index))
        return enter(self, index, following)

    monkeypatch.setattr(offload.BlockOffloader, "_fetch", spy_fetch)
    monkeypatch.setattr(offload.BlockOffloader, "_enter", spy_enter)
    return seen


def test_blocks_are_copied_ahead(monkeypatch):
    """Each block is copied ahead of its use, also where the order of blocks turns."""
    frozen, attached = trained("full", streamed=6)
    gradients(frozen, attached)
    seen = fetches(frozen.offloader, monkeypatch)
    gradients(frozen, attached)
    up = [("enter", 0), ("enter", 1), ("copy", 2), ("enter", 2), ("copy", 3), ("enter", 3), ("copy", 4)]
    top = [("enter", 4), ("copy", 5), ("enter", 5), ("enter", 5), ("enter", 4), ("copy", 3)]
    down = [("enter", 3), ("copy", 2), ("enter", 2), ("copy", 1), ("enter", 1), ("copy", 0), ("enter", 0)]
    assert seen == up + top + down  # 4 + 4 copies for 12 uses of 6 blocks; none waits for its own copy


def test_sampling_copies_ahead(monkeypatch):
    """Sampling goes round the blocks without waiting for a copy."""
    frozen, _ = trained("full", streamed=6)
    x, prompt = torch.randn(1, 16, 8, 8), torch.randn(7, frozen.shape.cap_feat_dim)
    with torch.no_grad():
        velocity(frozen.model, x, torch.rand(1), [prompt])
        seen = fetches(frozen.offloader, monkeypatch)
        velocity(frozen.model, x, torch.rand(1), [prompt])
    assert [index for what, index in seen if what == "copy"] == [1, 2, 3, 4, 5, 0]
    assert seen.index(("copy", 1)) == 1 and seen[0] == ("enter", 0)


def test_wrong_prefetch_costs_a_copy_only():
    """A wrong guess of the next block costs a copy, and changes no number."""
    frozen, attached = trained("full", streamed=6)
    wanted = gradients(*trained("full"))
    frozen.offloader._next_block = lambda index: (index + 3) % 6
    found = gradients(frozen, attached)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0.0, 1e9])
@pytest.mark.parametrize("kind", [None, "fp8", "nf4"])
def test_original_weights_when_streamed(kind: str | None, spare: float):
    """True Turbo and the training weights are swapped as with resident blocks."""
    shape = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU).shape
    adapted = training_adapter.load_adapter(mini.ADAPTER_V1, 1.0, shape)
    x, prompt, sigma = torch.randn(1, 16, 8, 8), torch.randn(7, shape.cap_feat_dim).bfloat16(), torch.rand(1)

    @torch.no_grad()
    def outputs(blocks: int) -> list[torch.Tensor]:
        frozen = load_frozen(mini.TURBO / "transformer", adapted, "bf16", CPU, kind, blocks, spare)
        found = []
        for _ in range(2):  # the second time, they may be in main memory
            found.append(velocity(frozen.model, x, sigma, [prompt]))
            with original_weights(frozen):
                found.append(velocity(frozen.model, x, sigma, [prompt]))
        return [*found, velocity(frozen.model, x, sigma, [prompt])]

    resident, streamed = outputs(0), outputs(6)
    assert all(torch.equal(one, other) for one, other in zip(resident, streamed, strict=True))
    assert torch.equal(resident[0], resident[2]) and not torch.equal(resident[0], resident[1])
    assert torch.equal(resident[0], resident[4]) and torch.equal(resident[1], resident[3])
    plain = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU, kind)
    with torch.no_grad():
        assert torch.equal(
            resident[1], velocity(plain.model, x, sigma, [prompt])
        )  # as if no adapter had ever been there


def test_streaming_takes_two_blocks():
    """On the device, a streamed model takes the memory of two blocks."""
    frozen = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU, None, 6)
    block = sum(parameter.nbytes for parameter in frozen.model.layers[0].parameters())
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in frozen.model.layers.parameters()}
    slots = {slot.untyped_storage()._cdata for slot in frozen.offloader._slots}
    assert set(storages) <= slots and len(slots) == 2
    assert sum(slot.nbytes for slot in frozen.offloader._slots) <= 2 * (block + 256 * 20)


def test_unpinned_memory_is_the_fallback(monkeypatch):
    """Where memory cannot be pinned, plain memory is used."""
    original, refused = torch.empty, []

    def empty(*args, pin_memory=False, **options):
        if pin_memory:
            refused.append(args)
            raise RuntimeError("CUDA error: out of memory")
        return original(*args, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert loading.allocate_host_buffer(100, True).nbytes == 100 and refused == [(100,)]
