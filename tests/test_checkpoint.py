"""Checkpoints and sealed files: every damage is noticed, and the one before is used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_train import checkpoint, tensorfile
from zimage_train.data.cache import Cache
from zimage_train.errors import DivergedError, WeightsError

TENSORS = {"lora.x.A": torch.arange(6.0).view(2, 3), "optim.0.state1": torch.arange(5, dtype=torch.uint8)}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(
            folder, step, {**TENSORS, "lora.x.B": torch.full((2,), float(step))}, {"optimizer": {"lr": 1e-4}}
        )


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def relabel(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b'"F32"') >= 1
    path.write_bytes(content.replace(b'"F32"', b'"I32"', 1))


def change_step(path: Path) -> None:
    content = path.read_bytes()
    assert b'\\"step\\": 30' in content
    path.write_bytes(content.replace(b'\\"step\\": 30', b'\\"step\\": 31'))


DAMAGES = [flip_bit, zero_tail, truncate, relabel, change_step, lambda path: path.write_bytes(b"")]


def test_the_newest_is_loaded_as_it_was_saved(tmp_path: Path):
    save(tmp_path, 10, 20)
    found = checkpoint.load_newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 20
    assert found.numbers["optimizer"] == {"lr": 1e-4}
    assert found.tensors["lora.x.B"].tolist() == [20.0, 20.0]
    assert found.part("optim.").keys() == {"optim.0.state1"}
    assert torch.equal(found.tensors["optim.0.state1"], TENSORS["optim.0.state1"])


def test_two_are_kept_and_order_is_by_step(tmp_path: Path):
    save(tmp_path, 10, 20, 30, 1_000_000)
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [1_000_000, 30]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_set_aside_loudly_and_the_one_before_is_used(tmp_path: Path, damage):
    save(tmp_path, 20, 30)
    damage(tmp_path / "step-000030.safetensors")
    said: list[str] = []
    found = checkpoint.load_newest(tmp_path, said.append)
    assert found is not None and found.step == 20
    assert len(said) == 1 and "step-000030" in said[0]
    assert (tmp_path / "step-000030.safetensors.corrupt").exists()


def test_when_all_are_damaged_the_run_does_not_begin_again_silently(tmp_path: Path):
    save(tmp_path, 20, 30)
    for path in tmp_path.iterdir():
        flip_bit(path)
    with pytest.raises(WeightsError, match="no checkpoint is whole") as error:
        checkpoint.load_newest(tmp_path, lambda text: None)
    assert error.value.exit_code == 4


def test_other_files_are_no_checkpoints(tmp_path: Path):
    save(tmp_path, 20)
    for name in (
        "old-step-000900.safetensors",
        "step-1e3.safetensors",
        "step-000100.safetensors.tmp",
        "step-9.safetensors",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step-000999.safetensors").mkdir()
    found = checkpoint.load_newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 20


def test_a_later_format_is_refused(tmp_path: Path):
    path = tmp_path / "step-000020.safetensors"
    tensorfile.save_sealed(path, TENSORS, {"state": json.dumps({"format": 99, "step": 20})})
    with pytest.raises(WeightsError, match="format 99"):
        checkpoint.load(path)


def test_what_is_not_finite_is_not_saved(tmp_path: Path):
    with pytest.raises(DivergedError) as error:
        checkpoint.save(tmp_path, 5, {"lora.x.A": torch.tensor([float("inf")])}, {})
    assert error.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_any_changed_byte_of_a_sealed_file_is_noticed(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    tensorfile.save_sealed(path, {"a": torch.arange(3.0)}, {"key": "latents/x"})
    content = path.read_bytes()
    missed = []
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1
        path.write_bytes(changed)
        try:
            tensors, metadata = tensorfile.load_sealed(path)
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
    tensorfile.save_sealed(tmp_path / "x", tensors, {})
    back, _ = tensorfile.load_sealed(tmp_path / "x")
    assert all(torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in tensors.items())


def test_a_plain_safetensors_file_is_not_sealed(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(WeightsError, match="digest"):
        tensorfile.load_sealed(tmp_path / "x")


def test_a_cache_entry_under_another_key_is_not_found(tmp_path: Path):
    cache = Cache(tmp_path)
    one, other = f"latents/{'a' * 64}", f"latents/{'b' * 64}"
    cache.write(one, torch.zeros(3))
    target = cache._path(other)
    target.parent.mkdir(parents=True)
    cache._path(one).rename(target)
    assert cache.read(other) is None and cache.has_file(other)
