"""Prompts of options and files get the trigger of the LoRAs that they are drawn with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_train.commands.prompt_sources import prompt_specs
from zimage_train.errors import ConfigError, ZImageTrainError
from zimage_train.lora.metadata import TRIGGERS


def lora(path: Path, trigger: str | None) -> Path:
    metadata = {} if trigger is None else {TRIGGERS: trigger}
    save_file({"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(1, 64)}, path, metadata)
    return path


def test_placeholder_becomes_the_trigger(tmp_path: Path):
    """A placeholder, also in a negative prompt, becomes the trigger of the LoRA; other words stay as they are."""
    (tmp_path / "p.txt").write_text("the [NAME] --n not [trigger] --w 64\nZorb\n")
    files = [lora(tmp_path / "a.safetensors", "zorb"), lora(tmp_path / "b.safetensors", None)]
    specs = prompt_specs(["a [name]"], tmp_path / "p.txt", files)
    assert [(spec.prompt, spec.overrides) for spec in specs] == [
        ("a zorb", {}),
        ("the zorb", {"negative": "not zorb", "width": 64}),
        ("Zorb", {}),
    ]


@pytest.mark.parametrize(
    ("triggers", "found"),
    [
        ([], "no LoRA names a trigger"),
        ([None], "no LoRA names a trigger"),
        (["zorb", "qua"], "the LoRAs have several triggers (zorb, qua)"),
        (["zorb, qua"], "the LoRAs have several triggers (zorb, qua)"),
    ],
)
def test_placeholder_without_a_trigger(triggers, found: str, tmp_path: Path):
    """A placeholder that no single trigger can replace is refused, with its file and line."""
    (tmp_path / "p.txt").write_text("a cat\na [Name]\n")
    files = [lora(tmp_path / f"{number}.safetensors", trigger) for number, trigger in enumerate(triggers)]
    with pytest.raises(ConfigError) as caught:
        prompt_specs(["the [trigger]"], tmp_path / "p.txt", [*files, tmp_path / "gone.safetensors"])
    assert [str(problem) for problem in caught.value.problems] == [
        f"--prompt: has [trigger], and {found}; write the word itself",
        f"{tmp_path / 'p.txt'}:2: has [Name], and {found}; write the word itself",
    ]


def test_plain_prompts_need_no_lora(tmp_path: Path):
    """LoRAs are not opened for prompts that have no placeholder."""
    assert [spec.prompt for spec in prompt_specs(["a cat"], None, [tmp_path / "gone.safetensors"])] == ["a cat"]


def test_all_problems_at_once(tmp_path: Path):
    """The problems of options and files are reported together."""
    (tmp_path / "p.txt").write_text("a --q 1\nb -w 5\n")
    with pytest.raises(ZImageTrainError) as caught:
        prompt_specs(["a --w 64"], tmp_path / "p.txt", [])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(("scale", "guidance"), [("0", 0.0), ("0.0", 0.0), ("1", 0.0), ("1.0", 0.0), ("4", 3.0)])
@pytest.mark.parametrize("flag", ["l", "g"])
def test_cfg_scale_of_a_line(flag: str, scale: str, guidance: float, tmp_path: Path):
    """CFG scales 0 and 1 both mean no guidance, as in kohya's tools and musubi-tuner."""
    (tmp_path / "p.txt").write_text(f"a cat --{flag} {scale}\n")
    assert prompt_specs([], tmp_path / "p.txt", [])[0].overrides == {"guidance": guidance}


@pytest.mark.parametrize("scale", ["0.5", "-2", "x"])
def test_cfg_scales_that_are_none(scale: str, tmp_path: Path):
    """A CFG scale below 1 is refused as it is written."""
    (tmp_path / "p.txt").write_text(f"a cat --l {scale}\n")
    with pytest.raises(ConfigError, match=f"txt:1: --l is '{scale}'; give 0, or a CFG scale of at least 1"):
        prompt_specs([], tmp_path / "p.txt", [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", b'["a cat"]', "is a .json, whose lines are no prompts; write a prompt per line into a .txt"),
        ("p.jsonl", b'{"prompt": "a cat"}', "is a .jsonl, whose lines are no prompts"),
        ("p.toml", b'[[prompt]]\nprompt = "a cat"', "is a .toml, whose lines are no prompts"),
        ("p.csv", b"prompt\na cat", "is a .csv, whose lines are no prompts"),
        ("p.txt", "a cat".encode("utf-16-le"), "contains NUL bytes, so it is not a text file; save it as UTF-8"),
    ],
)
def test_files_that_are_no_prompt_files(name: str, content: bytes, said: str, tmp_path: Path):
    """A file of another form is not drawn as its text."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        prompt_specs([], tmp_path / name, [])
    assert said in str(caught.value)


def test_triggers_of_other_tools(tmp_path: Path):
    """A placeholder becomes the trigger that the LoRA names in any of the places where tools name it."""
    said = {
        "trained_words": '["zorb, the"]',
        "modelspec.trigger_phrase": "zorb",
        "ss_tag_frequency": '{"1_zorb": {"zorb": 1}}',
    }
    for key, value in said.items():
        path = tmp_path / f"{key}.safetensors"
        save_file({"a": torch.zeros(1)}, path, {key: value})
        found = "zorb, the" if key == "trained_words" else "zorb"
        assert prompt_specs(["a [trigger]"], None, [path])[0].prompt == f"a {found}", key
