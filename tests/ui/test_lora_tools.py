"""The commands on LoRA files as the page runs them."""

import asyncio
from pathlib import Path

import pytest
from PIL import Image

from zimage_train import mini
from zimage_train.errors import ZImageTrainError
from zimage_train.lora.lora_file import read_deltas
from zimage_train.ui.lora_files import LoraChoice, find_lora, list_loras
from zimage_train.ui.lora_tools import Command, LoraTools, Outcome, ToolRun
from zimage_train.ui.workspace import Workspace

from try_browser import copy_of_runs, trained_runs

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def workspace(shared_cache: Path, tmp_path: Path) -> Workspace:
    return Workspace(copy_of_runs(trained_runs(shared_cache), tmp_path / "runs"), (mini.TURBO.parent,))


@pytest.fixture
def lora(workspace: Workspace) -> str:
    return str(workspace.runs / "tiny" / "lora" / "tiny.safetensors")


def told(*commands: Command) -> list[Outcome]:
    """What commands say that run at once."""

    async def run_all() -> list[Outcome]:
        return list(await asyncio.gather(*(ToolRun(command).run() for command in commands)))

    return asyncio.run(run_all())


@pytest.mark.slow
def test_files_are_made_in_one_folder(workspace, lora):
    """Convert, resize and merge write LoRAs of the same change, the half, and the sum, which the list then has."""
    tools = LoraTools(workspace)
    commands = [
        tools.convert(lora, "kohya", "for kohya"),
        tools.convert(lora, "peft", "for peft"),
        tools.resize(lora, 2, 0.99, "small"),
        tools.merge([(lora, 1.0), (lora, -0.5)], "half"),
    ]
    outcomes = told(*commands)
    assert [outcome.errors for outcome in outcomes] == [[], [], [], []]
    assert any("keeps" in line for line in outcomes[2].lines)
    files = {path.name: path for command in commands for path in command.files()}
    assert set(files) == {
        *("for kohya.safetensors", "adapter_model.safetensors", "adapter_config.json", "small.safetensors"),
        "half.safetensors",
    }
    original = read_deltas(Path(lora))
    half = read_deltas(files["half.safetensors"])
    module = next(iter(original))
    assert half[module].norm() == pytest.approx(original[module].norm() / 2, rel=1e-5)
    assert {choice.label for choice in list_loras(workspace)} >= {"half.safetensors", "tiny: tiny.safetensors"}
    assert tools.free_name("half") == "half-2"


@pytest.mark.slow
def test_files_are_looked_at(workspace, lora):
    """Inspect and compare say what they find and draw it; verify says who loads the file."""
    tools = LoraTools(workspace)
    earlier = str(workspace.runs / "tiny" / "lora" / "tiny-000002.safetensors")
    inspect, diff, verify = tools.inspect(lora), tools.diff(lora, earlier), tools.verify(lora)
    looked, compared, verified = told(inspect, diff, verify)
    assert looked.errors == compared.errors == verified.errors == []
    for command in (inspect, diff):
        assert command.plot is not None
        with Image.open(command.plot) as image:
            assert image.width > 100
    assert any(line.startswith("rank     16") for line in looked.lines)
    assert any("cosine" in line for line in compared.lines)
    assert any("the same change" in line for line in verified.lines)


@pytest.mark.slow
def test_refused_files_show_their_error(workspace, lora):
    """A file that is no LoRA, a name that is taken and a rank that is none are refused; nothing is written."""
    tools = LoraTools(workspace)
    checkpoint = str(next((workspace.runs / "tiny" / "checkpoints").glob("*.safetensors")))
    (tools.folder).mkdir()
    (tools.folder / "taken.safetensors").write_bytes(b"x")
    commands = [
        tools.inspect(checkpoint),
        tools.convert(lora, "kohya", "taken"),
        tools.resize(lora, 5000, 0.99, "new"),
        tools.merge([(lora, 1000.0)], "new"),
    ]
    errors = [outcome.errors for outcome in told(*commands)]
    assert [len(lines) for lines in errors] == [1, 1, 1, 1]
    for lines, part in zip(errors, (Path(checkpoint).name, "exists", "--rank: is '5000'", "1000"), strict=True):
        assert part in lines[0]
    assert [path.name for path in tools.folder.glob("*.safetensors")] == ["taken.safetensors"]


@pytest.mark.slow
def test_command_is_stopped(workspace, lora):
    async def stopped() -> Outcome:
        tool = ToolRun(LoraTools(workspace).verify(lora))
        task = asyncio.create_task(tool.run())
        await asyncio.sleep(0.3)
        tool.stop()
        return await task

    assert asyncio.run(stopped()).errors == ["ended with exit code -9"]


@pytest.mark.slow
def test_loras_are_found(workspace, lora):
    """The list has the run's files first, the finished one before those of steps, then files of open folders."""
    choices = list_loras(workspace)
    assert choices[:2] == [
        LoraChoice(Path(lora), "tiny: tiny.safetensors"),
        LoraChoice(Path(lora).with_name("tiny-000002.safetensors"), "tiny: tiny-000002.safetensors"),
    ]
    labels = {choice.label for choice in choices}
    assert f"{mini.TURBO.parent.name}/adapter_v1.safetensors" in labels
    assert not any("transformer" in label or "checkpoints" in label for label in labels)
    assert find_lora(workspace, "tiny") == Path(lora)
    assert find_lora(workspace, "tiny/lora/tiny.safetensors") == Path(lora)


def test_names_stay_in_the_folder(tmp_path):
    tools = LoraTools(Workspace(tmp_path, ()))
    (tmp_path / "a.safetensors").write_bytes(b"")
    for name in ("../x", ".hidden", "a/b", "", "x" * 200, "/etc/x"):
        with pytest.raises(ZImageTrainError, match="is no name of a file"):
            tools.convert(str(tmp_path / "a.safetensors"), "peft", name)
    for file, found in (("", "is missing"), ("/etc/passwd", "is outside")):
        with pytest.raises(ZImageTrainError, match=found):
            tools.inspect(file)
    with pytest.raises(ZImageTrainError, match="has no files"):
        tools.merge([], "x")


def test_uploads_get_free_names(tmp_path):
    tools = LoraTools(Workspace(tmp_path, ()))
    assert tools.place_of_upload("my lora.safetensors") == tools.folder / "my lora.safetensors"
    tools.folder.mkdir()
    (tools.folder / "my lora.safetensors").write_bytes(b"")
    assert tools.place_of_upload("my lora.safetensors").name == "my lora-2.safetensors"
    assert tools.place_of_upload("..\\..\\evil.SAFETENSORS").name == "evil.safetensors"
    assert tools.place_of_upload("...safetensors").parent == tools.folder
    with pytest.raises(ZImageTrainError, match=r"is no \.safetensors"):
        tools.place_of_upload("model.ckpt")
