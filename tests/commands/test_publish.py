"""`publish`: a folder with LoRA, model card and previews, and its upload to a hub on this machine."""

import getpass
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.config.load import validate_config
from zimage_train.report import preview_images

from helpers import PREVIEWED
from hub_server import Hub, serving
from mini_config import mini_values

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # each uses a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """The folder of a finished run; its second prompt has the trigger."""
    folder = tmp_path_factory.mktemp("home of alice")
    prompts = ["a red circle", {"prompt": 'a red zorb: "hello" | [x]', "negative": "blurry", "seed": 7}]
    values = mini_values(
        folder / "runs", shared_cache, train={"steps": 2}, sample=PREVIEWED | {"prompts": prompts, "guidance": 1.0}
    )
    config, problems = validate_config(values, lambda path: str(path))
    assert config is not None, problems
    run_training(config, fresh=False)
    return folder / "runs" / "tiny"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving({}) as running:
        running.tokens, running.namespaces = {"hf_secret"}, {"org", "me"}
        yield running


def publish(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["publish", *map(str, words)])
    return (getattr(done.exception, "exit_code", 1) if done.exception else 0), done.output + str(done.exception or "")


def publish_to(hub_url: str, folder: Path, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_secret"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-m", "zimage_train", "publish", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header_of(card: str) -> dict:
    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)


def test_folder_is_ready_to_upload(run: Path, tmp_path: Path):
    """It has the LoRA as it was exported, its workflow, the card, and the previews of its step."""
    code, said = publish(run, "--license", "apache-2.0", "-o", tmp_path / "out")
    assert code == 0 and "nothing was uploaded" in said, said
    files = files_in(tmp_path / "out")
    assert sorted(files) == [
        "README.md", "images/000002-00.png", "images/000002-01.png", "tiny.safetensors", "tiny.workflow.json"
    ]  # fmt: skip
    for name in ("tiny.safetensors", "tiny.workflow.json"):
        assert files[name] == (run / "lora" / name).read_bytes()
    for name in ("000002-00.png", "000002-01.png"):
        shown, drawn = tmp_path / "out" / "images" / name, run / "samples" / name
        with Image.open(shown) as one, Image.open(drawn) as other:
            assert one.tobytes() == other.tobytes()
        assert preview_images.request_of(shown) == preview_images.request_of(drawn)


def test_card_says_what_the_hub_reads(run: Path, tmp_path: Path):
    """Base model, trigger, license, tags and a gallery, whose first image has the trigger; then how to use it."""
    publish(run, "--license", "cc-by-nc-4.0", "-o", tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    header = header_of(card)
    assert header["base_model"] == "Tongyi-MAI/Z-Image-Turbo" and header["license"] == "cc-by-nc-4.0"
    assert header["instance_prompt"] == "zorb" and header["library_name"] == "diffusers"
    assert {"lora", "text-to-image", "template:diffusion-lora"} <= set(header["tags"])
    first, second = header["widget"]
    assert first == {
        "text": 'a red zorb: "hello" | [x]',
        "output": {"url": "images/000002-01.png"},
        "parameters": {"negative_prompt": "blurry"},
    }
    assert second == {"text": "a red circle", "output": {"url": "images/000002-00.png"}}
    for text in (
        "<Gallery />", "Write `zorb` in the prompt.", 'pipe.load_lora_weights("tiny.safetensors")',
        'ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo"', '    "a red zorb: \\"hello\\" | [x]",',
        "num_inference_steps=8", "guidance_scale=1,", "CFG 2", "`tiny.workflow.json`", "| adapter | LoRA of rank 4 |",
        "| images | 16 |", "| steps | 2 |", "adapter_v1.safetensors, strength 1",
        "| optimizer | adamw, learning rate 0.001",
    ):  # fmt: skip
        assert text in card, text
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_nothing_names_folder_or_user(run: Path, tmp_path: Path):
    """No file that is published holds a path of this machine or the name of its user."""
    publish(run, "--license", "mit", "-o", tmp_path / "out")
    for name, content in files_in(tmp_path / "out").items():
        for private in (str(run.parent), str(mini.TURBO.parent), "alice", str(Path.home())):
            assert private.encode() not in content, (name, private)
        if name.endswith((".md", ".json")):
            assert f"/{getpass.getuser()}".encode() not in content


def test_without_license_it_says_so(run: Path, tmp_path: Path):
    code, said = publish(run, "-o", tmp_path)
    assert code == 0 and "names no license" in said
    assert "license" not in header_of((tmp_path / "README.md").read_text())


def test_card_of_somebody_is_kept(run: Path, tmp_path: Path):
    """A README.md that is there already, such as an edited card, is kept beside the new one; the same card is not."""
    (tmp_path / "README.md").write_text("mine")
    code, said = publish(run, "-o", tmp_path)
    assert code == 0 and "the README.md that was there differed, and is now README.md.old" in said
    assert (tmp_path / "README.md.old").read_text() == "mine"
    code, said = publish(run, "-o", tmp_path)
    assert code == 0 and "README.md that was there" not in said
    assert sorted(path.name for path in tmp_path.glob("README*")) == ["README.md", "README.md.old"]


def test_images_of_an_earlier_call_go(run: Path, tmp_path: Path):
    """Images that are no longer in the gallery are removed, other files are left alone."""
    (tmp_path / "images").mkdir()
    for name in ("000001-00.png", "mine.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    publish(run, "-o", tmp_path)
    left = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert left == ["000002-00.png", "000002-01.png", "mine.png"]


def test_upload_has_what_the_folder_has(run: Path, tmp_path: Path, hub: Hub):
    """With --to, and only then, the hub gets the files, and none that the command did not write."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.txt").write_text("secret")
    done = publish_to(hub.url, tmp_path, run, "-o", tmp_path / "out", "--license", "mit")
    assert done.returncode == 0 and hub.asked == [], done.stderr
    done = publish_to(hub.url, tmp_path, run, "-o", tmp_path / "out", "--license", "mit", "--to", "org/my-zorb")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/my-zorb" in done.stdout and "Traceback" not in done.stderr
    files = files_in(tmp_path / "out")
    del files["secret.txt"], files["README.md.old"]  # the card before --to, which was for a file and not for the hub
    assert hub.committed == {"org/my-zorb": files}
    assert 'pipe.load_lora_weights("org/my-zorb", weight_name="tiny.safetensors")' in files["README.md"].decode()
    again = publish_to(hub.url, tmp_path, run, "-o", tmp_path / "out", "--license", "mit", "--to", "org/my-zorb")
    assert again.returncode == 0 and hub.committed == {"org/my-zorb": files}


@pytest.mark.parametrize(
    ("words", "more", "code", "said"),
    [
        (["--to", "org/x"], {}, 2, "--license: is missing, which --to requires"),
        (["--to", "x", "--license", "mit"], {}, 2, "--to: is 'x'; give ORG/REPO"),
        (["--license", "My License!"], {}, 2, "--license: is 'My License!'"),
        (["--to", "org/x", "--license", "mit"], {"HF_TOKEN": ""}, 2, "--to: there is no token"),
        (["--to", "org/x", "--license", "mit"], {"ZIMAGE_TRAIN_HUB": "modelscope"}, 2, "ZIMAGE_TRAIN_HUB: is"),
        (["--to", "org/x", "--license", "mit"], {"HF_TOKEN": "hf_wrong"}, 4, "org/x: cannot be uploaded to (Client"),
        (["--to", "other/x", "--license", "mit"], {}, 4, "--to other/x: cannot be uploaded to ("),
        (["--to", "org/x", "--license", "mit"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 4, "cannot be uploaded to ("),
        (["--to", "org/x", "--license", "mit"], {"HF_HUB_OFFLINE": "1"}, 4, "cannot be uploaded to ("),
    ],
)  # fmt: skip
def test_errors_are_one_line(run, tmp_path: Path, hub: Hub, words: list[str], more: dict, code: int, said: str):
    """What cannot be is told in a line with what to do, and nothing is committed."""
    done = publish_to(hub.url, tmp_path, run, "-o", tmp_path / "out", *words, **more)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and len(lines) == 1 and said in lines[0] and "; " in lines[0], done.stderr
    assert "hf_" not in done.stderr.replace("hf auth", "")
    assert not any(hub.committed.values())
    assert (tmp_path / "out" / "README.md").exists() == (code == 4), "what is wrong in the command is said first"


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path):
    """A folder that is no run, and a run without a LoRA, are errors."""
    code, said = publish(tmp_path / "x.safetensors")
    assert code == 2 and "is not a run folder: it has no config.yaml; give output/NAME of a run" in said
    assert "LoRA files" not in said
    for inside in (run / "lora", run / "lora" / "tiny.safetensors"):
        code, said = publish(inside)
        assert code == 2 and f"is not a run folder: it has no config.yaml; did you mean {run}?" in said
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    code, said = publish(tmp_path)
    assert code == 4 and "has exported no LoRA yet; train until the first save" in said


def test_unfinished_run_publishes_newest(run: Path, tmp_path: Path):
    """Without the last LoRA, the newest that was saved is taken, with the previews of its step."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    for step in (1, 2):
        (tmp_path / "lora" / f"tiny-{step:06d}.safetensors").write_bytes(
            (run / "lora" / "tiny.safetensors").read_bytes()
        )
    code, said = publish(tmp_path)
    assert code == 0 and "tiny-000002.safetensors of step 2" in said and "no previews of step 2" in said
    assert "widget" not in header_of((tmp_path / "publish" / "README.md").read_text())
