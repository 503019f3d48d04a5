"""A name that is a mistyped path is not taken for a hub id, which would be "downloaded later"."""

from pathlib import Path

import pytest

from zimage_train.errors import Location, WeightsError
from zimage_train.models.locate import cached_only, lora_at, transformer_at

WHERE = Location(key="model.adapter")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my" / "loras").mkdir(parents=True)
    (tmp_path / "my" / "loras" / "adapter.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my/loras/adaptor.safetensors", "there is no adaptor.safetensors in my/loras; did you mean my/loras/adapter"),
        ("my/lora/adapter.safetensors", "there is no lora in my; did you mean my/loras?"),
        ("my/other/adapter.safetensors", "there is no other in my; check the path"),
        ("myy/loras/adapter.safetensors", "there is no myy here; did you mean my/loras/adapter.safetensors?"),
    ],
)
def test_a_mistyped_file_is_refused(files: Path, name: str, words: str):
    with pytest.raises(WeightsError) as refused:
        lora_at(name, WHERE, cached_only)
    assert words in str(refused.value) and refused.value.problems[0].code == "missing-file"


def test_a_mistyped_folder_is_refused(files: Path):
    with pytest.raises(WeightsError, match=r"there is no model in my"):
        transformer_at("my/model", WHERE, cached_only)


def test_a_hub_id_still_asks_the_hub(files: Path):
    with pytest.raises(WeightsError) as asked:
        lora_at("ostris/zimage_turbo_training_adapter/a.safetensors", WHERE, cached_only)
    assert "there is no" not in str(asked.value)
