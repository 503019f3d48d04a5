"""`sample.compare_on`: each preview on a second model too, and how much of its sharpness a LoRA keeps there."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.train import run_training
from zimage_train.diffusion.frozen import load_frozen, original_weights
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import WeightsError
from zimage_train.lora import training_adapter
from zimage_train.planning.preflight import check_run
from zimage_train.report import preview_images, preview_shift
from zimage_train.report.grid import CELL_PX
from zimage_train.report.metrics import read_records

from helpers import PREVIEWED, folder, losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with other weights in every tensor: a stand-in for a second member of the family."""
    path = tmp_path_factory.mktemp("other") / "turbo"
    shutil.copytree(mini.TURBO, path)
    draw = torch.Generator().manual_seed(3)
    for file in (path / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        noise = {name: torch.randn(one.shape, generator=draw).to(one.dtype) for name, one in tensors.items()}
        changed = {name: one + 0.05 * one.float().std().nan_to_num() * noise[name] for name, one in tensors.items()}
        save_file({name: changed[name].to(one.dtype).contiguous() for name, one in tensors.items()}, file)
    return path


def weights(frozen) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in frozen.model.state_dict().items()}


@pytest.mark.parametrize("spare", [0.0, 1e9])
def test_second_model_weights_and_back(other: Path, spare: float):
    """Within the block every weight is the second model's, and after it the run's own."""
    shape = load_frozen(mini.TURBO / "transformer", None, "bf16", CPU).shape
    adapter = training_adapter.load_adapter(mini.ADAPTER_V1, 1.0, shape)
    frozen = load_frozen(mini.TURBO / "transformer", adapter, "bf16", CPU, spare_bytes=spare)
    before = weights(frozen)
    wanted = weights(load_frozen(other / "transformer", None, "bf16", CPU))
    own = weights(load_frozen(mini.TURBO / "transformer", None, "bf16", CPU))
    for _ in range(2):
        with original_weights(frozen):
            assert all(torch.equal(one, own[name]) for name, one in weights(frozen).items())
        with original_weights(frozen, other / "transformer"):
            inside = weights(frozen)
    assert all(torch.equal(inside[name], wanted[name]) for name in wanted)
    assert sum(not torch.equal(inside[name], before[name]) for name in before) > 0.9 * len(before)
    assert all(torch.equal(one, before[name]) for name, one in weights(frozen).items())


@pytest.mark.slow
def test_second_model_draws_each_preview(make_config, other: Path, tmp_path):
    """Each preview is drawn on the second model, too, and training is the same."""
    base = {"path": str(mini.TURBO), "variant": "base", "extras": str(mini.TURBO), "adapter": None}
    sample = PREVIEWED | {"steps": 3, "compare_on": str(other)}
    config = make_config(model=base, sample=sample)
    run_training(config, fresh=False)
    plain = make_config(name="plain", model=base, sample={"every": None})
    run_training(plain, fresh=False)
    assert losses(config) == losses(plain)

    samples = folder(config) / "samples"
    names = sorted(path.name for path in (samples / "also").iterdir())
    assert names == [f"{step:06d}-{index:02d}.png" for step in (0, 2, 4) for index in (0, 1)]
    own, beside = (preview_images.request_of(root / "000004-00.png") for root in (samples, samples / "also"))
    assert (own.steps, own.guidance, own.shift) == (3, 3.0, 6.0)
    assert (beside.steps, beside.guidance, beside.shift) == (8, 0.0, 3.0)
    assert (own.prompt, own.seed) == (beside.prompt, beside.seed)

    lora = f"{folder(config)}/lora/tiny.safetensors"
    drawn = str(samples / "also" / "000004-01.png")
    command = ["sample", str(other), "--lora", lora, "--dtype", "fp32", "--from", drawn, "-o", str(tmp_path / "again")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert f"was drawn by {other.name} in fp32 with the LoRA of tiny at step 4" in done.output.replace("\n", "")
    with Image.open(drawn) as one, Image.open(tmp_path / "again" / "sample-43.png") as again:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(again).astype(int)).max() <= 1

    with Image.open(samples / "grid.png") as grid:
        assert grid.width > 4 * CELL_PX  # two prompts, each on two models
    assert f"a red circle (on {other})" in (folder(config) / "report.html").read_text()
    events = [one for one in read_records(folder(config) / "events.jsonl") if one["event"] == "preview"]
    assert ["sharpness_kept_also" in one for one in events] == [False, True, True]
    assert "the LoRA keeps" in (folder(config) / "log.txt").read_text()


@pytest.mark.slow
def test_second_model_changed(make_config, other: Path):
    """Another second model draws all previews of the last step again."""
    sample = PREVIEWED | {"first": False, "every": 9}
    run_training(make_config(sample=sample | {"compare_on": str(other)}), fresh=False)
    image = folder(make_config()) / "samples" / "also" / "000004-00.png"
    before = image.read_bytes()
    run_training(make_config(sample=sample | {"compare_on": str(mini.TURBO)}), fresh=False)
    assert image.read_bytes() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "sample.compare_on: nowhere: is neither a path"), (str(mini.IMAGES), "holds no transformer")],
)
def test_second_model_that_is_none(make_config, name: str, message: str):
    """A second model that does not exist is refused."""
    with pytest.raises(WeightsError, match=message):
        check_run(make_config(sample=PREVIEWED | {"compare_on": name}))


def test_second_model_of_another_size(make_config, tmp_path: Path):
    """A second model of another size is refused."""
    shutil.copytree(mini.TURBO / "transformer", tmp_path / "transformer")
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        tensors = {name: one for name, one in load_file(file).items() if not name.startswith("layers.5.")}
        save_file(tensors, file)
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    changed = "".join(line for line in index.read_text().splitlines(True) if '"layers.5.' not in line)
    index.write_text(changed)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"n_layers": 6', '"n_layers": 5'))
    with pytest.raises(WeightsError, match=r"sample.compare_on: .*another shape than the model of this run"):
        check_run(make_config(sample=PREVIEWED | {"compare_on": str(tmp_path)}))


def test_second_model_not_downloaded(make_config):
    """A second model that is not downloaded yet is a note."""
    from zimage_train.models.locate import cached_only

    checked = check_run(make_config(sample=PREVIEWED | {"compare_on": "turbo"}), cached_only)
    assert checked.model_files is None
    (note,) = checked.notes
    assert note.code == "not-downloaded"
    assert note.text.startswith("sample.compare_on: Tongyi-MAI/Z-Image-Turbo: ")


def flat(path: Path, contrast: int) -> Path:
    """A checkerboard of two greys."""
    board = np.indices((64, 64)).sum(0) % 2 * contrast + 100
    Image.fromarray(board.astype(np.uint8)).save(path)
    return path


def test_sharpness_is_laplacian_variance(tmp_path: Path):
    """Sharpness is the variance of the Laplacian."""
    # Each value differs from its four neighbours by the contrast, up or down: the Laplacian is +-4 times that.
    assert preview_shift.sharpness(flat(tmp_path / "x.png", 10)) == pytest.approx((4 * 10) ** 2)
    assert preview_shift.sharpness(flat(tmp_path / "x.png", 0)) == 0.0


def test_sharpness_kept_prefers_no_trigger(tmp_path: Path):
    """The sharpness kept is that of prompts without the trigger, if there are any."""

    def draw(step: int, prompts: list[str], contrasts: list[int]) -> None:
        for index, (prompt, contrast) in enumerate(zip(prompts, contrasts, strict=True)):
            recipe = SamplingRequest(
                prompt=prompt, negative="", seed=1, width=64, height=64, steps=8, guidance=0.0, shift=3.0
            )
            board = np.indices((64, 64)).sum(0) % 2 * contrast + 100
            image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
            preview_images.save_preview(preview_images.preview_path(tmp_path, step, index), image, recipe, "a test")

    draw(0, ["a zorb", "a dog"], [20, 20])
    draw(5, ["a zorb", "a dog"], [2, 10])
    table = preview_images.preview_table(tmp_path)
    assert preview_shift.sharpness_kept(table, {"zorb"}, 5) == pytest.approx(0.25)
    assert preview_shift.sharpness_kept(table, set(), 5) == pytest.approx((0.25 + 0.01) / 2)
    assert preview_shift.sharpness_kept(table, {"a "}, 5) == pytest.approx((0.25 + 0.01) / 2)
    assert preview_shift.sharpness_kept(table, {"zorb"}, 6) is None
