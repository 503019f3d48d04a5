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
