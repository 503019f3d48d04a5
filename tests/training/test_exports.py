"""The files beside an exported LoRA: the picture that managers of models look for, its pruning and its failures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.io import atomic
from zimage_train.report import preview_images
from zimage_train.training import outputs

from helpers import PREVIEWED, final, folder
from lora_commands import converted

PROMPTS = ["a red circle", "a red zorb on a blue background"]
SAMPLE = PREVIEWED | {"prompts": PROMPTS, "first": False, "steps": 1}


def pictures(config) -> list[str]:
    root = folder(config) / "lora"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.slow
def test_picture_is_the_triggers_preview(make_config):
    """NAME.png is the first preview with the trigger, with its recipe inside, and goes with its LoRA."""
    config = make_config(train={"steps": 6}, save={"every": 1, "keep": 2}, sample=SAMPLE)
    run_training(config, fresh=False)
    # Previews were drawn at steps 2, 4 and 6; the LoRAs of steps 4 and 5 are kept, and the last.
    assert pictures(config) == ["tiny-000004.png", "tiny.png"]
    root = folder(config)
    for step, name in ((4, "tiny-000004.png"), (6, "tiny.png")):
        preview = root / "samples" / f"{step:06d}-01.png"
        assert pixels(root / "lora" / name) == pixels(preview)
        request = preview_images.request_of(root / "lora" / name)
        assert request == preview_images.request_of(preview) and request.prompt == PROMPTS[1] and request.seed == 43
    with Image.open(root / "lora" / "tiny.png") as image:
        assert sorted(image.info) == ["parameters", "zimage_train.recipe"]
        assert image.info["parameters"].startswith(PROMPTS[1])


@pytest.mark.slow
def test_lora_does_not_depend_on_pictures(make_config):
    """The bytes of the LoRA are the same with and without previews."""
    run_training(make_config(sample=SAMPLE), fresh=False)
    run_training(make_config(name="plain", sample={"every": None}), fresh=False)
    with_previews, without = (final(make_config(name=name)) for name in ("tiny", "plain"))
    assert _without_name(with_previews) == _without_name(without)


def _without_name(content: bytes) -> tuple[dict, bytes]:
    """The header without names and what depends on its length, and the tensors."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for key in ("modelspec.title", "ss_output_name"):
        del header["__metadata__"][key]
    return header, content[8 + size :]


@pytest.mark.slow
def test_averages_have_their_picture(make_config):
    """The picture lies beside the LoRA that drew it."""
    config = make_config(train={"steps": 2}, ema={"decay": 0.5}, sample=SAMPLE | {"weights": "ema"})
    run_training(config, fresh=False)
    assert pictures(config) == ["ema/tiny.png"]


@pytest.mark.slow
def test_failed_previews_drop_old_picture(make_config, monkeypatch):
    """If the previews of a step fail when it is exported again, the picture of earlier weights goes."""
    config = make_config(train={"steps": 2}, sample=SAMPLE)
    run_training(config, fresh=False)
    assert pictures(config) == ["tiny.png"]
    (folder(config) / "report.html").unlink()  # so that the run is not complete, and does its last step's work again
    for path in (folder(config) / "samples").glob("*.png"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "sample_all", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        run_training(config, fresh=False)
    assert pictures(config) == []
    run_training(config, fresh=False)
    assert pictures(config) == ["tiny.png"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".png", ".workflow.json", ".comfyui.json"])
def test_failing_companion_is_a_warning(make_config, monkeypatch, capsys, ending: str):
    """A picture or workflow that cannot be written is a warning, and the run goes on."""
    config = make_config(train={"steps": 2}, sample=SAMPLE)
    original = atomic.replace_atomically

    def failing(path: Path):
        if path.name == f"tiny{ending}":
            raise atomic.disk_error(path, OSError(28, "No space left on device"))
        return original(path)

    monkeypatch.setattr(atomic, "replace_atomically", failing)
    run_training(config, fresh=False)
    said = capsys.readouterr().out
    assert f"tiny{ending}: cannot be written (the disk is full)" in said.replace("\n", "") and "done:" in said
    assert not (folder(config) / "lora" / f"tiny{ending}").exists()
    assert (folder(config) / "lora" / "tiny.safetensors").exists()


@pytest.mark.slow
def test_images_name_no_folder(make_config, tmp_path: Path):
    """Previews and pictures name models and LoRAs, but no folder of this machine."""
    run_training(make_config(name="other", sample={"every": None}), fresh=False)
    lora = folder(make_config(name="other")) / "lora" / "other.safetensors"
    style = converted(mini.ADAPTER_V1, "peft", tmp_path / "style").parent
    sample = SAMPLE | {"extra_loras": [f"{lora}=0.5", str(style)], "compare_on": str(mini.TURBO)}
    config = make_config(train={"steps": 2}, sample=sample)
    run_training(config, fresh=False)
    for path in [*(folder(config) / "samples").rglob("*.png"), *(folder(config) / "lora").rglob("*.*")]:
        content = path.read_bytes()
        for private in (tmp_path, mini.TURBO.parent):
            assert str(private).encode() not in content, path
    with Image.open(folder(config) / "samples" / "000002-00.png") as image:
        assert image.info["zimage_train.drawn_by"].endswith(
            "turbo in fp32 with the LoRA of tiny at step 2 and other.safetensors=0.5 and style=1"
        )
    nodes = json.loads((folder(config) / "lora" / "tiny.comfyui.json").read_text())
    loaded = [node["inputs"] for node in nodes.values() if node["class_type"] == "LoraLoaderModelOnly"]
    assert [(one["lora_name"], one["strength_model"]) for one in loaded] == [
        ("tiny.safetensors", 1.0), ("other.safetensors", 0.5), ("style.safetensors", 1.0)
    ]  # fmt: skip
