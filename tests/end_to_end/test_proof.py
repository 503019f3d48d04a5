"""The proof table of the recipes: what each setting changes, and that its neutral value is the same, bit for bit.

A run of two steps on the miniature is compared with a run in which the setting is left out, by the bytes of its LoRA.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.errors import Stopped
from zimage_train.report.metrics import read_records

from helpers import facts, final, folder, losses, stop_after
from mini_config import merge

TAGS = "zorb, red, big, on the left, drawn, plain background"
COMMON: dict[str, Any] = {"train": {"steps": 2, "batch_size": 2}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder called 1_zorb with eight images of the miniature, tags as captions, and masks beside it."""
    root = tmp_path_factory.mktemp("proof")
    for index, path in enumerate(sorted(mini.IMAGES.glob("*.[pj]*g"))[:8]):
        target = root / "all" / "1_zorb" / f"{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            size = image.size
            image.convert("RGB").save(target)
        target.with_suffix(".txt").write_text(f"{TAGS}, number {index}")
        for name, values in (("white", 255), ("half", np.linspace(0, 255, size[0])[None, :])):
            mask = root / name / "1_zorb" / target.name
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.broadcast_to(values, size[::-1]).astype(np.uint8)).save(mask)
    shutil.copytree(root / "all", root / "class")
    for path in (root / "class").rglob("*.txt"):
        path.write_text("a red circle")
    return root


@pytest.fixture
def bytes_of(make_config, images: Path, tmp_path: Path):
    """`bytes_of(changes)`: the LoRA of a run with these settings; `{images}` in them is the folder of this test."""
    count = iter(range(100))

    def run(changes: dict[str, Any]) -> bytes:
        own = {"folder": str(images / "all"), "resolution": [64], "trigger": "zorb", "caption_dropout": 0.2}
        changes = filled(changes, images)
        extra = changes.pop("more_data", [])
        left_out = changes.pop("without", [])
        data = {key: value for key, value in (own | changes.pop("data", {})).items() if key not in left_out}
        settings = merge(merge(COMMON, {"name": f"run_{next(count)}x", "data": [data, *extra]}), changes)
        epochs = settings["train"].pop("epochs", None)
        config = make_config(**settings)
        if epochs is not None:
            config = config.model_copy(
                update={"train": config.train.model_copy(update={"steps": 3000, "epochs": epochs})}
            )
        run_training(config, fresh=False)
        return numbers(final(config))

    return run


def numbers(content: bytes) -> bytes:
    """The numbers of a LoRA file, without its header, which names the run."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def filled(value: Any, images: Path) -> Any:
    if isinstance(value, dict):
        return {key: filled(one, images) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, images) for one in value]
    return value.format(images=images) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def plain_bytes() -> dict[str, bytes]:
    return {}


CLASS = [{"folder": "{images}/class", "resolution": [64], "regularization": True}]
NEUTRAL: dict[str, dict[str, Any]] = {
    "data.keep_tags, tag_dropout, shuffle_tags": {"data": {"keep_tags": 0, "tag_dropout": 0.0, "shuffle_tags": False}},
    "data.flip": {"data": {"flip": False}},
    "data.weight": {"data": {"weight": 1.0}},
    "data.mask, all white": {"data": {"mask": "{images}/white", "mask_floor": 0.5, "mask_prior": 0.0}},
    "data.mask_prior, nothing masked out": {"data": {"mask": "{images}/white"}},
    "data.max_pixels of the same area": {"data": {"max_pixels": 64 * 64}, "without": ["resolution"]},
    "data.batch_size of the same size": {"data": {"batch_size": 2}, "train": {"batch_size": 1}},
    "data.repeats by a folder called 1_": {"data": {"repeats": "by_folder"}},
    "data.caption_lines of one line": {"data": {"caption_lines": True}},
    "data.dropout_keeps_trigger": {"data": {"dropout_keeps_trigger": False}},
    "train.epochs of the same length": {"train": {"epochs": 0.4}},
    "train.regularization_share without such images": {"train": {"regularization_share": 0.9}},
    "guidance.contrastive": {"guidance": {"contrastive": None}},
    "guidance of 1": {"guidance": {"contrastive": 1.0, "differential": 1.0}},
    "loss.detail": {"loss": {"detail": 1.0}},
    "loss.delta beyond every error": {"loss": {"type": "huber", "delta": 1000.0}},
    "preserve": {"preserve": {"kind": None, "weight": 3.0, "class_word": "dog"}},
    "ema, which only watches": {"ema": {"decay": 0.9}},
    "validation, which only watches": {"validation": {"folder": "{images}/class", "every": 1, "resolution": 64}},
    "schedule linear to 1": {"schedule": {"name": "linear", "params": {"end_factor": 1.0}}},
    "schedule step, not yet": {"schedule": {"name": "step", "params": {"every": 2}}},
    "schedule cosine_with_restarts to 1": {
        "schedule": {"name": "cosine_with_restarts", "params": {"end_factor": 1.0, "cycles": 2}}
    },
}
CHANGING: dict[str, dict[str, Any]] = {
    "data.shuffle_tags": {"data": {"shuffle_tags": True}},
    "data.tag_dropout": {"data": {"tag_dropout": 0.5}},
    "data.flip": {"data": {"flip": True}},
    "data.mask": {"data": {"mask": "{images}/half"}},
    "data.mask_prior": {"data": {"mask": "{images}/half", "mask_floor": 0.0, "mask_prior": 1.0}},
    "data.max_pixels": {"data": {"max_pixels": 48 * 48}, "without": ["resolution"]},
    "data.batch_size": {"data": {"batch_size": 3}},
    "data.dropout_keeps_trigger": {"data": {"dropout_keeps_trigger": True, "caption_dropout": 1.0}},
    "data.regularization": {"more_data": CLASS},
    "data.regularization: prior": {"more_data": [CLASS[0] | {"regularization": "prior"}]},
    "train.regularization_share": {"more_data": CLASS, "train": {"regularization_share": 0.01}},
    "train.epochs": {"train": {"epochs": 1}},
    "guidance.contrastive": {"guidance": {"contrastive": 3.0}},
    "guidance.contrastive_schedule": {"guidance": {"contrastive": 3.0, "contrastive_schedule": "sigma"}},
    "guidance.cfg_zero": {"guidance": {"contrastive": 3.0, "cfg_zero": True}},
    "loss.type: mae": {"loss": {"type": "mae"}},
    "loss.type: huber": {"loss": {"type": "huber"}},
    "loss.type: pseudo_huber": {"loss": {"type": "pseudo_huber"}},
    "loss.delta": {"loss": {"type": "huber", "delta": 0.5}},
    "loss.detail": {"loss": {"detail": 3.0}},
    "timesteps.type": {"timesteps": {"type": "linear"}},
    "loss.min_snr": {"loss": {"min_snr": 5.0}, "timesteps": {"type": "linear"}},
    "loss.min_snr_floor": {"loss": {"min_snr": 5.0, "min_snr_floor": 0.9}, "timesteps": {"type": "linear"}},
    "preserve.kind: trigger": {"preserve": {"kind": "trigger", "class_word": "circle"}},
    "preserve.class_word": {"preserve": {"kind": "trigger", "class_word": "square"}},
    "preserve.weight": {"preserve": {"kind": "trigger", "class_word": "circle", "weight": 2.0}},
    "preserve.kind: blank": {"preserve": {"kind": "blank"}},
    "schedule": {"schedule": {"name": "rex"}},
    "optimizer": {"optimizer": {"name": "automagic", "params": {"bump": 0.5}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", NEUTRAL)
def test_the_neutral_value_changes_no_bit(bytes_of, plain_bytes, setting: str):
    if "plain" not in plain_bytes:
        plain_bytes["plain"] = bytes_of({})
    assert bytes_of(dict(NEUTRAL[setting])) == plain_bytes["plain"]


@pytest.mark.slow
def test_other_values_change_the_lora(bytes_of):
    """Every other value changes the LoRA, each in its own way."""
    found = {"nothing": bytes_of({})} | {setting: bytes_of(dict(changes)) for setting, changes in CHANGING.items()}
    same = [(one, other) for one in found for other in found if one < other and found[one] == found[other]]
    # A small share of regularization leaves the two steps of this run to the concept.
    assert same == [("nothing", "train.regularization_share")]


EVERYTHING: dict[str, Any] = {
    "data": {"mask": "{images}/half", "mask_prior": 0.5},
    "more_data": [CLASS[0] | {"regularization": "prior"}],
    "preserve": {"kind": "trigger", "class_word": "circle"},
    "guidance": {"contrastive": 1.5, "differential": 2.0, "contrastive_schedule": "sigma", "cfg_zero": True},
    "loss": {"type": "huber", "delta": 0.5, "detail": 2.0, "min_snr": 5.0},
    "timesteps": {"type": "linear"},
    "ema": {"decay": 0.9},
    "train": {"grad_accumulation": 2},
}


@pytest.mark.slow
def test_memory_settings_change_no_bit(bytes_of):
    """Streaming and recomputation change no bit, with all parts of the loss.

    Passes without the LoRA and without a gradient come between those that recompute and stream.
    """
    plain = bytes_of(dict(EVERYTHING))
    for memory in ({"offload": 0.5}, {"offload": 1.0, "checkpointing": "full"}, {"checkpointing": "w1w3"}):
        assert bytes_of(EVERYTHING | {"memory": memory}) == plain, memory


@pytest.mark.slow
def test_run_with_everything_resumes(make_config, images: Path, monkeypatch):
    """A run with every setting continues bit for bit."""
    values = filled(dict(EVERYTHING), images)
    own = {"folder": str(images / "all"), "resolution": [64], "trigger": "zorb", "shuffle_tags": True, "flip": True}
    values["data"] = [own | values["data"], *values.pop("more_data")]
    settings = merge(values, {"train": {"steps": 4}, "optimizer": {"name": "prodigy8bit", "lr": 1.0}})
    whole = make_config(**merge(settings, {"name": "whole"}))
    run_training(whole, fresh=False)
    stopped = make_config(**settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run_training(stopped, fresh=False)
    run_training(stopped, fresh=False)
    assert numbers(final(stopped)) == numbers(final(whole))
    assert losses(stopped) == losses(whole)
    preserved = [record["preservation"] for record in read_records(folder(whole) / "metrics.jsonl")]
    assert len(preserved) == 4 and all(value >= 0 for value in preserved) and preserved[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "accumulate"), [(2.0, 1), (0.5, 2)])
def test_folder_weight_scales_the_loss(make_config, images: Path, weight, accumulate):
    """The weight of a folder multiplies its loss and its gradient."""

    def first(name: str, value: float) -> dict[str, Any]:
        data = [{"folder": str(images / "all"), "resolution": [64], "trigger": "zorb", "weight": value}]
        config = make_config(
            name=name, data=data, train={"steps": 1, "grad_accumulation": accumulate, "max_grad_norm": None}
        )
        run_training(config, fresh=False)
        return read_records(folder(config) / "metrics.jsonl")[0]

    plain, weighed = first("plain", 1.0), first("weighed", weight)
    for name in ("loss", "grad_norm"):
        assert weighed[name] == pytest.approx(weight * plain[name], rel=1e-5)
    assert weighed["sigma"] == plain["sigma"] and weighed["samples"] == plain["samples"]


@pytest.mark.slow
def test_passes_follow_the_settings(make_config, images: Path):
    """The passes of a run follow its settings."""
    data = [
        {"folder": str(images / "all"), "resolution": [64], "trigger": "zorb", "flip": True, "batch_size": 4},
        {"folder": str(images / "class"), "resolution": [64], "regularization": True, "batch_size": 1},
    ]
    train_settings = {"steps": 10, "batch_size": 2, "regularization_share": 0.3}
    config = make_config(data=data, train=train_settings, preserve={"kind": "blank"})
    run_training(config, fresh=False)
    records = read_records(folder(config) / "metrics.jsonl")
    assert [len(record["samples"]) for record in records].count(1) >= 3
    assert max(len(record["samples"]) for record in records) > 2, "the folder's own batch size"
    assert all(record["preservation"] is not None for record in records)
    assert facts(config)["dataset"]["samples"] == 16 and facts(config)["dataset"]["regularisation"] == 8
    assert "16 samples per epoch" in (folder(config) / "report.html").read_text()
    assert "and 8 regularization images" in (folder(config) / "report.html").read_text()
