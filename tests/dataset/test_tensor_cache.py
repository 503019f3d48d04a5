"""Caches: found by content, never trusted blindly, filled once, with the encoders gone before training."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from zimage_train import mini
from zimage_train.commands.train import fill_run_caches
from zimage_train.config.load import dump_config
from zimage_train.config.schema import Config
from zimage_train.dataset import encoding
from zimage_train.dataset.encoding import CacheStats, Shard
from zimage_train.dataset.tensor_cache import TensorCache, prompt_key
from zimage_train.io.digests import DigestCache

from helpers import environment


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images and prompts were encoded, and how often each encoder was loaded."""
    counts = {"images": 0, "prompts": 0, "vae": 0, "text": 0}
    for name, key, loads in (("image_encoder", "images", "vae"), ("prompt_encoder", "prompts", "text")):
        original = getattr(encoding, name)

        def make(*args, original=original, key=key, loads=loads):
            counts[loads] += 1
            encode = original(*args)

            def encode_and_count(values, *rest):
                counts[key] += len(values)
                return encode(values, *rest)

            return encode_and_count

        monkeypatch.setattr(encoding, name, make)
    return counts


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images to change."""
    (tmp_path / "images").mkdir()
    for path in sorted(mini.IMAGES.glob("zorb_0[1-4].*")):
        shutil.copy(path, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def config(make_config, images: Path, tmp_path: Path):
    def make(**changes) -> Config:
        data = {"folder": str(images), "resolution": [64, 96], "trigger": "zorb"} | changes.pop("data", {})
        return make_config(cache={"folder": str(tmp_path / "cache")}, data=[data], **changes)

    return make


def taken(counted: dict[str, int]) -> dict[str, int]:
    result = dict(counted)
    counted.update(dict.fromkeys(counted, 0))
    return result


NOTHING = {"images": 0, "prompts": 0, "vae": 0, "text": 0}


def test_filling_twice_encodes_nothing(config, counted):
    """Filling the caches again encodes nothing, and loads no encoder."""
    fill_run_caches(config())
    assert taken(counted) == {"images": 8, "prompts": 5, "vae": 1, "text": 1}
    fill_run_caches(config())
    assert taken(counted) == NOTHING


@pytest.mark.parametrize("variant", ["base", "deturbo"])
def test_changed_variant_encodes_nothing(config, counted, variant: str):
    """Changing only the variant encodes nothing."""
    model = {"path": str(mini.TURBO), "dtype": "fp32"}
    fill_run_caches(config(model=model))
    taken(counted)
    fill_run_caches(config(model={"variant": variant, "adapter": None}))
    assert taken(counted) == NOTHING


def test_changed_image_is_encoded(config, counted, images: Path):
    """A changed image is encoded again, and a touched image is not."""
    fill_run_caches(config())
    taken(counted)
    (images / "zorb_01.png").touch()
    fill_run_caches(config())
    assert taken(counted) == NOTHING
    shutil.copy(mini.IMAGES / "zorb_05.png", images / "zorb_01.png")
    fill_run_caches(config())
    assert taken(counted) == NOTHING | {"images": 2, "vae": 1}


def test_a_changed_caption_is_encoded_again(config, counted, images: Path):
    fill_run_caches(config())
    taken(counted)
    (images / "zorb_02.txt").write_text("a new zorb")
    fill_run_caches(config())
    assert taken(counted) == NOTHING | {"prompts": 1, "text": 1}


def test_changed_resolution(config, counted):
    """Another resolution encodes only its own sizes."""
    fill_run_caches(config())
    taken(counted)
    fill_run_caches(config(data={"resolution": [64, 96, 80]}))
    found = taken(counted)
    assert 1 <= found["images"] <= 4 and found["prompts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_changed_encoder(config, counted, tmp_path: Path, part: str):
    """Another VAE or text encoder encodes only its own part again."""
    fill_run_caches(config())
    taken(counted)
    shutil.copytree(mini.TURBO, tmp_path / "model")
    file = next((tmp_path / "model" / part).glob("*.json"))
    file.write_text(file.read_text() + "\n")
    fill_run_caches(config(model={"path": str(tmp_path / "model")}))
    found = taken(counted)
    assert (found["images"], found["prompts"]) == ((8, 0) if part == "vae" else (0, 5))


def test_digest_of_a_swapped_file(tmp_path: Path):
    """A file swapped for another of the same size and time has another digest."""
    path, memo = tmp_path / "x.safetensors", tmp_path / "digests.json"
    path.write_bytes(b"one")
    status = path.stat()
    first = DigestCache(memo).of_content(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert DigestCache(memo).of_content(path) != first


def test_encoders_are_freed(config, monkeypatch):
    """The encoders are freed before the transformer is loaded."""
    import gc

    from diffusers import AutoencoderKL
    from transformers import Qwen3Model

    from zimage_train.commands.train import run_training
    from zimage_train.training import build

    alive: list[int] = []
    original = build.load_frozen

    def spy(*args):
        gc.collect()
        alive.append(sum(type(one) in (AutoencoderKL, Qwen3Model) for one in gc.get_objects()))
        return original(*args)

    monkeypatch.setattr(build, "load_frozen", spy)
    run_training(config(train={"steps": 1, "batch_size": 1}), fresh=False)
    assert alive == [0]


def test_keys_depend_on_every_input():
    """Keys depend on every input of the encoding."""
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
    assert TensorCache(tmp_path).read(f"latents/{'0' * 64}") is None


def test_caption_too_long_is_noted(config, images: Path, capsys):
    """A caption longer than the model reads is noted, with its length."""
    (images / "zorb_01.txt").write_text("zorb " + "blue circle, " * 300)
    fill_run_caches(config())
    said = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"warning: a caption has [0-9]{3,4} tokens; the model reads the first 512: 'zorb blue", said)
    assert said.count("tokens; the model reads") == 1


# Several processes on the same folder


def test_process_encodes_its_share(config, counted, tmp_path: Path, capsys):
    """A process encodes its share, and after the barrier the entries that others left missing.

    No other process runs here: half of the entries are encoded before the barrier and half after it, each with the
    bytes that a single process writes.
    """
    fill_run_caches(config())
    whole = {entry: entry.read_bytes() for entry in (tmp_path / "cache" / "latents").rglob("*.safetensors")}
    for number, entry in enumerate(whole):
        entry.unlink() if number % 2 else entry.write_bytes(b"damaged")
    taken(counted)
    at_barrier: list[int] = []
    share = Shard(0, 2, lambda: at_barrier.append(counted["images"]))
    images, prompts = fill_as(config(), share)
    assert taken(counted) == NOTHING | {"images": 8, "vae": 2} and at_barrier == [4, 8]
    assert (str(images), str(prompts)) == ("0 found, 8 encoded, 4 of them damaged entries", "5 found, 0 encoded")
    assert {entry: entry.read_bytes() for entry in whole} == whole


def test_entries_of_others_are_kept(config, counted, tmp_path: Path):
    """Entries that other processes finish before the barrier are not encoded again."""
    fill_run_caches(config())
    whole = {entry: entry.read_bytes() for entry in (tmp_path / "cache" / "latents").rglob("*.safetensors")}
    for entry in whole:
        entry.write_bytes(b"damaged")
    taken(counted)

    def others_finish() -> None:
        for entry, content in whole.items():
            entry.write_bytes(content)

    images, _ = fill_as(config(), Shard(1, 2, others_finish))
    assert taken(counted) == NOTHING | {"images": 4, "vae": 1} and images == CacheStats(4, 4, 4)


def test_shares_cover_everything_once(config, counted, tmp_path: Path):
    """Shares cover every entry once, whichever are missing.

    A process that looks later finds fewer entries missing; the shares do not depend on that.
    """
    fill_run_caches(config())
    entries = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    for entry in entries:
        entry.unlink()
    taken(counted)
    for rank in range(3):
        with pytest.raises(InterruptedError):
            fill_as(config(), Shard(rank, 3, leave))
    assert taken(counted) == NOTHING | {"images": 8, "vae": 3} and all(entry.exists() for entry in entries)


def leave() -> None:
    raise InterruptedError


def fill_as(config: Config, share: Shard) -> tuple[CacheStats, CacheStats]:
    """Fill the caches of `config` as a process among several."""
    found: list[tuple[CacheStats, CacheStats]] = []
    with pytest.MonkeyPatch.context() as patch:
        original = encoding.encode_missing

        def encode_missing(*args):
            found.append(original(*args[:-1], share))
            return found[0]

        patch.setattr(encoding, "encode_missing", encode_missing)
        fill_run_caches(config)
    return found[0]


@pytest.mark.slow
def test_two_processes_share_the_work(config, tmp_path: Path, forking_python: str):
    """Two processes under torchrun together encode every image and prompt once."""
    text = dump_config(config(train={"batch_size": 1}))
    (tmp_path / "c.yaml").write_text(text)
    code = (
        "import json, sys; from pathlib import Path; from zimage_train.dataset import encoding;"
        "from zimage_train.training import distributed;"
        "from zimage_train.config.load import read_config; from zimage_train.commands.train import fill_run_caches;"
        "counts = []; make = encoding.image_encoder\n"
        "def counting(*a):\n"
        "    encode = make(*a)\n"
        "    return lambda images: (counts.append(len(images)), encode(images))[1]\n"
        "encoding.image_encoder = counting\n"
        "fill_run_caches(read_config(Path(sys.argv[1]), []))\n"
        "world = distributed.init()\n"
        "Path(sys.argv[2]).with_suffix(f'.{world.rank}').write_text(json.dumps([world.world_size, sum(counts)]))\n"
    )
    (tmp_path / "run.py").write_text(code)
    torchrun = [forking_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *(str(tmp_path / name) for name in ("run.py", "c.yaml", "counts"))],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / f"counts.{process}").read_text()) for process in (0, 1)]
    assert found == [[2, 4], [2, 4]]
