"""`lora.init_from`: a training that begins with a LoRA that is there."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, WeightsError
from zimage_train.lora import lora_file, verify
from zimage_train.lora.lora_file import Factors
from zimage_train.planning.preflight import check_run

from helpers import folder, losses
from lora_commands import lora_command


@pytest.fixture
def first(make_config) -> Path:
    """A trained LoRA of rank 4 with a scale of its own."""
    config = make_config(name="first", train={"steps": 4}, optimizer={"lr": 1e-2}, lora={"alpha": 3.0})
    run_training(config, fresh=False)
    return folder(config) / "lora" / "first.safetensors"


def begun(make_config, path: Path, **lora: object) -> Config:
    return make_config(
        name="second",
        train={"steps": 2},
        optimizer={"lr": 1e-9, "weight_decay": 0.0},
        save={"dtype": "fp32"},
        lora={"init_from": str(path), **lora},
    )


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_run_begins_with_the_lora(make_config, first: Path, alpha: float | None) -> None:
    """A run begins with the change of the given LoRA, whatever the scales."""
    config = begun(make_config, first, alpha=alpha)
    run_training(config, fresh=False)
    before, after = lora_file.read_lora(first), lora_file.read_lora(folder(config) / "lora" / "second.safetensors")
    assert before.keys() == after.keys() and len(before) == 42
    assert max(verify.relative_error(before[module], after[module]) for module in before) < 1e-4
    assert any(factors.b.any() for factors in before.values())
    plain = make_config(name="plain", train={"steps": 2}, optimizer={"lr": 1e-9})
    run_training(plain, fresh=False)
    assert losses(plain)[0] != losses(config)[0]


def test_init_from_that_does_not_fit(make_config, first: Path, tmp_path: Path) -> None:
    """A LoRA of another rank or other modules is refused."""
    with pytest.raises(ConfigError, match=r"lora.init_from: .*has rank 4, and lora.rank is 8; set lora.rank: 4"):
        check_run(begun(make_config, first, rank=8))
    with pytest.raises(ConfigError, match=r"has 42 modules and lora.targets 24"):
        check_run(begun(make_config, first, targets=["attention"]))
    with pytest.raises(WeightsError, match=r"lora.init_from: gone"):
        check_run(begun(make_config, Path("gone")))
    odd = {name.replace("layers.0.", "layers.77."): tensor for name, tensor in load_file(first).items()}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=r"odd.safetensors: matched 35/42"):
        check_run(begun(make_config, tmp_path / "odd.safetensors"))


def test_hint_for_mixed_ranks_helps(make_config, first: Path, tmp_path: Path) -> None:
    """What the refusal of a LoRA of several ranks says to do makes it one that a run can begin with."""
    lora = lora_file.read_lora(first)
    mixed = {name: Factors(one.a[:2], one.b[:, :2], 1.0) if "to_v" in name else one for name, one in lora.items()}
    lora_file.export_lora(tmp_path / "mixed.safetensors", mixed, "fp32", {})
    with pytest.raises(ConfigError) as refused:
        check_run(begun(make_config, tmp_path / "mixed.safetensors"))
    said = str(refused.value)
    assert "has rank 2 and 4, and lora.rank is 4; make its ranks equal with `zimage-train lora resize --rank 2`" in said
    assert said.endswith(", and set lora.rank: 2")
    code, _ = lora_command(
        "resize", tmp_path / "mixed.safetensors", "--rank", "2", "-o", tmp_path / "equal.safetensors"
    )
    assert code == 0
    check_run(begun(make_config, tmp_path / "equal.safetensors", rank=2))


@pytest.mark.slow
def test_resume_needs_the_same_init_from(make_config, first: Path, tmp_path: Path) -> None:
    """A run continues only with the LoRA that it began with, wherever the file is."""
    moved = tmp_path / "moved.safetensors"
    shutil.copy(first, moved)
    config = begun(make_config, first)
    run_training(config, fresh=False)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    elsewhere = longer.model_copy(update={"lora": longer.lora.model_copy(update={"init_from": str(moved)})})
    run_training(elsewhere, fresh=False)
    assert len(losses(elsewhere)) == 3
    tensors = load_file(moved)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, moved)
    last = elsewhere.model_copy(update={"train": elsewhere.train.model_copy(update={"steps": 4})})
    with pytest.raises(ConfigError, match="init_from"):
        run_training(last, fresh=False)
