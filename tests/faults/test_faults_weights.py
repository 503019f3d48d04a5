"""Faults in caches and weights: what is damaged is encoded again or refused by name, and code in it is never run."""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_train import mini
from zimage_train.commands.train import fill_run_caches, run_training
from zimage_train.config.schema import Config
from zimage_train.dataset import encoding
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.errors import ConfigError, DataError, Stopped, WeightsError
from zimage_train.lora import headers, lora_file
from zimage_train.training import checkpoint

from helpers import facts, final, folder, load_all, stop_after
from injection import Crash, fail_at

CPU = torch.device("cpu")
STEM = "diffusion_pytorch_model"
PARTS = (f"transformer/{STEM}-00001-of-00002", f"vae/{STEM}", "text_encoder/model-00001-of-00002")
"""A file of weights of each part of a model."""
KINDS = {"latents": ("image_encoder", 8), "prompts": ("prompt_encoder", 5)}
"""Kind of cache entry -> its encoder, and how many there are of four images at two sizes."""


@pytest.fixture
def few(make_config, tmp_path: Path) -> Callable[..., Config]:
    """A config of four images with a cache of its own."""
    (tmp_path / "images").mkdir()
    for path in sorted(mini.IMAGES.glob("zorb_0[1-4].*")):
        shutil.copy(path, tmp_path / "images")
    data = {"folder": str(tmp_path / "images"), "resolution": [64, 96], "trigger": "zorb"}

    def make(**changes) -> Config:
        return make_config(**{"cache": {"folder": str(tmp_path / "cache")}, "data": [data]} | changes)

    return make


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images and prompts were encoded."""
    counts = dict.fromkeys(KINDS, 0)
    for kind, (name, _) in KINDS.items():
        original = getattr(encoding, name)

        def make(*args, original=original, kind=kind):
            encode = original(*args)

            def encode_and_count(values, *rest):
                counts[kind] += len(values)
                return encode(values, *rest)

            return encode_and_count

        monkeypatch.setattr(encoding, name, make)
    return counts


def entries(config: Config, kind: str) -> list[Path]:
    assert config.cache.folder is not None
    return sorted((Path(config.cache.folder) / kind).rglob("*.safetensors"))


def flip_bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def zero_tail(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


def cut_off(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def reshape(path: Path, other: Path) -> None:
    """The same bytes, said to be of another shape."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    shape = header["value"]["shape"]
    header["value"]["shape"] = [*shape[:-2], shape[-1] * shape[-2], 1]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def rename(path: Path, other: Path) -> None:
    """A whole entry under the key of another."""
    shutil.copy(other, path)


DAMAGES = [flip_bit, zero_tail, cut_off, reshape, rename]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_encoded_again(few, encoded, capsys, kind: str, damage: Callable[[Path, Path], None]):
    """27. A cache entry with a changed bit, zero tail, cut, other shape or other key is encoded again, and counted."""
    config = few()
    fill_run_caches(config)
    assert encoded == {name: count for name, (_, count) in KINDS.items()}
    path, other, *_ = entries(config, kind)
    good = path.read_bytes()
    damage(path, other)
    assert path.read_bytes() != good
    capsys.readouterr()
    fill_run_caches(config)
    assert encoded == {name: count + (name == kind) for name, (_, count) in KINDS.items()}
    assert path.read_bytes() == good
    assert "1 encoded, 1 of them damaged entries" in capsys.readouterr().out


@pytest.mark.slow
def test_damaged_cache_changes_no_bit(few, tmp_path: Path):
    """27. Whatever was damaged in a cache, the run that follows ends in the bytes of a run with a whole cache."""
    whole = few(output_dir=str(tmp_path / "whole"))
    run_training(whole, fresh=False)
    for kind in KINDS:
        paths = entries(whole, kind)
        contents = [path.read_bytes() for path in paths]
        for number, damage in enumerate(DAMAGES):
            damage(paths[number], paths[(number + 1) % len(paths)])
        assert sum(path.read_bytes() != content for path, content in zip(paths, contents, strict=True)) == len(DAMAGES)
    config = few(output_dir=str(tmp_path / "damaged"))
    run_training(config, fresh=False)
    assert final(config) == final(whole)


@pytest.mark.slow
def test_entry_damaged_while_training(few, monkeypatch: pytest.MonkeyPatch):
    """27. An entry that is damaged while a run trains ends it with exit code 3; the same command makes it anew."""
    config = few(train={"steps": 6}, save={"every": 1})
    read, damaged = TensorCache.read, []

    def read_and_damage(self, key: str) -> Tensor | None:
        if (folder(config) / "checkpoints" / "step-000002.safetensors").exists() and not damaged:
            damaged.append(key)
            flip_bit(self._path(key), Path())
        return read(self, key)

    monkeypatch.setattr(TensorCache, "read", read_and_damage)
    with pytest.raises(DataError, match="its cache entry is gone or damaged; run the same command again") as error:
        run_training(config, fresh=False)
    assert error.value.exit_code == 3 and len(damaged) == 1
    run_training(config, fresh=False)
    assert facts(config)["starts"][1] >= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_latents_not_finite(few, monkeypatch: pytest.MonkeyPatch, value: float):
    """28. An image whose latents are not finite ends the run by its name; it is not cached, and others stay so."""
    config, original, poisoned = few(), encoding.image_encoder, []

    def encoder(*args) -> encoding.EncodeImages:
        encode = original(*args)

        def encode_and_poison(images) -> Tensor:
            latents = encode(images)
            poisoned.append(images)
            if len(poisoned) == 3:
                latents[0, 5, 1, 2] = value
            return latents

        return encode_and_poison

    monkeypatch.setattr(encoding, "image_encoder", encoder)
    with pytest.raises(DataError, match=r"zorb_0\d\.\w+: the VAE's latents of it are not finite; ") as error:
        fill_run_caches(config)
    assert error.value.exit_code == 3 and len(poisoned) == 3 and len(entries(config, "latents")) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_not_finite(few, monkeypatch: pytest.MonkeyPatch, value: float):
    """28. A caption whose embedding is not finite ends the run by its words, and is not cached."""
    config, original, poisoned = few(), encoding.prompt_encoder, []

    def encoder(*args) -> encoding.EncodePrompts:
        encode = original(*args)

        def encode_and_poison(prompts, progress) -> Iterator[tuple[str, Tensor]]:
            for prompt, embeds in encode(prompts, progress):
                poisoned.append(prompt)
                if len(poisoned) == 2:
                    embeds = embeds.clone()
                    embeds[-1, 0] = value
                yield prompt, embeds

        return encode_and_poison

    monkeypatch.setattr(encoding, "prompt_encoder", encoder)
    with pytest.raises(WeightsError, match=r"text_encoder: its embedding of '.*' is not finite") as error:
        fill_run_caches(config)
    assert error.value.exit_code == 4 and poisoned[1][:20] in str(error.value) and len(entries(config, "prompts")) == 1


def test_killed_while_caching(few, monkeypatch: pytest.MonkeyPatch, encoded):
    """29. Killed while it fills the cache, the program encodes at its next start what is missing, and nothing else."""
    config, write, faults = few(), TensorCache.write, []

    def write_at_most_four(self, *entry) -> None:
        if encoded["latents"] < 5:
            return write(self, *entry)
        with fail_at("replace", 1, Crash()) as fault:
            faults.append(fault)
            return write(self, *entry)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(TensorCache, "write", write_at_most_four)
        fill_run_caches(config)
    assert [fault.fired for fault in faults] == [1]
    before = {path: path.read_bytes() for path in entries(config, "latents")}
    assert len(before) == 4
    fill_run_caches(config)
    assert encoded["latents"] == 8 + 1, "the one that was not written yet is encoded twice"
    assert {path: path.read_bytes() for path in before} == before
    assert not list(Path(str(config.cache.folder)).rglob("*.tmp"))


# The model


QUERY = "layers.0.attention.to_q.weight"


def edit(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the shard that holds the first layer's query weight."""
    paths = sorted((model / "transformer").glob("*.safetensors"))
    shard = next(path for path in paths if QUERY in load_file(path))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def test_the_unbroken_copy_loads(broken: Path):
    """30. Check: whole weights load: what the tests of this fault break is the only thing wrong with them."""
    load_all(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), QUERY),
        (lambda tensors: tensors.update({"layers.99.weight": torch.zeros(2)}), "layers.99.weight"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(3, 3)}), rf"{QUERY} is \[3, 3\], expected \[96, 96\]"),
        (
            lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.int64)}),
            f"I64 weights of an unknown format, such as {QUERY}",
        ),
    ],
    ids=["missing", "extra", "misshapen", "of whole numbers"],
)
def test_wrong_tensors_are_named(broken: Path, change: Callable[[dict[str, Tensor]], object], message: str):
    """30. A model with a tensor missing, too many, misshapen or of another kind is refused by the tensor's name."""
    edit(broken, change)
    with pytest.raises(WeightsError, match=message) as error:
        load_all(broken)
    assert error.value.exit_code == 4


def test_a_missing_shard_is_named(broken: Path):
    """30. A model without one of its files is refused by the name of the file."""
    next((broken / "transformer").glob("*-00002-*")).unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00002\.safetensors: does not exist"):
        load_all(broken)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "cut off"),
        (lambda content: bytes(len(content)), "not a safetensors file|is empty|header"),
        (lambda content: b"", "is empty"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
    ids=["cut off", "zeros", "empty", "a pointer"],
)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_file_is_refused(broken: Path, part: str, damage: Callable[[bytes], bytes], message: str):
    """30. A file of weights that is cut off, of zeros, empty or a Git LFS pointer is called what it is."""
    path = broken / f"{part}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=message) as error:
        load_all(broken)
    assert error.value.exit_code == 4 and path.name in str(error.value)


def flip_weight(path: Path) -> None:
    """Change the last bit of a weight."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "encoded_again", "said"),
    [
        (f"transformer/{STEM}-00001-of-00002", {"latents": 0, "prompts": 0}, "model"),
        (f"vae/{STEM}", {"latents": 8, "prompts": 0}, "vae"),
        ("text_encoder/model-00001-of-00002", {"latents": 0, "prompts": 5}, "text_encoder"),
    ],
)
def test_changed_weights(few, broken: Path, monkeypatch, encoded, part: str, encoded_again: dict[str, int], said: str):
    """31. With a bit of model, VAE or text encoder changed, its cache entries are made anew, and a run is refused."""
    config = few(model={"path": str(broken)})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        run_training(config, fresh=False)
    encoded.update(dict.fromkeys(KINDS, 0))
    flip_weight(broken / f"{part}.safetensors")
    fill_run_caches(config)
    assert encoded == encoded_again
    with pytest.raises(ConfigError, match=rf"{said}: changed\n.*belongs to another run") as error:
        run_training(config, fresh=False)
    assert error.value.exit_code == 2


# Code in weights


class Payload:
    """Touches a file if it is ever unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return (Path.touch, (self.sentinel,))


def test_the_payload_works(tmp_path: Path):
    """32. Check: what the tests of this fault offer as weights would run, if anything opened it as a pickle."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
    torch.save(Payload(tmp_path / "ran_too"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran_too").exists()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("write", [lambda one, path: path.write_bytes(pickle.dumps(one)), torch.save])
def test_pickle_named_safetensors(broken: Path, tmp_path: Path, part: str, write: Callable[[object, Path], object]):
    """32. A pickle under the name of weights is recognised by its content and refused, and never run."""
    path = broken / f"{part}.safetensors"
    write(Payload(tmp_path / "ran"), path)
    with pytest.raises(WeightsError, match="pickle"):
        load_all(broken)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "x.safetensors"])
@pytest.mark.parametrize("use", ["lora", "adapter", "model", "checkpoint"])
def test_pickle_is_never_opened(make_config, tmp_path: Path, use: str, name: str):
    """32. A pickle given as LoRA, adapter, model or checkpoint is refused, and never run."""
    path = tmp_path / name
    torch.save(Payload(tmp_path / "ran"), path)
    with pytest.raises((WeightsError, ConfigError)):
        if use == "lora":
            lora_file.read_deltas(path, headers.READ)
        elif use == "checkpoint":
            checkpoint.load(path)
        else:
            changes = {"adapter": str(path)}
            if use == "model":
                changes = {"path": str(path), "extras": str(mini.TURBO)}
            run_training(make_config(model=changes), fresh=False)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_model_is_not_imported(broken: Path, tmp_path: Path):
    """33. Code in a model's folder is never imported, whatever its configs ask for."""
    sentinel = tmp_path / "ran"
    for part in ("text_encoder", "transformer", "vae", "tokenizer"):
        (broken / part / "modeling_evil.py").write_text(f"open({str(sentinel)!r}, 'w')")
        for name in ("config.json", "tokenizer_config.json"):
            path = broken / part / name
            if path.exists():
                evil = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
                asked = {"auto_map": evil, "trust_remote_code": True, "custom_code": "modeling_evil.py"}
                path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    load_all(broken)
    assert not sentinel.exists()
