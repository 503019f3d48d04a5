"""What model managers read of an exported LoRA: words, base model and hashes; and what no file may say."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config
from zimage_train.io import tensorfile
from zimage_train.lora import file_hashes, lora_file, metadata
from zimage_train.lora.deltas import Factors

from helpers import folder
from lora_commands import converted, lora_command, metadata_of
from lora_files import data_digest
from proofs.table import settings
from proofs.trials import LEFT_OUT, nested

IMAGES = "/home/alice/photos of bob"


def config(level: str = "minimal", triggers: tuple[str | None, ...] = ("zorb",), **changes) -> Config:
    data = [{"folder": IMAGES, "resolution": [512, 768], "trigger": trigger} for trigger in triggers]
    values = {"name": "a", "data": data, "lora": {"rank": 4}, "save": {"metadata": level}, **changes}
    made, problems = validate_config(values, lambda path: str(path))
    assert made is not None, problems
    return made


def written(path: Path, said: dict[str, str], rank: int = 2, size: int = 8) -> Path:
    generator = torch.Generator().manual_seed(rank)
    lora = {
        f"layers.{block}.attention.to_q": Factors(
            torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator), 1.0
        )
        for block in range(2)
    }
    lora_file.export_lora(path, lora, "fp32", said)
    return path


# What the managers do with a header, in few words; their sources are named in lora/metadata.py.


def words_in_comfyui(said: dict[str, str]) -> list[str]:
    tags: set[str] = set()
    for counts in json.loads(said.get("ss_tag_frequency", "{}")).values():
        tags |= counts.keys()
    return sorted(tags) or json.loads(said.get("trained_words", "[]"))


def words_in_lora_manager(said: dict[str, str]) -> list[str]:
    frequency = json.loads(said.get("ss_tag_frequency", "{}"))
    first = next(iter(frequency.values()), {})
    return [word for word, _ in sorted(first.items(), key=lambda one: one[1], reverse=True)]


def autov3(said: dict[str, str]) -> str:
    return (said.get("sshs_model_hash") or said["modelspec.hash_sha256"].removeprefix("0x"))[:12]


def kohya_hashes(path: Path) -> tuple[str, str]:
    """As `precalculate_safetensors_hashes`, with the safetensors library's own writer."""
    said = {key: value for key, value in metadata_of(path).items() if key.startswith("ss_")}
    content = save(load_file(path), said)
    model = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    return model, hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


@pytest.mark.parametrize("size", [8, 40_000, 70_001])
@pytest.mark.parametrize("said", [{"note": "ä"}, {"ss_x": 'ü "quoted"', "format": "pt", "note": "x"}])
def test_hashes_are_kohyas(tmp_path: Path, size: int, said: dict[str, str]):
    """Files with and without a part after the first MiB have the hashes of kohya's tools and of modelspec."""
    path = written(tmp_path / "x.safetensors", said, size=size)
    found = metadata_of(path)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(path)
    assert found["modelspec.hash_sha256"] == f"0x{data_digest(path)}"
    assert (found["sshs_legacy_hash"] == "e3b0c442") == (path.stat().st_size < 2**20)


def test_order_of_dtypes_is_the_librarys():
    """Tensors of several dtypes are hashed in the order in which the safetensors library writes them."""
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(4), "c": torch.ones(2, dtype=torch.float64)}
    entries = {name: tensorfile.tensor_entry(tensor) for name, tensor in tensors.items()}
    content = save(tensors)
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert file_hashes.file_hashes(entries, {})["sshs_model_hash"] == digest


@pytest.mark.parametrize(
    ("variant", "name"), [("turbo", "ZImageTurbo"), ("deturbo", "ZImageTurbo"), ("base", "ZImageBase")]
)
def test_base_model_has_civitais_name(variant: str, name: str):
    said = metadata.training_metadata(config(model={"variant": variant}), None)
    assert said["ss_base_model_version"] == name


@pytest.mark.parametrize("level", ["minimal", "full"])
@pytest.mark.parametrize(
    ("triggers", "key"), [(("zorb",), "zorb"), (("zorb", "blip, big"), "dataset"), (("zorb", None, "zorb"), "zorb")]
)
def test_managers_see_the_triggers(level: str, triggers: tuple[str | None, ...], key: str):
    """All triggers stand in the only entry, before any tag, whatever is in them."""
    prompts = ["zorb, red, on grass", "zorb, Red"]
    said = metadata.training_metadata(config(level, triggers), None, prompts)
    words = list(dict.fromkeys(trigger for trigger in triggers if trigger))
    assert list(json.loads(said["ss_tag_frequency"])) == [key]
    assert json.loads(said["trained_words"]) == words == metadata.triggers_of(said)
    assert words_in_lora_manager(said)[: len(words)] == words
    if level == "minimal":
        assert words_in_comfyui(said) == sorted(words) and "grass" not in str(said)
    else:
        assert json.loads(said["ss_tag_frequency"])[key] == dict.fromkeys(words, 2) | {"red": 2, "on grass": 1}


def test_no_trigger_is_no_word():
    """Without a trigger a minimal header has no words, and a full header has the tags."""
    said = metadata.training_metadata(config(triggers=(None,)), None, ["a cat"])
    assert not {"trained_words", "ss_tag_frequency", "modelspec.trigger_phrase"} & said.keys()
    said = metadata.training_metadata(config("full", (None,)), None, ["a cat"])
    assert json.loads(said["ss_tag_frequency"]) == {"dataset": {"a cat": 1}} and "trained_words" not in said


def test_levels_say_what_they_promise():
    """minimal says trigger, base model, rank, resolution; none says nothing; full adds settings."""
    none = metadata.training_metadata(config("none"), "digest", ["zorb"])
    minimal = metadata.training_metadata(config(), "digest", ["zorb"])
    full = metadata.training_metadata(config("full"), "digest", ["zorb"])
    assert none == {"format": "pt"} == metadata.at_step(none, 5)
    assert [metadata.level_of(said) for said in (none, minimal, full)] == ["none", "minimal", "full"]
    assert minimal["modelspec.resolution"] == "768x768" and minimal["ss_network_dim"] == "4"
    added = set(full) - set(minimal)
    assert added == {f"zimage_train.{key}" for key in ("settings", "adapter", "adapter_sha256", "adapter_strength")}
    assert json.loads(full["zimage_train.settings"])["optimizer"]["name"] == "adamw8bit"


PATHS = [key.replace(".N", ".0") for key, field in settings() if "_without_variables" in f"{field} {field.annotation}"]
NEEDED = {
    "data.0.metadata": {"data.0.folder": LEFT_OUT},
    "data.0.negative": {"train.method": "pairs"},
    "data.0.prompts": {"data.0.folder": LEFT_OUT, "train.method": "de_distill"},
}
"""What comes with a path, beside the rest."""


def test_paths_are_found():
    assert {"output_dir", "cache.folder", "data.0.folder", "model.vae", "train.beside.0.file"} <= set(PATHS)
    assert len(PATHS) > 15


@pytest.mark.parametrize("level", ["minimal", "full", "none"])
@pytest.mark.parametrize("key", PATHS)
def test_no_path_and_no_user_name(key: str, level: str):
    """No setting that is a path brings a folder into the header."""
    for private in ("/home/alice/secret/file.safetensors", r"C:\Users\alice\secret\file.safetensors"):
        values = {"name": "a", "data.0.folder": "photos", "save.metadata": level, "log.wandb": "alice", key: private}
        made, problems = validate_config(nested(values | NEEDED.get(key, {})), str)
        assert made is not None, problems
        text = json.dumps(metadata.training_metadata(made, "d", ["zorb"], ["e"]))
        for word in ("alice", "secret", "/home", "Users"):
            assert word not in text, (word, private)


def test_header_has_all_settings():
    """With `full`, the header has every section that shapes the weights."""
    without = {"name", "output_dir", "cache", "memory", "sample", "validation", "save", "log"}
    assert set(metadata.shared_settings(config("full"))) == set(Config.model_fields) - without


def test_merge_keeps_the_words_of_all(tmp_path: Path):
    """Triggers of every source, of this and of other trainers, are in the merged file, and so is the base model."""
    ours = metadata.training_metadata(config("full"), None, ["zorb, red", "zorb, red"])
    old = {"ss_base_model_version": "zimage", "modelspec.trigger_phrase": "blip", "zimage_train.variant": "turbo"}
    ai_toolkit = {"ss_base_model_version": "zimage", "ss_tag_frequency": '{"1_frob": {"frob": 1}}'}
    paths = [
        written(tmp_path / f"{number}.safetensors", said, rank=2 + number)
        for number, said in enumerate((ours, old, ai_toolkit))
    ]
    out = tmp_path / "out.safetensors"
    code, text = lora_command("merge", *(f"{path}=1" for path in paths), "-o", out)
    assert code == 0, text
    said = metadata_of(out)
    assert json.loads(said["trained_words"]) == ["zorb", "blip", "frob"]
    assert said["modelspec.trigger_phrase"] == "zorb, blip, frob"
    assert set(words_in_lora_manager(said)[:3]) == {"zorb", "blip", "frob"}
    assert json.loads(said["ss_tag_frequency"])["dataset"]["red"] == 2
    assert said["ss_base_model_version"] == "ZImageTurbo"


def test_merge_of_base_models_names_none(tmp_path: Path):
    sources = [metadata.training_metadata(config(model={"variant": name}), None) for name in ("turbo", "base")]
    assert "ss_base_model_version" not in metadata.edited_metadata("merge", sources, {}, [4])


@pytest.mark.parametrize(
    "words",
    [
        ["weight", "IN", "--scale", "all=0.5", "-o", "OUT"],
        ["resize", "IN", "--rank", "1", "-o", "OUT"],
        ["merge", "IN=0.5", "-o", "OUT"],
        *(["convert", "IN", "--to", to, "-o", "OUT"] for to in ("comfyui", "kohya", "diffusers", "musubi")),
        ["convert", "IN", "--to", "comfyui", "--dtype", "bf16", "-o", "OUT"],
    ],
)
def test_edits_renew_the_hashes(tmp_path: Path, words: list[str]):
    """Every command that writes a LoRA writes the hashes of its own tensors, and keeps triggers and base model."""
    said = metadata.training_metadata(config(), None)
    source = written(tmp_path / "in.safetensors", metadata.at_step(said, 5))
    out = tmp_path / "out.safetensors"
    code, text = lora_command(*(word.replace("IN", str(source)).replace("OUT", str(out)) for word in words))
    assert code == 0, text
    found = metadata_of(out)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(out)
    assert found["modelspec.hash_sha256"] == f"0x{data_digest(out)}" and autov3(found) == data_digest(out)[:12]
    assert words_in_comfyui(found) == words_in_lora_manager(found) == ["zorb"]
    assert found["ss_base_model_version"] == "ZImageTurbo"


def test_average_renews_the_hashes(tmp_path: Path):
    said = metadata.training_metadata(config(), None)
    paths = [written(tmp_path / f"{step}.safetensors", metadata.at_step(said, step)) for step in (1, 2)]
    code, text = lora_command("ema", *paths, "--decay", "0.5", "-o", tmp_path / "out.safetensors")
    assert code == 0, text
    found = metadata_of(tmp_path / "out.safetensors")
    assert found["sshs_model_hash"] == data_digest(tmp_path / "out.safetensors")
    assert words_in_comfyui(found) == ["zorb"]


def test_conversion_adds_no_hashes(tmp_path: Path):
    """A file without hashes is converted there and back to the same bytes."""
    tensors = {"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.ones(2, 8)}
    tensors |= {"diffusion_model.layers.0.attention.to_q.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"note": "x"})
    there = converted(tmp_path / "x.safetensors", "musubi", tmp_path / "m.safetensors")
    assert not set(file_hashes.HASH_KEYS) & metadata_of(there).keys()


@pytest.mark.parametrize("text", ["[1", "null", "7", '"x"', "{}", '{"a": null}', '{"a": {"b": "c"}}', "[[]]"])
def test_odd_words_are_no_crash(text: str):
    """Words that are not as they should be are left out."""
    said = {"ss_tag_frequency": text, "trained_words": text}
    metadata.triggers_of(said)
    assert metadata.edited_metadata("weight", [said], {}, [4])["format"] == "pt"


def test_words_are_texts():
    """What a list of words holds beside texts is no trigger, and `true` is no count."""
    said = {"trained_words": '[["a"], null, 3, {"x": 1}, "zorb"]', "ss_tag_frequency": '{"a": {"b": true}}'}
    assert metadata.triggers_of(said) == ["zorb"]
    assert metadata.triggers_of({"ss_tag_frequency": said["ss_tag_frequency"]}) == []


@pytest.mark.slow
def test_level_can_change_on_resume(make_config):
    """A finished run exports again at another level, with the same tensors, and says nothing at `none`."""
    digests = []
    for level in ("minimal", "full", "none"):
        made = make_config(train={"steps": 2}, save={"metadata": level})
        run_training(made, fresh=False)
        path = folder(made) / "lora" / "tiny.safetensors"
        said = metadata_of(path)
        assert metadata.level_of(said) == level
        digests.append(data_digest(path))
        if level == "full":
            assert json.loads(said["ss_tag_frequency"])["zorb"]["zorb"] >= 1
            assert len(json.loads(said["ss_tag_frequency"])["zorb"]) > 1
            for private in (made.output_dir, str(mini.IMAGES), str(mini.TURBO)):
                assert private.encode() not in path.read_bytes()
    assert said == {"format": "pt"} and len(set(digests)) == 1
