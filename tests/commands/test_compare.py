"""`compare`: LoRAs drawn from the same noise, and runs by the previews that they have, in a grid and a page."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.commands import compare
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.errors import ZImageTrainError
from zimage_train.lora import lora_file, swap
from zimage_train.lora.deltas import Factors, Lora
from zimage_train.models.locate import transformer_tensors
from zimage_train.report import comparison, grid, preview_images

from helpers import run_python

PROMPTS = ["a red zorb on a blue background", "a red circle"]
LINEARS = transformer_tensors(mini.TURBO / "transformer")[0].linears


def random_lora(seed: int, rank: int, modules: Sequence[str]) -> Lora:
    draw = torch.Generator().manual_seed(seed)
    sizes = {name: LINEARS[name] for name in modules}
    return {
        name: Factors(
            torch.randn(rank, inner, generator=draw) * 0.1, torch.randn(outer, rank, generator=draw) * 0.1, 1.0
        )
        for name, (outer, inner) in sizes.items()
    }


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of other ranks on other modules."""
    folder = tmp_path_factory.mktemp("loras")
    attention = [name for name in LINEARS if name.startswith("layers.") and ".attention.to_" in name]
    made = {"one": random_lora(1, 4, attention), "two": random_lora(2, 2, attention[1::2])}
    for name, lora in made.items():
        lora_file.export_lora(folder / f"{name}.safetensors", lora, "fp32", {"ss_steps": "7"})
    return [folder / f"{name}.safetensors" for name in made]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def draw(output: Path, *words: object, prompts: Sequence[str] = PROMPTS) -> Result:
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    size = ["--width", 64, "--height", 64, "--dtype", "fp32", "-o", output]
    done = run("compare", *words, *asked, *size)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def sampled(output: Path, *words: object) -> list[np.ndarray]:
    """What `sample` draws for PROMPTS."""
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = run("sample", *words, *asked, "--width", 64, "--height", 64, "--dtype", "fp32", "-o", output)
    assert done.exit_code == 0, (done.output, done.exception)
    return [pixels(output / f"sample-{seed}.png") for seed in (42, 43)]


def cells(path: Path, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The images of a grid, as they are in it."""
    whole, pitch = pixels(path), grid.CELL_PX + grid.MARGIN_PX
    left, top = whole.shape[1] - columns * pitch, whole.shape[0] - rows * pitch
    return [
        [
            whole[top + row * pitch :, left + column * pitch :][: grid.CELL_PX, : grid.CELL_PX]
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.asarray(grid.fit_to_cell(Image.fromarray(image)))


# LoRA files


@pytest.fixture(scope="module")
def compared(loras: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compared")
    draw(output, *loras, "--model", mini.TURBO, "--strength", "1,0,0.5")
    return output


@pytest.mark.slow
def test_images_equal_those_of_sample(compared: Path, loras: list[Path], tmp_path: Path):
    """Every image has the same bits as the image that `sample` draws."""
    one, two = loras
    wanted = [
        sampled(tmp_path / "bare", mini.TURBO),
        sampled(tmp_path / "one", mini.TURBO, "--lora", one),
        sampled(tmp_path / "half", mini.TURBO, "--lora", f"{one}=0.5"),
        sampled(tmp_path / "two", mini.TURBO, "--lora", two),
        sampled(tmp_path / "two-half", mini.TURBO, "--lora", f"{two}=0.5"),
    ]
    names = ["no-LoRA", "one-1", "one-0.5", "two-1", "two-0.5"]
    expected = [f"{number:03d}-{names[number // 2]}.png" for number in range(10)]
    found = sorted((compared / "pictures").iterdir())
    assert [path.name for path in found] == expected
    for number, path in enumerate(found):
        assert np.array_equal(pixels(path), wanted[number // 2][number % 2]), path
        assert preview_images.drawn_by(path) == preview_images.drawn_by(
            tmp_path / ["bare", "one", "half", "two", "two-half"][number // 2] / f"sample-{42 + number % 2}.png"
        )
    assert len({pixels(path).tobytes() for path in found}) == 10, "each must differ, or the comparison says nothing"


@pytest.mark.slow
def test_grid_by_lora(compared: Path):
    """The grid has a column for each LoRA, beside the bare model, and a row for each prompt and strength."""
    found = {path.name[4:]: [] for path in sorted((compared / "pictures").iterdir())}
    for path in sorted((compared / "pictures").iterdir()):
        found[path.name[4:]].append(enlarged(pixels(path)))
    shown = cells(compared / "grid.png", 4, 3)
    for row, (prompt, strength) in enumerate([(0, "1"), (0, "0.5"), (1, "1"), (1, "0.5")]):
        for column, name in enumerate(("no-LoRA", f"one-{strength}", f"two-{strength}")):
            assert np.array_equal(shown[row][column], found[f"{name}.png"][prompt]), (row, column)


def test_grid_by_strength(loras: list[Path], tmp_path: Path):
    """With `--by strength`, the columns begin with the bare model for every LoRA."""
    draw(tmp_path, *loras, "--model", mini.TURBO, "--by", "strength", prompts=PROMPTS[:1])
    bare, one, two = (enlarged(pixels(path)) for path in sorted((tmp_path / "pictures").iterdir()))
    shown = cells(tmp_path / "grid.png", 2, 2)
    assert [[cell.tobytes() for cell in row] for row in shown] == [
        [bare.tobytes(), one.tobytes()],
        [bare.tobytes(), two.tobytes()],
    ]


def test_grid_by_sampling(loras: list[Path], tmp_path: Path):
    """Values of `--sampling` are columns, and the requests in the images hold these values."""
    words = ["--sampling", "3:0,5:1.5", "--strength", "1", "--negative", "blue", "--seed", "5"]
    draw(tmp_path, loras[0], "--model", mini.TURBO, *words, prompts=["a zorb", "a zorb"])
    recipes = [preview_images.request_of(path) for path in sorted((tmp_path / "pictures").iterdir())]
    assert [(one.steps, one.guidance, one.seed) for one in recipes] == [(3, 0, 5), (3, 0, 6), (5, 1.5, 5), (5, 1.5, 6)]
    assert {(one.prompt, one.negative, one.width, one.shift) for one in recipes} == {("a zorb", "blue", 64, 3.0)}
    shown = cells(tmp_path / "grid.png", 2, 2)
    drawn = [enlarged(pixels(path)) for path in sorted((tmp_path / "pictures").iterdir())]
    assert np.array_equal(shown[1][0], drawn[1]) and np.array_equal(shown[0][1], drawn[2])
    page = (tmp_path / "compare.html").read_text()
    assert "5 steps, g 1.5 (CFG 2.5), seed 6" in page and "a zorb (seed 6)" in page


@pytest.mark.slow
def test_grid_by_model(loras: list[Path], tmp_path: Path):
    """Several models draw the same LoRAs from the same noise."""
    other = tmp_path / "other"
    shutil.copytree(mini.TURBO, other)
    for file in (other / "transformer").glob("*.safetensors"):
        save_file({name: one * 0.9 if one.ndim > 1 else one for name, one in load_file(file).items()}, file)
    models = ["--model", mini.TURBO, "--model", other]
    draw(tmp_path / "out", loras[0], *models, "--strength", "1", "--by", "variant")
    wanted = [sampled(tmp_path / name, path, "--lora", loras[0]) for name, path in (("a", mini.TURBO), ("b", other))]
    shown = cells(tmp_path / "out" / "grid.png", 2, 2)
    for row in (0, 1):
        for column in (0, 1):
            assert np.array_equal(shown[row][column], enlarged(wanted[column][row]))


def test_with_lora_restores_the_modules():
    """Taking a LoRA off restores the very modules that the model had before."""
    model = load_frozen(mini.TURBO / "transformer", None, "fp32", torch.device("cpu")).model
    before, state = dict(model.named_modules()), {name: one.clone() for name, one in model.state_dict().items()}
    with swap.with_lora(model, random_lora(1, 3, list(LINEARS)[:5])):
        assert dict(model.named_modules()) != before and hasattr(model, "peft_config")
    assert dict(model.named_modules()) == before and not hasattr(model, "peft_config")
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


# The page


def sources_of(page: str) -> list[str]:
    return [unquote(one) for one in re.findall(r'<img src="([^"]*)"', page)]


def test_page_is_self_contained(compared: Path):
    """The page holds every image, and loads nothing from elsewhere."""
    page = (compared / "compare.html").read_text()
    assert set(sources_of(page)) == {f"pictures/{path.name}" for path in (compared / "pictures").iterdir()}
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "8 steps, g 0 (CFG 1), seed 43" in page and "<td>7</td>" in page
    assert page.count("<td>no LoRA</td><td>0</td>") == 2, "the bare model stands beside two strengths, and has one"


def fabricated(
    folder: Path, prompts: Sequence[str], steps: Sequence[int], colour: int, also: int | None = None, **settings: Any
) -> Path:
    """A run folder with previews, each of a single colour: red tells the run, green the step, blue the prompt."""
    config: dict[str, Any] = {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "model": {"variant": "turbo", "path": None},
    }
    folder.mkdir(parents=True)
    config |= {"sample": {"compare_on": None if also is None else "base"}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in steps:
        for index, prompt in enumerate(prompts):
            recipe = SamplingRequest(
                prompt=prompt, negative="", seed=42 + index, width=64, height=64, steps=8, guidance=0.0, shift=3.0
            )
            for place, red in ((folder / "samples", colour), (folder / "samples" / "also", also)):
                if red is not None:
                    image = Image.new("RGB", (64, 64), (red, step, index))
                    preview_images.save_preview(
                        preview_images.preview_path(place, step, index), image, recipe, "a test"
                    )
    return folder


def colours(path: Path, rows: int, columns: int) -> list[list[tuple[int, ...]]]:
    return [[tuple(int(v) for v in cell[9, 9]) for cell in row] for row in cells(path, rows, columns)]


def test_what_a_user_wrote_is_escaped(tmp_path: Path):
    evil = """"><script>alert('x')</script>"""
    one = fabricated(tmp_path / "a", [evil], [5], 1, lora={"targets": evil})
    two = fabricated(tmp_path / "b & <b>", [evil], [5], 2, lora={"targets": "x"})
    done = run("compare", one, two, "-o", tmp_path / "<i>")
    assert done.exit_code == 0, done.exception
    page = (tmp_path / "<i>" / "compare.html").read_text()
    assert page.count("<script>") == page.count("</script>") == 1 and "<b>" not in page.replace("<b>A", "").replace(
        "<b>B", ""
    )
    assert "&lt;script&gt;alert(" in page and "b &amp; &lt;b&gt;" in page
    for source in sources_of(page):
        assert (tmp_path / "<i>" / source).is_file()


# Runs


def test_runs_at_their_last_common_step(tmp_path: Path):
    """Runs are compared by prompt, at the last step that all of them have."""
    one = fabricated(tmp_path / "a", PROMPTS, [0, 100, 200], 10)
    two = fabricated(tmp_path / "b", PROMPTS[::-1], [0, 100, 150], 20)
    done = run("compare", one, two, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert colours(tmp_path / "out" / "grid.png", 2, 2) == [[(10, 100, 0), (20, 100, 1)], [(10, 100, 1), (20, 100, 0)]]
    assert "note: a: previews at step 200 are left out, since other runs have none there" in done.output
    assert "note: b: previews at step 150 are left out" in done.output
    assert done.output.count("from other noise") == 2  # prompt i has seed 42 + i
    page = (tmp_path / "out" / "compare.html").read_text()
    assert re.findall(r'data-step="(\d+)"', page) == ["0", "100"] and len(sources_of(page)) == 8
    for source in sources_of(page):  # copies, so that the folder can go anywhere
        assert (tmp_path / "out" / source).is_file()


def test_missing_image_is_left_blank(tmp_path: Path):
    """A missing image is left blank and named."""
    one = fabricated(tmp_path / "a", PROMPTS, [5], 10)
    two = fabricated(tmp_path / "b", PROMPTS[:1], [5], 20)
    done = run("compare", one, two, "-o", tmp_path / "out")
    assert colours(tmp_path / "out" / "grid.png", 2, 2) == [[(10, 5, 0), (20, 5, 0)], [(10, 5, 1), (255, 255, 255)]]
    assert "note: b has no image of 'a red circle' at step 5" in done.output


def test_steps_of_some_runs_are_blanks(tmp_path: Path):
    """Steps that only some runs share are in order, with blanks for the others."""
    made = [("a", [0, 20]), ("b", [10, 20, 30]), ("c", [10, 30])]
    runs = [fabricated(tmp_path / name, PROMPTS[:1], steps, 10 * i) for i, (name, steps) in enumerate(made, 1)]
    done = run("compare", *runs, "--by", "step", "-o", tmp_path / "out")
    assert colours(tmp_path / "out" / "grid.png", 3, 3) == [
        [(255, 255, 255), (10, 20, 0), (255, 255, 255)],
        [(20, 10, 0), (20, 20, 0), (20, 30, 0)],
        [(30, 10, 0), (255, 255, 255), (30, 30, 0)],
    ]
    assert "a: previews at step 0 are left out" in done.output and "step 20 has no image of" in done.output


def test_grid_by_step(tmp_path: Path):
    """With steps as columns, each prompt of each run has a row."""
    runs = [fabricated(tmp_path / name, PROMPTS, [0, 5], red) for name, red in (("a", 10), ("b", 20))]
    assert run("compare", *runs, "--by", "step", "-o", tmp_path / "out").exit_code == 0
    assert colours(tmp_path / "out" / "grid.png", 4, 2) == [
        [(red, step, index) for step in (0, 5)] for index in (0, 1) for red in (10, 20)
    ]


def test_one_run_is_shown_by_its_steps(tmp_path: Path):
    assert run("compare", fabricated(tmp_path / "a", PROMPTS, [0, 5, 9], 1), "-o", tmp_path / "out").exit_code == 0
    assert colours(tmp_path / "out" / "grid.png", 2, 3) == [
        [(1, step, index) for step in (0, 5, 9)] for index in (0, 1)
    ]


def test_grid_by_setting(tmp_path: Path):
    """With a setting as columns, runs whose other settings are equal share a row."""
    made = [("a", "v1", 4), ("b", "v2", 4), ("c", "v1", 8), ("d", "v2", 8)]
    runs = [
        fabricated(
            tmp_path / name,
            PROMPTS[:1],
            [5],
            10 * rank + int(adapter[1]),
            training={"adapter": adapter},
            lora={"rank": rank},
        )
        for name, adapter, rank in made
    ]
    assert run("compare", *runs, "--by", "adapter", "-o", tmp_path / "out").exit_code == 0
    assert colours(tmp_path / "out" / "grid.png", 2, 2) == [[(41, 5, 0), (42, 5, 0)], [(81, 5, 0), (82, 5, 0)]]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<th>training.adapter</th>" in page and "<th>training.adapter=v2</th>" in page


def test_second_model_has_its_own_cells(tmp_path: Path):
    """Previews on a second model have rows or columns of their own."""
    one = fabricated(tmp_path / "a", PROMPTS[:1], [5], 10, also=30)
    two = fabricated(tmp_path / "b", PROMPTS[:1], [5], 20, also=40)
    assert run("compare", one, two, "-o", tmp_path / "rows").exit_code == 0
    assert colours(tmp_path / "rows" / "grid.png", 2, 2) == [[(10, 5, 0), (20, 5, 0)], [(30, 5, 0), (40, 5, 0)]]
    assert run("compare", one, two, "--by", "model", "-o", tmp_path / "columns").exit_code == 0
    assert colours(tmp_path / "columns" / "grid.png", 2, 2) == [[(10, 5, 0), (30, 5, 0)], [(20, 5, 0), (40, 5, 0)]]


def test_folder_of_runs_is_its_runs(tmp_path: Path):
    """A folder of runs stands for the runs in it."""
    for name, red in (("a", 10), ("b", 20)):
        fabricated(tmp_path / "sweep" / name, PROMPTS[:1], [5], red)
    assert run("compare", tmp_path / "sweep", "-o", tmp_path / "out").exit_code == 0
    assert colours(tmp_path / "out" / "grid.png", 1, 2) == [[(10, 5, 0), (20, 5, 0)]]


def test_runs_of_one_name(tmp_path: Path):
    """Runs of the same name are told apart by their folders."""
    runs = [fabricated(tmp_path / place / "same", PROMPTS[:1], [5], 1) for place in ("x", "y")]
    assert [one.label for one in compare.open_runs(runs)] == ["x/same", "y/same"]


def test_runs_are_compared_without_torch(tmp_path: Path):
    for name in ("a", "b"):
        fabricated(tmp_path / name, PROMPTS, [5], 1)
    code = "import sys; from zimage_train.cli.app import app; app(['compare', 'a', 'b'], standalone_mode=False)"
    done = run_python(f"{code}; assert 'torch' not in sys.modules", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "compare" / "compare.html").exists()


def test_run_without_a_lora_is_refused(tmp_path: Path):
    """If images must be drawn, a run without a finished LoRA is refused, saying so."""
    folder = fabricated(tmp_path / "a", PROMPTS, [5], 1)
    done = run("compare", folder, "--prompt", "x", "--model", mini.TURBO)
    assert f"{folder}: has no finished LoRA" in str(done.exception)


def test_run_stands_for_its_lora(loras: list[Path], tmp_path: Path):
    """A run stands for its LoRA where images are drawn."""
    folder = fabricated(tmp_path / "a", PROMPTS, [5], 1)
    (folder / "lora").mkdir()
    shutil.copy(loras[0], folder / "lora" / "a.safetensors")
    words = [folder, "--model", mini.TURBO, "--strength", "1"]
    draw(tmp_path / "out", *words, prompts=PROMPTS[:1])
    (path,) = (tmp_path / "out" / "pictures").iterdir()
    assert preview_images.drawn_by(path).endswith("with a.safetensors=1")


# What cannot be


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("nowhere", 2, "nowhere: does not exist; give output/NAME of a run"),
        ("empty", 2, "empty: is not a run folder: it has no config.yaml"),
        ("a a", 2, "a: is given twice"),
        ("a blank", 3, "blank: has no previews; set sample.prompts"),
        ("a late", 3, "previews: no two runs have some at the same step after step 0 (a: 0, 5; late: 0, 7)"),
        ("a broken", 2, "config.yaml: cannot be read"),
        ("a --by colour", 2, "--by colour: these images do not differ in it; give run or step or prompt"),
        ("a --width 64", 2, "--prompt: is missing, and --width is only for drawing"),
        ("a --width 60", 2, "--width: is 60; give a multiple of 16"),
        ("a --dtype fp32", 2, "--prompt: is missing, and --dtype is only for drawing"),
        ("a --variant turbo", 2, "--prompt: is missing, and --variant is only for drawing"),
        ("a --text-encoder x", 2, "--prompt: is missing, and --text-encoder is only for drawing"),
        ("LORA", 2, "--prompt: is missing, and LoRA files contain no images to compare"),
        ("LORA LORA --prompt x", 2, "one.safetensors: is given twice"),
        ("LORA --prompt x --strength a", 2, "--strength a: is not a list of numbers from -100 to 100"),
        ("LORA --prompt x --strength nan", 2, "is not a list of numbers"),
        ("LORA --prompt x --strength 1,1.0", 2, "--strength 1,1.0: has a value twice"),
        ("LORA --prompt x --sampling 8", 2, "--sampling 8: is not a list of STEPS:G"),
        ("LORA --prompt x --sampling 0:1", 2, "is not a list of STEPS:G"),
        ("LORA --prompt x --by step", 2, "--by step: these images do not differ in it"),
        ("LORA --prompt x --model=", 2, "--model: is empty"),
        ("LORA --prompt x --model gone", 4, "--model: gone: is neither a path that exists nor a hub id"),
        ("LORA OTHER --prompt x", 4, "matched 0/1 modules"),
        ("a -o a/config.yaml", 7, "is not a folder; choose another place"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: str, code: int, message: str, loras, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zimage_train.commands.sample.load_frozen", pytest.fail)
    for name, steps in (("a", [0, 5]), ("late", [0, 7]), ("blank", []), ("broken", [5])):
        fabricated(Path(name), PROMPTS, steps, 1)
    Path("empty").mkdir()
    Path("broken/config.yaml").write_text("a: [")
    factors = {"layers.99.attention.to_q": Factors(torch.zeros(2, 96), torch.zeros(96, 2), 1.0)}
    lora_file.export_lora(Path("other.safetensors"), factors, "fp32", {})
    known = {"LORA": str(loras[0]), "OTHER": "other.safetensors"}
    model = ["--model", mini.TURBO] if "LORA" in words and "--model" not in words else []
    done = run("compare", *(known.get(word, word) for word in words.split()), *model)
    assert isinstance(done.exception, ZImageTrainError), done.output
    assert message in str(done.exception) and done.exception.exit_code == code


def test_long_labels_are_wrapped():
    """Labels that are too long are wrapped and cut."""
    font = grid.ImageFont.load_default(14)
    assert grid.wrap_text("a red circle", font, 200) == ["a red circle"]
    assert grid.wrap_text("", font, 200) == []
    lines = grid.wrap_text("word " * 400, font, 200)
    assert len(lines) == grid.MAX_LINES and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 210 for line in [*lines, *grid.wrap_text("x" * 300, font, 200)])
    assert "".join(grid.wrap_text("x" * 60, font, 200)) == "x" * 60


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/a", "y/a", "y/b"], ["x/a", "y/a", "y/b"]),
        (["a"], ["a"]),
        (["/a", "a"], ["/a", "a"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths: list[str], names: list[str]):
    assert comparison.short_names([Path(path) for path in paths]) == names
