"""Each warning comes exactly when its danger begins, names its remedy, and is silent before."""

from typing import Any

import pytest

from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.planning.config_warnings import FEW_IMAGES, HIGH_LR, MANY_STEPS, STEPS_FOR_FEW_IMAGES, config_warnings

FINE: dict[str, Any] = {
    "name": "a",
    "data": [{"folder": "photos", "trigger": "zorb"}],
    "sample": {"prompts": ["a zorb", "a tree"]},
}
IMAGES = 20


def warnings(num_images: int = IMAGES, **changes: dict[str, Any]) -> list[str]:
    """The warnings of a config without any, with some settings changed."""
    config = Config.model_validate(changed(**changes))
    return [warning.text for warning in config_warnings(config, num_images)]  # of the published models


def changed(**changes: dict[str, Any]) -> dict[str, Any]:
    values = {key: (value | changes.get(key, {})) if isinstance(value, dict) else value for key, value in FINE.items()}
    values |= {key: value for key, value in changes.items() if key not in values or not isinstance(value, dict)}
    return values


@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_have_no_warning(variant: str):
    """A config of defaults has no warning."""
    assert warnings(model={"variant": variant}) == []


@pytest.mark.parametrize(
    ("fires", "silent", "words"),
    [
        (
            {"model": {"adapter": None}},
            [{"model": {"adapter": "v1"}}, {"model": {"adapter": "x.safetensors"}}, {"model": {"variant": "base"}}],
            ["model.adapter is null", "undoes its distillation", "set model.adapter: v2", "DistillPatch"],
        ),
        (
            {"model": {"adapter_strength": 0.99}},
            [
                {"model": {"adapter_strength": 1.0}},
                {"model": {"adapter_strength": 1.5}},
                {"model": {"variant": "base", "adapter_strength": 0.5}},
            ],
            ["model.adapter_strength is 0.99", "set it to 1"],
        ),
        (
            {"optimizer": {"lr": 2e-4}},
            [
                {"optimizer": {"lr": 1.99e-4}},
                {"optimizer": {"lr": 1e-3}, "model": {"variant": "deturbo"}},
                {"optimizer": {"name": "prodigy", "lr": 1.0}},
            ],
            ["optimizer.lr is 0.0002", "from 0.0002 on", "use 1e-4"],
        ),
        (
            {"lora": {"start": "pissa"}},
            [
                {"lora": {"start": "orthogonal"}},
                {"lora": {"start": "pissa"}, "model": {"variant": "base"}},
            ],
            ["lora.start: pissa changes Turbo more", "use a third of the optimizer.lr, or start: zero"],
        ),
        (
            {"lora": {"type": "dora"}},
            [{"lora": {"type": "loha"}}, {"lora": {"type": "dora"}, "model": {"variant": "base"}}],
            ["lora.type: dora depends on the weights", "lower optimizer.lr"],
        ),
        (
            {"lora": {"rslora": True}},
            [
                {"lora": {"rslora": True, "alpha": 4.0}},
                {"lora": {"rslora": False}},
                {"lora": {"rslora": True, "rank": 1}},
            ],
            ["lora.rslora without lora.alpha scales the change of each weight by 4", "set lora.alpha: 4", "rank 16"],
        ),
        (
            {"train": {"steps": 10_001}},
            [
                {"train": {"steps": 10_000}},
                {"train": {"steps": 50_000}, "model": {"variant": "base"}},
            ],
            ["train.steps is 10001", "beyond 10,000 steps", "stop earlier, or train deturbo or base"],
        ),
        (
            {"num_images": 9, "train": {"steps": 2201}},
            [
                {"num_images": 9, "train": {"steps": 2200}},
                {"num_images": 10, "train": {"steps": 2201}},
            ],
            ["train.steps is 2201 for 9 images", "use 1500 to 2200 steps, or add images"],
        ),
        (
            {"sample": {"steps": 9}},
            [
                {"sample": {"steps": 8}},
                {"sample": {"steps": "auto"}},
                {"sample": {"steps": 9}, "model": {"variant": "base"}},
            ],
            ["previews use 9 steps and guidance 0 (CFG 1)", "8 steps and guidance 0", "set both to auto"],
        ),
        (
            {"sample": {"guidance": 0.5}},
            [{"sample": {"guidance": 0.0}}, {"sample": {"guidance": 2.0}, "model": {"variant": "deturbo"}}],
            ["previews use 8 steps and guidance 0.5 (CFG 1.5)", "set both to auto"],
        ),
        (
            {"sample": {"prompts": ["a zorb", "Zorb, sitting"]}},
            [
                {"sample": {"prompts": ["a zorb", "two zorbs"]}},
                {"sample": {"prompts": ["a zorb", "a tree"]}},
                {"data": [{"folder": "photos"}], "sample": {"prompts": ["a zorb"]}},
            ],
            ["every prompt in sample.prompts has the trigger", "add a prompt without it"],
        ),
        (
            {"sample": {"prompts": []}},
            [{"sample": {"prompts": ["a tree"]}}],
            ["sample.prompts is empty", "give 5 to 10 prompts, two without the trigger"],
        ),
    ],
)  # fmt: skip
def test_warning_thresholds_and_remedies(fires: dict[str, Any], silent: list[dict[str, Any]], words: list[str]):
    """Each warning comes at its threshold and names its remedy."""
    (line,) = warnings(**fires)
    assert [word for word in words if word not in line] == []
    assert line.count("\n") == 0
    for changes in silent:
        assert warnings(**changes) == []


def test_adapter_damage_is_said_once():
    """A missing and a weakened adapter are not both warned about."""
    (line,) = warnings(model={"adapter": None, "adapter_strength": 0.5})
    assert line.startswith("model.adapter is null")


def test_adapter_warning_covers_many_steps():
    """Many steps without the adapter have only the adapter's warning."""
    (line,) = warnings(model={"adapter": None}, train={"steps": 20_000})
    assert line.startswith("model.adapter is null")


def test_trigger_of_any_entry_counts():
    """A preview prompt may have the trigger of any entry."""
    data = [{"folder": "x", "trigger": "zorb"}, {"folder": "y", "trigger": "blip"}, {"folder": "z"}]
    (line,) = warnings(data=data, sample={"prompts": ["a zorb", "a blip"]})
    assert "has the trigger" in line
    assert warnings(data=data, sample={"prompts": ["a zorb", "a blip", "a tree"]}) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"adapter": None}},
        {"model": {"adapter_strength": 0.5}},
        {"lora": {"start": "pissa"}},
        {"train": {"steps": 12_000}},
        {"optimizer": {"lr": 1e-3}},
        {"optimizer": {"name": "prodigy", "lr": 1e-4}},
        {"lora": {"rslora": True}},
        {"schedule": {"warmup_steps": 4000}},
        {"sample": {"steps": 20, "guidance": 3}},
    ],
    ids=str,
)
def test_a_remedy_is_one(changes: dict[str, Any]):
    """After the changes that a warning proposes it is gone, and no other has come."""
    (warning,) = config_warnings(Config.model_validate(changed(**changes)), IMAGES)
    assert warning.changes
    for change in warning.changes:
        section, name = change.key.split(".")
        changes = changes | {section: changes.get(section, {}) | {name: change.value}}
    assert warnings(**changes) == []


def test_several_dangers_are_all_named():
    found = warnings(
        5,
        model={"adapter_strength": 0.5},
        optimizer={"lr": 1e-3},
        train={"steps": 12_000},
        sample={"steps": 20, "guidance": 3, "prompts": ["zorb"]},
    )
    starts = [
        "model.adapter_strength",
        "optimizer.lr",
        "train.steps is 12000:",
        "train.steps is 12000 for 5",
        "previews",
    ]
    assert [one for one in starts if not any(line.startswith(one) for line in found)] == []
    assert len(found) == 6


def test_numbers_in_warnings_are_current():
    """The numbers that the warnings give are the numbers that are used."""
    assert (HIGH_LR, MANY_STEPS, FEW_IMAGES, STEPS_FOR_FEW_IMAGES) == (
        2e-4,
        10_000,
        10,
        2_200,
    )
    assert (VARIANTS["turbo"].steps, VARIANTS["turbo"].guidance) == (8, 0.0)


def test_warnings_of_the_miniature():
    """The miniature may have a higher rate, and has all other warnings."""
    values = {"variant": "turbo", "adapter": None}
    config = Config.model_validate({"name": "x", "data": [{"folder": "p"}], "model": values, "optimizer": {"lr": 2e-3}})
    found, small = (list(map(str, config_warnings(config, 20, is_small))) for is_small in (False, True))
    assert [line for line in found if line not in small] == [line for line in found if "optimizer.lr" in line] != []
    assert any("adapter is null" in line for line in small)
