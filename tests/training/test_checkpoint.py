"""Checkpoints and sealed files: every damage is noticed, and the previous checkpoint is used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.errors import DivergedError, WeightsError
from zimage_train.io import atomic, tensorfile
from zimage_train.training import checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
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


def test_constants_of_the_golden_file():
    """The kept checkpoint has this version's format and arithmetic, which a change of either must raise."""
    (path,) = GOLDEN.glob(f"format{checkpoint.FORMAT}-arithmetic{checkpoint.ARITHMETIC}/step-*.safetensors")
    assert checkpoint.load(path).step == 2


def test_no_folder_has_no_checkpoint(tmp_path: Path):
    assert checkpoint.load_newest(tmp_path / "none", pytest.fail) is None
    assert checkpoint.load_newest(tmp_path, pytest.fail) is None


def test_first_tensor_not_finite_is_named(tmp_path: Path):
    """A state with tensors that are not finite is refused with the first of them, and leaves no file."""
    bad = {"optim.0.state1": torch.arange(3), "a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(DivergedError, match="step 5: b is not finite"):
        checkpoint.save(tmp_path, 5, bad | {"c": torch.tensor([float("inf")])}, {})
    assert list(tmp_path.iterdir()) == []


def test_kept_although_old(tmp_path: Path, monkeypatch):
    """The old checkpoints that could not be removed are returned, and only these."""
    save(tmp_path, 10, 20, 30)
    monkeypatch.setattr(checkpoint, "KEEP", 0)
    stays = tmp_path / "step-000030.safetensors"
    remove = atomic.remove
    monkeypatch.setattr(atomic, "remove", lambda path: path != stays and remove(path))
    assert checkpoint.save(tmp_path, 40, TENSORS, {}) == [stays]
    assert list(tmp_path.iterdir()) == [stays]


def test_what_is_set_aside_is_said(tmp_path: Path):
    """A damaged file is set aside with its reason; files and folders that are no checkpoints stay."""
    save(tmp_path, 20, 30)
    (tmp_path / "step-000030.safetensors").write_bytes(b"short")
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "step-000040.safetensors").mkdir()
    said: list[str] = []
    found = checkpoint.load_newest(tmp_path, said.append)
    assert found is not None and found.step == 20
    (line,) = said
    with pytest.raises(WeightsError) as reason:
        checkpoint.load(tmp_path / "step-000030.safetensors.corrupt")
    assert reason.value.problems[0].message in line and line.endswith("set aside as step-000030.safetensors.corrupt")
    (tmp_path / "step-000020.safetensors").write_bytes(b"short")
    names = "step-000020.safetensors.corrupt, step-000030.safetensors.corrupt"
    for _ in range(2):
        with pytest.raises(WeightsError, match=f"no checkpoint is intact .{names}"):
            checkpoint.load_newest(tmp_path, said.append)


@pytest.mark.parametrize("header", [{}, {"state": "["}, {"state": "3"}, {"state": '{"step": 1}'}])
def test_sealed_file_of_something_else(tmp_path: Path, header: dict[str, str]):
    """An intact file without the state of a run is no checkpoint."""
    path = tmp_path / "step-000001.safetensors"
    tensorfile.save_with_digest(path, TENSORS, header)
    with pytest.raises(WeightsError, match="is not a checkpoint of zimage-train; remove it"):
        checkpoint.load(path)


@pytest.mark.parametrize("version", ["0.0.1", None])
@pytest.mark.parametrize("numbers", [(0, -1), (0, 1), (-1, 0), (1, 0), (-1, 1), (1, -1)])
def test_other_version_is_refused(tmp_path: Path, numbers: tuple[int, int], version: str | None):
    """An intact checkpoint of another version is refused with the number that differs, and stays where it is."""
    save(tmp_path, 10)
    path = tmp_path / "step-000020.safetensors"
    format_, arithmetic = checkpoint.FORMAT + numbers[0], checkpoint.ARITHMETIC + numbers[1]
    state = {"format": format_, "arithmetic": arithmetic, "step": 20}
    if version is not None:
        state["version"] = version
    tensorfile.save_with_digest(path, TENSORS, {"state": json.dumps(state)})
    number = f"format {format_}" if numbers[0] else f"arithmetic {arithmetic}"
    with pytest.raises(checkpoint.OtherVersionError, match=rf"{version or '0.1.0 before its release'} with {number},"):
        checkpoint.load_newest(tmp_path, pytest.fail)
    assert path.exists() and len(list(tmp_path.iterdir())) == 2


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
