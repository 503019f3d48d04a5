"""`sweep`: a run for each combination of values, each as if trained alone, and all side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from zimage_train.cli.app import app
from zimage_train.commands.sweep_values import make_sweep_runs, split_values
from zimage_train.commands.train import run_training
from zimage_train.errors import ConfigError, Stopped, ZImageTrainError
from zimage_train.report import grid
from zimage_train.report.metrics import read_records

from helpers import PREVIEWED, poison, stop_after
from mini_config import mini_values

SWEPT = {"train": {"steps": 2}, "sample": PREVIEWED}


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def sweep(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["sweep", str(config), *words])


def lora(root: Path, name: str) -> bytes:
    return (root / name / "lora" / f"{name}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished sweep over two ranks with a cache of its own, and what it said."""
    root = tmp_path_factory.mktemp("swept")
    done = sweep(written(root, mini_values(root, root / "cache", **SWEPT)), "--vary", "lora.rank=2,3")
    assert done.exit_code == 0, (done.output, done.exception)
    return root / "tiny-sweep-rank", done.output


@pytest.mark.slow
def test_run_equals_train_alone(swept, make_config):
    """A run of a sweep is the run that `train` alone makes, byte for byte."""
    alone = make_config(name="tiny+rank_3", lora={"rank": 3}, **SWEPT)  # the second, after another run
    run_training(alone, fresh=False)
    assert lora(swept[0], alone.name) == lora(Path(alone.output_dir), alone.name)


@pytest.mark.slow
def test_runs_differ_in_one_setting(swept):
    """The varied setting is the only difference between the runs."""
    root, _ = swept
    two, three = (yaml.safe_load((root / f"tiny+rank_{rank}" / "config.yaml").read_text()) for rank in (2, 3))
    assert (two.pop("name"), three.pop("name")) == ("tiny+rank_2", "tiny+rank_3")
    assert (two["lora"].pop("rank"), three["lora"].pop("rank")) == (2, 3)
    assert two == three and two["output_dir"] == str(root)


def test_cache_is_shared(swept):
    """Images and prompts are encoded by the first run only."""
    caches = [line for line in swept[1].splitlines() if line.startswith("cache ")]
    assert len(caches) == 2
    assert " 0 found" in caches[0] and caches[1].count(" 0 encoded") == 2


def test_it_says_what_each_run_came_to(swept):
    root, output = swept
    assert "run 1 of 2: lora.rank=2" in output and "run 2 of 2: lora.rank=3" in output
    for rank in (2, 3):
        name = f"tiny+rank_{rank}"
        last = read_records(root / name / "metrics.jsonl")[-1]["loss"]
        (line,) = [line for line in output.splitlines() if line.startswith(f"lora.rank={rank} ")]
        assert f" {last:.4f} " in line and line.endswith(f"{name}.safetensors")


def test_grid_of_runs_and_prompts(swept):
    """The grid shows each run in its column and each prompt in its row."""
    root, _ = swept
    with Image.open(root / "grid.png") as image:
        whole = np.asarray(image)
    pitch = grid.CELL_PX + grid.MARGIN_PX
    left, top = whole.shape[1] - 2 * pitch, whole.shape[0] - 2 * pitch
    seen = set()
    for column, rank in enumerate((2, 3)):
        for row in (0, 1):
            with Image.open(root / f"tiny+rank_{rank}" / "samples" / f"000002-{row:02d}.png") as image:
                wanted = np.asarray(grid.fit_to_cell(image))
            place = whole[top + row * pitch :, left + column * pitch :][: grid.CELL_PX, : grid.CELL_PX]
            assert np.array_equal(place, wanted)
            seen.add(wanted.tobytes())
    assert len(seen) == 4, "the images must differ, or the comparison says nothing"


def test_page_links_every_image(swept):
    """The page shows every image of every run from where it is, without copies."""
    root, _ = swept
    page = (root / "compare.html").read_text()
    for path in root.glob("*/samples/0*.png"):
        assert f'src="{path.relative_to(root).as_posix().replace("+", "%2B")}"' in page
    assert not (root / "pictures").exists()


@pytest.mark.slow
def test_repeated_sweep_adds_values(swept, monkeypatch):
    """A repeated sweep trains nothing again, and a new value joins the others."""
    root, _ = swept
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/lora/*.safetensors")}
    done = sweep(root.parent / "config.yaml", "--vary", "lora.rank=2,3,1")
    assert done.exit_code == 0, done.exception
    assert done.output.count("is complete") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (root / "tiny+rank_1" / "lora" / "tiny+rank_1.safetensors").exists()
    assert "lora.rank=1" in (root / "compare.html").read_text()


@pytest.mark.slow
def test_stopped_sweep_continues(swept, tmp_path: Path, shared_cache: Path, monkeypatch):
    """A stopped sweep continues to the same bytes."""
    config = written(tmp_path, mini_values(tmp_path, shared_cache, **SWEPT))
    root = tmp_path / "tiny-sweep-rank"
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        done = sweep(config, "--vary", "lora.rank=2,3")
    assert isinstance(done.exception, Stopped) and done.exception.exit_code == 128 + 15
    assert "after step 1, which is saved" in str(done.exception)
    assert not (root / "tiny+rank_3").exists() and not (root / "compare.html").exists()
    with monkeypatch.context() as patched:
        stop_after(patched, 2)  # in the last step of the first run, whose previews are then left to the next start
        done = sweep(config, "--vary", "lora.rank=2,3")
    assert isinstance(done.exception, Stopped) and "after step 2, which is saved" in str(done.exception)
    assert not (root / "tiny+rank_3").exists()
    done = sweep(config, "--vary", "lora.rank=2,3")
    assert done.exit_code == 0, done.output
    for rank in (2, 3):
        assert lora(root, f"tiny+rank_{rank}") == lora(swept[0], f"tiny+rank_{rank}")


@pytest.mark.slow
def test_failed_run_stops_no_other(tmp_path, shared_cache, monkeypatch):
    """A run that fails does not keep the others from being trained."""
    config = written(tmp_path, mini_values(tmp_path, shared_cache, **SWEPT))
    assert poison(monkeypatch, {1, 2}) == []
    done = sweep(config, "--vary", "lora.rank=2,3")
    assert isinstance(done.exception, ZImageTrainError) and done.exception.exit_code == 5
    assert str(done.exception).startswith("lora.rank=2: step 2: loss or gradient not finite")
    root = tmp_path / "tiny-sweep-rank"
    assert (root / "tiny+rank_3" / "lora" / "tiny+rank_3.safetensors").exists()
    page = (root / "compare.html").read_text()
    assert "tiny%2Brank_3/" in page and "tiny%2Brank_2/" not in page


def test_combinations_are_checked_first(tmp_path: Path, shared_cache: Path, monkeypatch):
    """All combinations are checked before anything is trained."""
    monkeypatch.setattr("zimage_train.commands.sweep.run_training", pytest.fail)
    config = written(tmp_path, mini_values(tmp_path, shared_cache, **SWEPT))
    words = ["--vary", f"model.adapter=null,{tmp_path}/nowhere", "--vary", "lora.targets=[attention],.*to_q"]
    done = sweep(config, *words, "--set", f"data.0.folder={tmp_path}/gone")
    assert isinstance(done.exception, ZImageTrainError) and done.exception.exit_code == 3
    lines = str(done.exception).splitlines()
    assert sum("gone" in line for line in lines) == 1, "what is wrong with all of them is said once"
    assert [line.split(": ")[0] for line in lines if "nowhere: does not exist" in line] == [
        f"model.adapter={tmp_path}/nowhere, lora.targets={targets}" for targets in ("[attention]", ".*to_q")
    ]


@pytest.mark.slow
def test_sampling_settings_can_vary(tmp_path: Path, shared_cache: Path):
    """Settings of previews alone can be varied; previews with different noise are pointed out."""
    config = written(tmp_path, mini_values(tmp_path, shared_cache, train={"steps": 1}, sample=PREVIEWED))
    done = sweep(config, "--vary", "sample.seed=1,2", "--vary", "sample.steps=2")
    assert done.exit_code == 0, done.exception
    assert "'a red circle' is drawn from other noise in some columns" in done.output
    page = (tmp_path / "tiny-sweep-seed+steps" / "compare.html").read_text()
    assert "2 steps, g 0 (CFG 1), seed 3" in page


# Names and values


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path, mini_values(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,2e-4", ["1e-4", "2e-4"]),
        ("[512],[512, 768]", ["[512]", "[512, 768]"]),
        ("{rank: 4, alpha: 2},{rank: 8}", ["{rank: 4, alpha: 2}", "{rank: 8}"]),
        ("'a, b',\"c,d\" , it's,x's", ["'a, b'", '"c,d"', "it's", "x's"]),
        ("['a,b', c],d", ["['a,b', c]", "d"]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_values_are_split_at_commas(text: str, values: list[str]):
    """Values are split at commas outside of brackets and quotes."""
    assert split_values(text) == values


def test_axes_give_all_combinations(base: Path, tmp_path: Path):
    """Several axes give every combination."""
    runs = make_sweep_runs(base, ["seed=9"], ["lora.rank=4,16", "optimizer.lr=1e-4,0.002"])
    assert [run.label for run in runs] == [
        "lora.rank=4, optimizer.lr=1e-4",
        "lora.rank=4, optimizer.lr=0.002",
        "lora.rank=16, optimizer.lr=1e-4",
        "lora.rank=16, optimizer.lr=0.002",
    ]
    assert [run.config.name for run in runs][::3] == ["tiny+rank_4+lr_0.0001", "tiny+rank_16+lr_0.002"]
    assert {run.config.output_dir for run in runs} == {str(tmp_path / "tiny-sweep-rank+lr")}
    assert [(run.config.lora.rank, run.config.optimizer.lr) for run in runs][::3] == [(4, 1e-4), (16, 2e-3)]
    assert {run.config.seed for run in runs} == {9}


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ("model.adapter=v1,null,a/b/x-2.safetensors", ["adapter_v1", "adapter_null", "adapter_x_2.safetensors"]),
        ("model.adapter=/a/x.safetensors,/b/x.safetensors", ["adapter_a_x.safetensors", "adapter_b_x.safetensors"]),
        ("data.0.resolution=[64],[64, 96]", ["resolution_64", "resolution_64_96"]),
        ("sample.first=true,false", ["first_true", "first_false"]),
        ("data.0.trigger=zörb,a (5)", ["trigger_zörb", "trigger_a_5"]),
    ],
)
def test_names_hold_what_file_systems_take(base: Path, vary: str, names: list[str]):
    assert [run.config.name for run in make_sweep_runs(base, [], [vary])] == [f"tiny+{name}" for name in names]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.rank"], "--vary lora.rank: is not key=value,value; write for example --vary model.adapter=v1,v2"),
        (["=1,2"], "is not key=value"),
        (["lora.rank="], "--vary lora.rank=: has an empty value; write null for none"),
        (["lora.rank=4,,8"], "has an empty value"),
        (["lora.rank=4,8,4.0"], "4.0 is given twice; leave out one of them"),
        (["data.0.trigger=a-b,a_b"], "a-b and a_b would both be called a_b"),
        (["lora.rank=[4"], "[4: not valid YAML"),
        (["lora.rank=4,8", "lora.rank=16"], "--vary lora.rank=16: sets the same as --vary lora.rank=4,8"),
        (["lora.rank=4,8", "lora={rank: 2}"], "sets the same as --vary lora.rank=4,8"),
        (["name=a,b"], "--vary name=a,b: cannot be varied"),
        (["cache.folder=a,b"], "cannot be varied"),
        (["cache=null"], "cannot be varied"),
        (["lora.rnk=4,8"], "--vary lora.rnk=4: lora.rnk: unknown key; did you mean 'rank'?"),
        (["lora.rank=0,8"], "--vary lora.rank=0: lora.rank: is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_varied_is_refused(base: Path, words: list[str], message: str):
    with pytest.raises(ZImageTrainError) as error:
        make_sweep_runs(base, [], words)
    assert message in str(error.value) and error.value.exit_code == 2


def test_setting_both_set_and_varied(base: Path):
    """A setting cannot be both set and varied."""
    with pytest.raises(ConfigError, match=r"--vary lora.rank=4,8: sets the same as --set lora.rank=2"):
        make_sweep_runs(base, ["lora.rank=2"], ["lora.rank=4,8"])


def test_common_errors_are_said_once(base: Path):
    """An error of every combination is reported once."""
    with pytest.raises(ZImageTrainError) as error:
        make_sweep_runs(base, ["train.step=3"], ["lora.rank=4,8", "optimizer.lr=0.0,1e-3"])
    assert str(error.value).splitlines() == [
        "--set train.step=3: train.step: unknown key; did you mean 'steps'?",
        "--vary optimizer.lr=0.0: optimizer.lr: is 0.0; expected more than 0.0",
    ]
