"""Caches: found by content, never trusted blindly, filled once, with the encoders gone before training."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from zimage_train import encoding, mini
from zimage_train.app.train import cache as fill
from zimage_train.config.schema import Config
from zimage_train.data.cache import Cache, prompt_key
from zimage_train.errors import DataError, WeightsError
from zimage_train.model.digests import Digests


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pictures and prompts were encoded, and how often each encoder was loaded."""
    counts = {"pictures": 0, "prompts": 0, "vae": 0, "text": 0}
    for name, key, loads in (("picture_encoder", "pictures", "vae"), ("prompt_encoder", "prompts", "text")):
        original = getattr(encoding, name)

        def make(*args, original=original, key=key, loads=loads):
            counts[loads] += 1
            encode = original(*args)

            def encode_and_count(value):
                counts[key] += 1
                return encode(value)

            return encode_and_count

        monkeypatch.setattr(encoding, name, make)
    return counts


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures to change."""
    (tmp_path / "pictures").mkdir()
    for path in sorted(mini.PICTURES.glob("zorb_0[1-4].*")):
        shutil.copy(path, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def config(make_config, pictures: Path, tmp_path: Path):
    def make(**changes) -> Config:
        data = {"folder": str(pictures), "resolution": [64, 96], "trigger": "zorb"} | changes.pop("data", {})
        return make_config(cache={"folder": str(tmp_path / "cache")}, data=[data], **changes)

    return make


def taken(counted: dict[str, int]) -> dict[str, int]:
    result = dict(counted)
    counted.update(dict.fromkeys(counted, 0))
    return result


NOTHING = {"pictures": 0, "prompts": 0, "vae": 0, "text": 0}


def test_a_second_filling_encodes_nothing_and_loads_no_encoder(config, counted):
    fill(config())
    assert taken(counted) == {"pictures": 8, "prompts": 5, "vae": 1, "text": 1}
    fill(config())
    assert taken(counted) == NOTHING


@pytest.mark.parametrize("variant", ["base", "deturbo"])
def test_changing_only_the_variant_encodes_nothing(config, counted, variant: str):
    model = {"path": str(mini.TURBO), "dtype": "fp32"}
    fill(config(model=model))
    taken(counted)
    fill(config(model={"variant": variant, "adapter": None}))
    assert taken(counted) == NOTHING


def test_a_changed_picture_is_encoded_again_and_a_touched_one_is_not(config, counted, pictures: Path):
    fill(config())
    taken(counted)
    (pictures / "zorb_01.png").touch()
    fill(config())
    assert taken(counted) == NOTHING
    shutil.copy(mini.PICTURES / "zorb_05.png", pictures / "zorb_01.png")
    fill(config())
    assert taken(counted) == NOTHING | {"pictures": 2, "vae": 1}


def test_a_changed_caption_is_encoded_again(config, counted, pictures: Path):
    fill(config())
    taken(counted)
    (pictures / "zorb_02.txt").write_text("a new zorb")
    fill(config())
    assert taken(counted) == NOTHING | {"prompts": 1, "text": 1}


def test_another_resolution_encodes_only_its_own_sizes(config, counted):
    fill(config())
    taken(counted)
    fill(config(data={"resolution": [64, 96, 80]}))
    found = taken(counted)
    assert 1 <= found["pictures"] <= 4 and found["prompts"] == 0


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_another_encoder_encodes_its_own_part_again(config, counted, tmp_path: Path, part: str):
    fill(config())
    taken(counted)
    shutil.copytree(mini.TURBO, tmp_path / "model")
    file = next((tmp_path / "model" / part).glob("*.json"))
    file.write_text(file.read_text() + "\n")
    fill(config(model={"path": str(tmp_path / "model")}))
    found = taken(counted)
    assert (found["pictures"], found["prompts"]) == ((8, 0) if part == "vae" else (0, 5))


def flip(content: bytes) -> bytes:
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-5], lambda c: c[:-64] + bytes(64), lambda c: b""])
def test_a_damaged_entry_is_encoded_again_to_the_same_bytes(config, counted, tmp_path: Path, damage, capsys):
    fill(config())
    taken(counted)
    entry = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))[0]
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    fill(config())
    assert taken(counted) == NOTHING | {"pictures": 1, "vae": 1}
    assert entry.read_bytes() == good
    assert "1 of them damaged" in capsys.readouterr().out


def test_latents_that_are_not_finite_name_their_picture(config, monkeypatch):
    monkeypatch.setattr(encoding, "picture_encoder", lambda *a: lambda image: torch.full((16, 8, 8), float("nan")))
    with pytest.raises(DataError, match=r"zorb_0\d.*not finite") as error:
        fill(config())
    assert error.value.exit_code == 3


def test_embeddings_that_are_not_finite_name_their_prompt(config, monkeypatch):
    monkeypatch.setattr(encoding, "prompt_encoder", lambda *a: lambda prompt: torch.full((9, 64), float("inf")))
    with pytest.raises(WeightsError, match=r"text_encoder: its embedding of '.*' is not finite"):
        fill(config())


def test_a_file_swapped_within_its_size_and_time_has_another_digest(tmp_path: Path):
    path, memo = tmp_path / "x.safetensors", tmp_path / "digests.json"
    path.write_bytes(b"one")
    status = path.stat()
    first = Digests(memo).of_content(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert Digests(memo).of_content(path) != first


def test_encoders_are_gone_before_the_transformer_is_loaded(config, monkeypatch):
    import gc

    from diffusers import AutoencoderKL
    from transformers import Qwen3Model

    from zimage_train.app.train import train
    from zimage_train.training import setup

    alive: list[int] = []
    original = setup.assemble

    def spy(*args):
        gc.collect()
        alive.append(sum(type(one) in (AutoencoderKL, Qwen3Model) for one in gc.get_objects()))
        return original(*args)

    monkeypatch.setattr(setup, "assemble", spy)
    train(config(train={"steps": 1, "batch_size": 1}), fresh=False)
    assert alive == [0]


def test_keys_depend_on_everything_that_goes_in():
    one = prompt_key("a", "encoder", "bf16")
    assert (
        len(
            {
                one,
                prompt_key("b", "encoder", "bf16"),
                prompt_key("a", "other", "bf16"),
                prompt_key("a", "encoder", "fp32"),
            }
        )
        == 4
    )


def test_a_missing_entry_is_none(tmp_path: Path):
    assert Cache(tmp_path).read(f"latents/{'0' * 64}") is None
