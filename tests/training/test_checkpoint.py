"""Checkpoints and sealed files: every damage is noticed, and the previous checkpoint is used."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.errors import WeightsError
from zimage_train.io import tensorfile
from zimage_train.training import checkpoint

TENSORS = {"lora.x.A": torch.arange(6.0).view(2, 3), "optim.0.state1": torch.arange(5, dtype=torch.uint8)}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(
            folder, step, {**TENSORS, "lora.x.B": torch.full((2,), float(step))}, {"optimizer": {"lr": 1e-4}}
        )


def test_newest_is_loaded_as_saved(tmp_path: Path):
    """The newest checkpoint is loaded as it was saved."""
    save(tmp_path, 10, 20)
    found = checkpoint.load_newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 20
    assert found.metadata["optimizer"] == {"lr": 1e-4}
    assert found.tensors["lora.x.B"].tolist() == [20.0, 20.0]
    assert found.part("optim.").keys() == {"optim.0.state1"}
    assert torch.equal(found.tensors["optim.0.state1"], TENSORS["optim.0.state1"])


def test_two_are_kept_and_order_is_by_step(tmp_path: Path):
    save(tmp_path, 10, 20, 30, 1_000_000)
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [1_000_000, 30]


def test_sealed_file_any_changed_byte(tmp_path: Path):
    """Any changed byte of a sealed file is noticed."""
    path = tmp_path / "x.safetensors"
    tensorfile.save_with_digest(path, {"a": torch.arange(3.0)}, {"key": "latents/x"})
    content = path.read_bytes()
    missed = []
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1
        path.write_bytes(changed)
        try:
            tensors, metadata = tensorfile.load_with_digest(path)
        except WeightsError:
            continue
        if metadata != {"key": "latents/x"} or not torch.equal(tensors["a"], torch.arange(3.0)):
            missed.append(index)
    assert missed == []


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
)
def test_every_type_survives(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "a": torch.arange(7).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.tensor(3).to(dtype),
    }
    tensors["strided"] = torch.arange(12).view(3, 4).to(dtype).T
    tensorfile.save_with_digest(tmp_path / "x", tensors, {})
    back, _ = tensorfile.load_with_digest(tmp_path / "x")
    assert all(torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in tensors.items())


def test_sealed_file_needs_a_digest(tmp_path: Path):
    """A plain safetensors file is not a sealed file."""
    save_file({"a": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(WeightsError, match="digest"):
        tensorfile.load_with_digest(tmp_path / "x")


def test_cache_entry_of_another_key(tmp_path: Path):
    """A cache entry under another key is not found."""
    cache = TensorCache(tmp_path)
    one, other = f"latents/{'a' * 64}", f"latents/{'b' * 64}"
    cache.write(one, torch.zeros(3))
    target = cache._path(other)
    target.parent.mkdir(parents=True)
    cache._path(one).rename(target)
    assert cache.read(other) is None and cache.has_file(other)
