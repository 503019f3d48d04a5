"""Previews and samples equal what diffusers' own pipeline draws with the exported file, in another process."""

import json
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import pixels, stock
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands.sample import command_for
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.diffusion.prompts import read_prompt_file
from zimage_train.diffusion.request import SamplingRequest, preview_requests, prompts_to_encode
from zimage_train.errors import DataError, ZImageTrainError
from zimage_train.report import preview_images
from zimage_train.report.grid import CELL_PX


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Config:
    from mini_config import mini_values

    sample = {"every": 30, "width": 96, "height": 64, "prompts": ["a red zorb on a blue background"]}
    values = mini_values(
        tmp_path_factory.mktemp("previews"), shared_cache, train={"steps": 30}, optimizer={"lr": 4e-3}, sample=sample
    )
    config = Config.model_validate(values)
    run_training(config, fresh=False)
    return config


@pytest.mark.slow
def test_preview_equals_the_stock_pipeline(finished: Config, tmp_path: Path):
    """The last preview is the image of the stock pipeline."""
    root = Path(finished.output_dir) / finished.name
    recipe = preview_requests(finished)[0]
    numbers = (recipe.seed, recipe.width, recipe.height, recipe.steps, recipe.guidance)
    expected = stock(root / "lora" / "tiny.safetensors", tmp_path / "stock.png", recipe.prompt, "", *numbers)
    preview = pixels(root / "samples" / "000030-00.png")
    assert np.abs(preview - expected).max() <= 1
    first = pixels(root / "samples" / "000000-00.png")
    assert np.abs(first - expected).max() > 20, "the LoRA must be visible, or the comparison says nothing"


@pytest.mark.slow
def test_sample_equals_the_stock_pipeline(finished: Config, tmp_path: Path):
    """`sample` equals the stock pipeline, with guidance and a LoRA weight."""
    lora = Path(finished.output_dir) / finished.name / "lora" / "tiny.safetensors"
    arguments = ["--prompt", "a red zorb on a blue background", "--negative", "a green circle", "--seed", "5"]
    sizes = ["--width", "64", "--height", "80", "--steps", "6", "--guidance", "2.5", "--dtype", "fp32"]
    command = ["sample", str(mini.TURBO), "--lora", str(lora), *arguments, *sizes, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and "matched 42/42" in done.output
    numbers = (5, 64, 80, 6, 2.5)
    expected = stock(lora, tmp_path / "stock.png", "a red zorb on a blue background", "a green circle", *numbers)
    assert np.abs(pixels(tmp_path / "out" / "sample-5.png") - expected).max() <= 1


@pytest.mark.slow
def test_printed_command_in_a_process(finished: Config, tmp_path: Path, forking_python: str):
    """The printed command draws the same preview, bit for bit, in another process."""
    root = Path(finished.output_dir) / finished.name
    words = command_for(finished, root / "lora" / "tiny.safetensors").split(" sample ")[1]
    command = [forking_python, "-m", "zimage_train", "sample", *shlex.split(words), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    drawn = [pixels(path) for path in tmp_path.glob("*.png")]
    assert len(drawn) == 1 and np.array_equal(drawn[0], pixels(root / "samples" / "000030-00.png"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("alpha", [3.0, 4.0])
def test_preview_is_drawn_from_the_export(tmp_path: Path, shared_cache: Path, dtype: str, alpha: float):
    """A preview shows the exported, rounded LoRA at every data type, strength and guidance, not the master weights."""
    from mini_config import mini_values

    prompts = ["a red zorb on a blue background", {"prompt": "a circle", "negative": "a zorb"}]
    sample = {"every": 8, "width": 64, "height": 64, "prompts": prompts, "steps": 4, "guidance": 1.5}
    lora = {"rank": 4, "alpha": alpha, "targets": ["attention"]}
    values = mini_values(
        tmp_path,
        shared_cache,
        train={"steps": 8},
        optimizer={"lr": 1e-2},
        sample=sample,
        lora=lora,
        save={"dtype": "bf16"},
    )
    values["model"]["dtype"] = dtype
    config = Config.model_validate(values)
    run_training(config, fresh=False)
    root = Path(config.output_dir) / config.name
    for index in range(2):
        preview = root / "samples" / f"000008-{index:02d}.png"
        command = ["sample", str(mini.TURBO), "--from", str(preview), "--lora", str(root / "lora" / "tiny.safetensors")]
        done = CliRunner().invoke(app, [*command, "--dtype", dtype, "--output", str(tmp_path / f"drawn{index}")])
        assert done.exit_code == 0, done.output
        drawn = next((tmp_path / f"drawn{index}").glob("*.png"))
        assert np.array_equal(pixels(drawn), pixels(preview))


PROMPTS = """# what to draw
a red zorb on a blue background --d 7
a green circle --n a zorb --l 2.5 --s 4 --w 96

"""


def test_prompts_from_a_file(tmp_path: Path):
    """Prompts come from a file, and settings in a line of it win."""
    (tmp_path / "p.txt").write_text(PROMPTS)
    size = ["--width", "64", "--height", "64", "--dtype", "fp32", "--output", str(tmp_path / "a")]
    texts = ["--prompts", str(tmp_path / "p.txt"), "--prompt", "first", "--seed", "11", "--count", "2"]
    command = ["sample", str(mini.TURBO), *texts, *size]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found = [preview_images.request_of(path) for path in (tmp_path / "a").iterdir()]
    rows = sorted((r.seed, r.prompt, r.negative, r.width, r.steps, r.guidance) for r in found)
    zorb = "a red zorb on a blue background"
    assert rows == [
        (7, zorb, "", 64, 8, 0.0),
        (8, zorb, "", 64, 8, 0.0),
        (11, "first", "", 64, 8, 0.0),
        (12, "first", "", 64, 8, 0.0),
        (15, "a green circle", "a zorb", 96, 4, 1.5),
        (16, "a green circle", "a zorb", 96, 4, 1.5),
    ]
    (tmp_path / "p.yaml").write_text('- "a zorb"\n- {prompt: a circle, seed: 3, width: 96}\n')
    read = read_prompt_file(tmp_path / "p.yaml")
    assert [(spec.prompt, spec.overrides) for spec in read] == [("a zorb", {}), ("a circle", {"seed": 3, "width": 96})]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "a --q 1\nb --w x", "p.txt:1: has the unknown option --q; there are --n, --w"),
        ("p.txt", "a --q 1\nb --w x", "p.txt:2: --w is 'x'; give a number"),
        ("p.txt", "\na --w 100", "p.txt:2: width: is 100; 100 is no multiple of 16"),
        ("p.txt", "a --s 0", "p.txt:1: steps: is 0"),
        ("p.txt", "a --w 100 --s 0", "p.txt:1: width: is 100; 100 is no multiple of 16; 96 or 112 would do"),
        ("p.txt", "a --w 100 --s 0", "p.txt:1: steps: is 0"),
        ("p.txt", "a --l 0.5", "p.txt:1: --l is '0.5'"),
        ("p.txt", "a --l -1", "p.txt:1: --l is '-1'"),
        ("p.txt", "a\nb -w 512", "p.txt:2: has -w 512, which is no option; write --w 512, or words without hyphens"),
        ("p.txt", "b --w=512 --h 64", "p.txt:1: has --w=512, which is no option; write --w 512"),
        ("p.txt", "b \u2014w 512", "p.txt:1: has \u2014w 512, which is no option; write --w 512"),
        ("p.txt", "b --h 64 -w 512", "p.txt:1: has -w 512, which is no option; write --w 512"),
        ("p.txt", "b -n blurry", "p.txt:1: has -n, which is no option; write --n, or"),
        ("p.txt", "b --n blurry -s 4", "p.txt:1: has -s 4, which is no option; write --s 4"),
        ("p.txt", "b --w 64 --w 96", "p.txt:1: sets width twice; write a single --w"),
        ("p.txt", "a\u2028b --q 1\nc --q 1", "p.txt:2: has the unknown option --q"),
        ("p.txt", "a fox\nthe [Trigger]", "p.txt:2: has [Trigger], and no LoRA names a trigger; write the word itself"),
        ("p.txt", "# nothing\n", "p.txt: contains no prompt"),
        ("p.txt", "a fox --w", "p.txt:1: --w is ''; give a number"),
        ("p.txt", "a hen --W 512", "p.txt:1: has the unknown option --W; there are"),
        ("p.txt", "--n x", "p.txt:1: has options but no prompt"),
        ("p.yaml", "prompt: a", "p.yaml: is not a list"),
        ("p.yaml", "- {prompt: a, sede: 3}", "p.yaml:1: 0.sede: unknown key; did you mean 'seed'?"),
        ("p.yaml", "- a\n- {prompt: b, width: 100}", "p.yaml:2: 1.width: 100 is no multiple of 16; 96 or 112 would do"),
        ("p.yaml", "- a\n- b --w 512", "p.yaml:2: 1: has --w 512, which would be words of the prompt"),
        ("p.yaml", "- {prompt: a, prompt: b}", "p.yaml:1: 0.prompt: given twice"),
        ("p.yaml", "- [a", "p.yaml"),
    ],
)
def test_prompt_file_errors(tmp_path: Path, name: str, text: str, said: str):
    """Files that are no prompt files are refused with the reason."""
    (tmp_path / name).write_text(text)
    done = CliRunner().invoke(app, ["sample", str(mini.TURBO), "--prompts", str(tmp_path / name)])
    assert isinstance(done.exception, ZImageTrainError) and done.exception.exit_code == 2
    assert said in str(done.exception)


@pytest.mark.slow
def test_images_drawn_as_a_batch(tmp_path: Path):
    """Images drawn as a batch equal those drawn singly, but for rounding."""
    size = ["--width", "64", "--height", "64", "--dtype", "fp32", "--guidance", "1.5", "--steps", "4", "--count", "2"]
    texts = ["--prompt", "a red zorb on a blue background", "--prompt", "a circle", "--negative", "a long negative"]
    for batch in ("1", "3"):
        command = ["sample", str(mini.TURBO), *texts, *size, "--batch", batch, "--output", str(tmp_path / batch)]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    for path in sorted((tmp_path / "1").iterdir()):
        assert np.abs(pixels(path) - pixels(tmp_path / "3" / path.name)).max() <= 1
    assert len(list((tmp_path / "3").iterdir())) == 4


def test_budget_by_streaming(tmp_path: Path):
    """A budget is kept by streaming blocks, or refused if that is not enough."""
    size = ["--prompt", "a zorb", "--width", "64", "--height", "64", "--dtype", "fp32"]
    command = ["sample", str(mini.TURBO), *size, "--output", str(tmp_path / "a")]
    free = CliRunner().invoke(app, command)
    least = CliRunner().invoke(app, [*command, "--budget-gb", "0.01"])
    assert least.exception is not None and "--budget-gb: is 0.01, and these images take" in str(least.exception)
    needed = float(str(least.exception).split("take ")[1].split(" MB")[0]) / 1000
    tight = CliRunner().invoke(app, [*command, "--budget-gb", str(needed + 0.0002)])
    assert free.exit_code == tight.exit_code == 0 and "blocks are streamed, to fit" in tight.output
    first, second = sorted((tmp_path / "a").iterdir())
    assert np.array_equal(pixels(first), pixels(second))


def sample(output: Path, *loras: str) -> np.ndarray:
    options = [option for lora in loras for option in ("--lora", lora)]
    size = ["--width", "64", "--height", "64", "--dtype", "fp32", "--output", str(output)]
    done = CliRunner().invoke(
        app, ["sample", str(mini.TURBO), *options, "--prompt", "a red zorb on a blue background", *size]
    )
    assert done.exit_code == 0, done.output
    return pixels(output / "sample-42.png")


@pytest.mark.slow
def test_loras_are_stacked_by_weight(finished: Config, tmp_path: Path):
    """Several LoRAs are stacked by weight, and their layouts may differ."""
    from safetensors.torch import load_file, save_file

    lora = Path(finished.output_dir) / finished.name / "lora" / "tiny.safetensors"
    tensors = load_file(lora)
    diffsynth = {
        key.removeprefix("diffusion_model.").replace(".weight", ".default.weight"): tensor
        for key, tensor in tensors.items()
        if not key.endswith(".alpha")
    }
    save_file(diffsynth, tmp_path / "diffsynth.safetensors")
    once = sample(tmp_path / "a", str(lora))
    assert np.abs(sample(tmp_path / "b", str(tmp_path / "diffsynth.safetensors")) - once).max() <= 1
    halves = sample(tmp_path / "c", f"{lora}=0.5", f"{tmp_path / 'diffsynth.safetensors'}=0.5")
    assert np.abs(halves - once).max() <= 1
    without = sample(tmp_path / "e")
    assert np.abs(without - once).max() > 20, "the LoRA must be visible, or the comparisons say nothing"
    assert np.abs(sample(tmp_path / "d", f"{lora}=0") - without).max() == 0
    assert np.abs(sample(tmp_path / "f", f"{lora}=2") - once).max() > 5


def test_lora_that_does_not_match(tmp_path: Path):
    """A LoRA that does not match in full stops sampling."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file(
        {f"layers.99.attention.to_q.lora_{p}.weight": torch.zeros(s) for p, s in (("A", (2, 96)), ("B", (96, 2)))}, path
    )
    done = CliRunner().invoke(app, ["sample", str(mini.TURBO), "--lora", str(path), "--prompt", "x"])
    assert done.exit_code != 0
    assert "matched 0/1" in str(done.exception)


def test_seed_of_each_prompt(make_config):
    """Prompt i has the seed plus i, unless it has a seed of its own."""
    prompts = ["a", {"prompt": "b", "seed": 5, "width": 32, "negative": "n"}, "c"]
    recipes = preview_requests(make_config(sample={"prompts": prompts, "seed": 100, "width": 64, "height": 48}))
    assert [recipe.seed for recipe in recipes] == [100, 5, 102]
    assert [(recipe.width, recipe.height) for recipe in recipes] == [(64, 48), (32, 48), (64, 48)]
    assert [(recipe.steps, recipe.guidance, recipe.shift) for recipe in recipes] == [(8, 0.0, 3.0)] * 3
    assert prompts_to_encode(recipes) == ["a", "b", "c"]


@pytest.mark.parametrize(("variant", "expected"), [("deturbo", (25, 2.0, 3.0)), ("base", (30, 3.0, 6.0))])
def test_sampling_of_other_variants(make_config, variant: str, expected: tuple):
    """Other variants have their own sampling settings, and encode the negative prompt."""
    config = make_config(model={"variant": variant, "adapter": None}, sample={"prompts": ["a"], "negative": "bad"})
    (recipe,) = preview_requests(config)
    assert (recipe.steps, recipe.guidance, recipe.shift) == expected
    assert prompts_to_encode([recipe]) == ["a", "bad"]


@pytest.mark.slow
def test_grid_of_steps_and_prompts(finished: Config):
    """The grid has a row for each step and a column for each prompt."""
    folder = Path(finished.output_dir) / finished.name / "samples"
    shown = preview_images.preview_table(folder)
    assert list(shown.rows) == [0, 30]
    assert shown.labels == [recipe.prompt for recipe in preview_requests(finished)]
    assert all(all(row) for row in shown.rows.values())
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > CELL_PX and grid.height > 2 * CELL_PX


@pytest.mark.slow
def test_final_command_of_a_run(make_config, tmp_path: Path, capsys):
    """The command printed at the end of a run draws its last preview again."""
    prompt = """a "red" zorb's $HOME; on a blue background"""
    sample = {"every": 9, "width": 64, "height": 48, "steps": 3, "guidance": 1.5, "negative": "a b", "seed": 9}
    config = make_config(
        model={"path": str(mini.TURBO), "variant": "base", "extras": str(mini.TURBO), "adapter": None},
        output_dir=str(tmp_path / "a place"),
        train={"steps": 2},
        optimizer={"lr": 0.05},
        sample=sample | {"prompts": [prompt]},
    )
    run_training(config, fresh=False)
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line)
    done = CliRunner().invoke(app, [*words[words.index("sample") :], "-o", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    root = Path(config.output_dir) / config.name / "samples"
    again = pixels(tmp_path / "again" / "sample-9.png")
    assert np.abs(again - pixels(root / "000002-00.png")).max() <= 1
    assert np.abs(again - pixels(root / "000000-00.png")).max() > 10


def test_preview_from_its_own_image(finished: Config, tmp_path: Path):
    """A preview is drawn again from its own image file."""
    root = Path(finished.output_dir) / finished.name
    drawn = root / "samples" / "000030-00.png"
    lora = f"{root}/lora/{finished.name}.safetensors"
    command = ["sample", str(mini.TURBO), "--lora", lora, "--dtype", "fp32", "--from", str(drawn), "-o", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    again = tmp_path / "sample-42.png"
    assert np.abs(pixels(again) - pixels(drawn)).max() <= 1
    assert preview_images.request_of(again) == preview_images.request_of(drawn) == preview_requests(finished)[0]
    done = CliRunner().invoke(app, [*command, "--seed", "7", "--steps", "3"])
    assert done.exit_code == 0, done.output
    assert preview_images.request_of(tmp_path / "sample-7.png") == replace(
        preview_requests(finished)[0], seed=7, steps=3
    )
    assert np.abs(pixels(tmp_path / "sample-7.png") - pixels(drawn)).max() > 10


def recipe_text(**changes: Any) -> PngInfo:
    (one,) = [SamplingRequest(prompt="x", negative="", seed=1, width=64, height=64, steps=8, guidance=0.0, shift=3.0)]
    info = PngInfo()
    info.add_itxt("zimage_train.recipe", json.dumps(asdict(one) | changes))
    return info


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": "7"},
        {"seed": -1},
        {"width": 65},
        {"width": 10**6},
        {"steps": 0},
        {"guidance": float("nan")},
        {"prompt": ["x"]},
        {"more": 1},
    ],
)
def test_image_with_invalid_settings(tmp_path: Path, changes: dict[str, Any]):
    """An image with invalid sampling settings counts as having none."""
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_text())
    assert preview_images.request_of(path).seed == 1
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_text(**changes))
    with pytest.raises(DataError, match="has no sampling settings"):
        preview_images.request_of(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere.png"], "nowhere.png: does not exist"),
        (["--from", str(mini.IMAGES / "zorb_01.png")], "zorb_01.png: has no sampling settings; give a PNG of"),
        (["--prompt", "a cat --w 512"], "--prompt: has --w 512, which would be words of the prompt; give options"),
        (["--from", "x.png", "--prompt", "y"], "--prompt: cannot be combined with --from"),
        ([], "--prompt: is missing"),
    ],
)
def test_sample_from_unusable_images(arguments: list[str], message: str):
    """Images that cannot be drawn again are refused by name."""
    done = CliRunner().invoke(app, ["sample", str(mini.TURBO), *arguments])
    assert message in str(done.exception) and isinstance(done.exception, ZImageTrainError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "99999999999999999999"], "--seed"),
        (["--lora", "x.safetensors=nan"], "'nan' is not a number from -100 to 100"),
        (["--lora", "x.safetensors=inf"], "'inf' is not a number"),
        (["--width", "100"], "give a multiple of 16"),
        (["-o", str(mini.ADAPTER_V1)], "is not a folder; choose another place"),
    ],
)
def test_invalid_sample_loads_nothing(arguments: list[str], message: str, monkeypatch):
    """Invalid sampling options are refused before anything is loaded."""
    monkeypatch.setattr("zimage_train.commands.sample.load_frozen", pytest.fail)
    done = CliRunner().invoke(app, ["sample", str(mini.TURBO), "--prompt", "x", *arguments])
    assert done.exit_code != 0
    assert message in done.output + str(done.exception)
    assert isinstance(done.exception, SystemExit | ZImageTrainError)


def test_an_empty_model_is_refused():
    done = CliRunner().invoke(app, ["sample", "", "--prompt", "x"])
    assert "MODEL: is empty" in str(done.exception)
