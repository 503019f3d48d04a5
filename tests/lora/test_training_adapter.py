"""The training adapter: exactly what it should be while training, exactly gone for previews, and never in part."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_train import mini
from zimage_train.config.lora import LoraSettings
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen, original_weights
from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import headers, layers, targets, training_adapter
from zimage_train.lora.deltas import Factors, Kronecker
from zimage_train.models import host_copy, transformer
from zimage_train.models.host_copy import HostCopy

from helpers import frozen_tensor

CPU = torch.device("cpu")
TRANSFORMER = mini.TURBO / "transformer"


def merged(dtype: str = "fp32", strength: float = 1.0, spare: float = 0.0) -> FrozenTransformer:
    shape = load_frozen(TRANSFORMER, None, dtype, CPU).shape
    adapter = training_adapter.load_adapter(mini.ADAPTER_V1, strength, shape)
    return load_frozen(TRANSFORMER, adapter, dtype, CPU, spare_bytes=spare)


def originals() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in TRANSFORMER.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def independent_deltas() -> dict[str, torch.Tensor]:
    """B @ A of the file in float64, read without any code of the package."""
    tensors = load_file(mini.ADAPTER_V1)
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        module.removeprefix("diffusion_model."): tensors[f"{module}.lora_B.weight"].double()
        @ tensors[f"{module}.lora_A.weight"].double()
        for module in modules
    }


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_adapter_change_is_in_the_weights(strength: float):
    """The merged weights minus those of the base are the adapter's change."""
    frozen, base, deltas = merged(strength=strength), originals(), independent_deltas()
    assert frozen.adapter_matched == len(deltas) == 48
    for name, parameter in frozen.model.named_parameters():
        change = parameter.double() - base[name].double()
        expected = strength * deltas.get(name.removesuffix(".weight"), torch.zeros((), dtype=torch.float64))
        assert torch.allclose(change, expected.expand_as(change), atol=1e-6), name
        assert bool(change.abs().max() > 0) == (name.removesuffix(".weight") in deltas)


def test_a_bf16_sum_is_rounded_once():
    frozen, base, deltas = merged("bf16"), originals(), independent_deltas()
    module = "layers.3.feed_forward.w2"
    exact = base[f"{module}.weight"].double() + deltas[module]
    assert torch.equal(frozen.model.get_submodule(module).weight, exact.float().bfloat16())


@pytest.mark.parametrize("spare", [0.0, 1e9])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_original_weights_and_back(dtype: str, spare: float):
    """Within the block the weights are the originals, and after it the same bits as before."""
    frozen = merged(dtype, spare=spare)
    layers.attach_lora(
        frozen.model, LoraSettings(rank=4), targets.select_modules(["attention", "adaln"], frozen.shape.linears), 1
    )
    before = {name: frozen_tensor(frozen, name).clone() for name in frozen.shape.parameters}
    for _ in range(2):
        with original_weights(frozen):
            for name, tensor in originals().items():
                assert torch.equal(frozen_tensor(frozen, name), tensor.to(before[name].dtype)), name
        for name, tensor in before.items():
            assert torch.equal(frozen_tensor(frozen, name), tensor), name


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of weights that are read from now on."""
    reads: list[Path] = []
    read = transformer.read_selected_weights

    def spy(path: Path, names: set[str]):
        reads.append(path)
        return read(path, names)

    monkeypatch.setattr(transformer, "read_selected_weights", spy)
    return reads


def test_memory_to_spare_saves_reading(monkeypatch):
    """With main memory for a copy, the file is read for the first previews only; without it, twice for each."""
    reads = count_reads(monkeypatch)
    for spare, wanted in ((1e9, 1), (0.0, 6)):
        frozen = merged(spare=spare)
        reads.clear()
        for _ in range(3):
            with original_weights(frozen):
                pass
        assert len(reads) == wanted
    frozen = merged(spare=1e9)
    changed = sum(frozen_tensor(frozen, name).nbytes for name in frozen.adapter.parameter_names())
    assert changed <= HostCopy.bytes_for([frozen_tensor(frozen, n) for n in frozen.adapter.parameter_names()])
    reads.clear()
    with original_weights(merged(spare=changed - 1.0)):
        pass
    assert len(reads) == 2


@pytest.mark.parametrize("spare", [0.0, 1e9])
def test_unreadable_file_leaves_weights(spare: float, monkeypatch):
    """If the original weights cannot be read in full, the training weights come back, and the next try reads again."""
    frozen = merged(spare=spare)
    before = {name: frozen_tensor(frozen, name).clone() for name in frozen.shape.parameters}
    read, failed = transformer.read_selected_weights, []

    def broken(path: Path, names: set[str]):
        for number, pair in enumerate(read(path, names)):
            if number == 20 and not failed:
                failed.append(pair[0])
                raise WeightsError(Problem(str(path), "is damaged", "download it again"))
            yield pair

    monkeypatch.setattr(transformer, "read_selected_weights", broken)
    with pytest.raises(WeightsError, match="is damaged"), original_weights(frozen):
        raise AssertionError("not reached")
    assert failed
    for name, tensor in before.items():
        assert torch.equal(frozen_tensor(frozen, name), tensor), name
    with original_weights(frozen):
        for name, tensor in originals().items():
            assert torch.equal(frozen_tensor(frozen, name), tensor), name


def test_copy_is_split_into_buffers(monkeypatch):
    """A copy in several buffers holds every tensor, and two exchanges change nothing."""
    monkeypatch.setattr(host_copy, "CHUNK_BYTES", 4096)
    tensors = [torch.randn(size) for size in (3, 700, 64, 5000, 1)] + [torch.arange(9, dtype=torch.uint8)]
    before = [tensor.clone() for tensor in tensors]
    copy = HostCopy(tensors)
    for tensor in tensors:
        tensor.zero_()
    copy.exchange()
    assert all(map(torch.equal, tensors, before))
    copy.exchange()
    assert not any(bool(tensor.any()) for tensor in tensors)
    assert copy.num_bytes == HostCopy.bytes_for(tensors) == 4096 + 32768 + 512


def test_weights_return_after_an_error():
    """The training weights come back after an error."""
    frozen = merged()
    name = "layers.0.attention.to_q.weight"
    before = frozen_tensor(frozen, name).clone()
    with pytest.raises(RuntimeError, match="in a preview"), original_weights(frozen):
        raise RuntimeError("in a preview")
    assert torch.equal(frozen_tensor(frozen, name), before)


def spoiled(tmp_path: Path, spoil) -> Path:
    tensors = load_file(mini.ADAPTER_V1)
    spoil(tensors)
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    return path


def rename_one(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("A", "B"):
        key = f"diffusion_model.layers.2.attention.to_v.lora_{part}.weight"
        tensors[key.replace("layers.2", "layers.77")] = tensors.pop(key)


def rename_all(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace("layers.", "layers.9")] = tensors.pop(key)


def reshape_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["diffusion_model.layers.2.attention.to_v.lora_A.weight"] = torch.zeros(8, 11)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename_one, r"matched 47/48 .*layers\.77"),
        (rename_all, r"matched 0/48"),
        (reshape_one, r"matched 47/48 .*96, 11"),
    ],
)
def test_adapter_must_match_in_full(tmp_path: Path, spoil, message: str):
    """An adapter that does not match in full is refused."""
    shape = load_frozen(TRANSFORMER, None, "fp32", CPU).shape
    path = spoiled(tmp_path, spoil)
    with pytest.raises(WeightsError, match=message) as error:
        training_adapter.load_adapter(path, 1.0, shape)
    assert error.value.exit_code == 4
    with pytest.raises(WeightsError, match=message):
        headers.require_match(path, headers.read_sizes(path), shape.linears)


def test_merge_counts_the_matches():
    """Merging refuses an adapter of which too few modules were matched."""
    shape = load_frozen(TRANSFORMER, None, "fp32", CPU).shape
    loaded = training_adapter.load_adapter(mini.ADAPTER_V1, 1.0, shape)
    short = [(name, tensor) for name, tensor in originals().items() if not name.startswith("layers.4.")]
    first = r"not matched: layers\.4\.adaLN_modulation\.0;"
    with pytest.raises(WeightsError, match=f"matched 40/48 modules; {first}"):
        list(training_adapter.merge_adapter(short, loaded, CPU, training_adapter.MergeCount()))


def test_other_kinds_are_merged_alike():
    """A LoKr and a LoRA of `train.beside` add their strength times their change, and other weights stay."""
    draw = torch.Generator().manual_seed(0)
    w1, w2, a, b = (torch.randn(size, generator=draw) for size in ((2, 3), (4, 5), (2, 15), (8, 2)))
    deltas = {"x": Kronecker((w1,), (w2,), 0.5), "y": Factors(a, b, 3.0)}
    adapter = training_adapter.TrainingAdapter(Path("beside"), deltas, 0.25)
    weights = {name: torch.randn(8, 15, generator=draw).bfloat16() for name in ("x.weight", "y.weight", "z.weight")}
    found = dict(training_adapter.merge_all(weights.items(), [adapter, adapter], CPU))
    changes = {"x.weight": 0.5 * torch.kron(w1.double(), w2.double()), "y.weight": 3.0 * b.double() @ a.double()}
    for name, change in changes.items():
        assert torch.allclose(found[name].double(), weights[name].double() + 2 * 0.25 * change, atol=1e-5), name
    assert found["z.weight"] is weights["z.weight"]
    assert adapter.delta_of("x.bias", CPU) is None
