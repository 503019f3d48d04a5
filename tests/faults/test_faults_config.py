"""Faults in the config: each is refused before anything is spent, with its place and what to do about it.

`UPDATE_GOLDEN=1 pytest tests/faults/test_faults_config.py` rewrites two files in tests/golden; read the diff first.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from zimage_train.config import load, strict_yaml
from zimage_train.config.load import read_config
from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError
from zimage_train.planning import preflight

from config_texts import LEAST, OPTIONS, nested, refusal, write

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def refused(tmp_path: Path):
    """`refused(text, *overrides)`: the lines of the ConfigError, with the file called c.yaml."""

    def run(text: str | bytes = "", *overrides: str, least: str = LEAST) -> list[str]:
        return refusal(tmp_path, text, *overrides, least=least)

    return run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1.0e-4}", "c.yaml:3: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("optimizer:\n\n  lrr: 1.0e-4", "c.yaml:5: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("lora: {rnak: 8}", "c.yaml:3: lora.rnak: unknown key; did you mean 'rank'?"),
        ("lr: 1.0e-4", "c.yaml:3: lr: unknown key; did you mean 'optimizer.lr'?"),
        ("learning_rate: 1.0e-4", "c.yaml:3: learning_rate: unknown key; did you mean 'optimizer.lr'?"),
        ("optimizer: {learning_rate: 1}",
         "c.yaml:3: optimizer.learning_rate: unknown key; did you mean 'optimizer.lr'?"),
        ("batch_size: 2", "c.yaml:3: batch_size: unknown key; did you mean 'data.0.batch_size' or 'train.batch_size'?"),
        ("steps: 2", "c.yaml:3: steps: unknown key; did you mean 'train.steps' or 'teacher.steps' or 'sample.steps'?"),
        ("trian: {steps: 2}", "c.yaml:3: trian: unknown key; did you mean 'train'?"),
        ("sample: {prompts: [{promt: x, prompt: y}]}",
         "c.yaml:3: sample.prompts.0.promt: unknown key; did you mean 'prompt'?"),
        ("train: {Steps: 5}", "c.yaml:3: train.Steps: unknown key; did you mean 'steps'?"),
        ("<<: {output: x}", "c.yaml:3: <<: unknown key; known here: name, output_dir, seed,"),
        ("1: 2", "c.yaml:3: 1: unknown key; known here: name, output_dir, seed,"),
        ("optimizer: {params: {beta: 1}}", "c.yaml:3: optimizer.params: adamw8bit has no 'beta'; it has betas, eps"),
        ("schedule: {params: {x: 1}}", "c.yaml:3: schedule.params: constant has no 'x'; it has no params"),
    ],
)  # fmt: skip
def test_unknown_key_is_refused(refused, text: str, message: str):
    """1. A misspelt or misplaced key is refused with its line and dotted name, and with the key that was meant."""
    (line,) = refused(text)
    assert line.startswith(message)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("name", "data[].folder")])
def test_misspelt_key_is_named(option: str):
    """1. One letter too many in any key of any section is refused, naming that key."""
    *_, last = option.split(".")
    values = nested(option, None)
    text = strict_yaml.dump(values).replace(f"{last}: null", f"{last}x: null")
    assert f"{last}x" in text
    config, problems = load.validate_config(strict_yaml.parse(text).value, load.dotted_key)
    assert config is None
    assert any(one.location.endswith(f"{last}x") and "unknown key" in one.message for one in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "c.yaml:4: seed: given twice, first in line 3"),
        ("train: {steps: 1, batch_size: 2, steps: 1}", "c.yaml:3: train.steps: given twice, first in line 3"),
        ("lora:\n  rank: 1\ntrain: {}\nlora:\n  alpha: 1.0", "c.yaml:6: lora: given twice, first in line 3"),
        ('seed: 1\n"seed": 2', "c.yaml:4: seed: given twice, first in line 3"),
        ("sample:\n  prompts:\n    - prompt: x\n      seed: 1\n      seed: 2",
         "c.yaml:7: sample.prompts.0.seed: given twice, first in line 6"),
    ],
)  # fmt: skip
def test_duplicate_key_is_refused(refused, text: str, message: str):
    """2. A key or section that is given twice is refused with the lines of both."""
    assert refused(text) == [f"{message}; remove one of them"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: a\ntrain: [\n", "c.yaml:3: not valid YAML"),
        (b"name: a\n\tseed: 1\n", "c.yaml:2: not valid YAML"),
        (b"name: a: b\n", "c.yaml:1: not valid YAML"),
        (b"name: 'a\n", "c.yaml:2: not valid YAML"),
        (b"name: a\n---\nname: b\n", "c.yaml:2: not valid YAML: but found another document"),
    ],
    ids=["open bracket", "tab", "two colons", "open quote", "two documents"],
)
def test_syntax_error_is_refused(refused, content: bytes, message: str):
    """2. A syntax error is refused with its line and the parser's own words."""
    (line,) = refused(content)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1e3}", "train.steps: is 1000.0; expected a whole number"),
        ("train: {steps: 3000.0}", "train.steps: is 3000.0; expected a whole number"),
        ("train: {steps: '3000'}", "train.steps: is '3000' (text); expected a whole number"),
        ("train: {steps: null}", "train.steps: is null; expected a whole number"),
        ("train: {steps: 0x10}", "train.steps: is '0x10' (text); expected a whole number"),
        ("lora: {rank: true}", "lora.rank: is true; expected a whole number"),
        ('optimizer: {lr: "1e-4"}', "optimizer.lr: is '1e-4' (text); expected a number"),
        ("optimizer: {lr: true}", "optimizer.lr: is true; expected a number"),
        ("optimizer: {lr: 1,0e-4}", "optimizer.0e-4: unknown key"),
        ("sample: {first: 1}", "sample.first: is 1; expected true or false"),
        ("sample: {first: yes}", "sample.first: is 'yes' (text); expected true or false"),
        ("output_dir: 2024", "output_dir: is 2024; expected text (put it in quotes)"),
        ("output_dir: 1e-4", "output_dir: is 0.0001; expected text (put it in quotes)"),
        ("output_dir: true", "output_dir: is true; expected text (put it in quotes)"),
        ("output_dir: [a]", "output_dir: is a list; expected text (put it in quotes)"),
        ("train: 5", "train: is 5; expected a section"),
        ("train: [5]", "train: is a list; expected a section"),
        ("model:", "model: is null; expected a section"),
        ("model: {variant: [turbo]}", "model.variant: is a list; expected turbo, deturbo or base"),
        ("model: {variant: {turbo: 1}}", "model.variant: is a section; expected turbo, deturbo or base"),
        ("model: {variant: Turbo}",
         "model.variant: is 'Turbo'; expected turbo, deturbo or base; did you mean 'turbo'?"),
        ("optimizer: {name: adamm}",
         "optimizer.name: is 'adamm'; expected adam, adamw, adam8bit, adamw8bit, paged_adamw8bit, ademamix, "),
        ("lora: {targets: 5}", "lora.targets: is 5; expected a list or text (put it in quotes)"),
        ("lora: {targets: [attn]}", "lora.targets: unknown group 'attn'; groups are attention, feed_forward,"),
        ("lora: {targets: []}", "lora.targets: names no group, so nothing would be trained"),
        ("lora: {targets: 'layers.('}", "lora.targets: not a regular expression"),
        ("sample: {guidance: true}", "sample.guidance: is true; expected a number or auto"),
        ("sample: {steps: 8.0}", "sample.steps: is 8.0; expected a whole number or auto"),
        ("memory: {budget_gb: true}", "memory.budget_gb: is true; expected a number or auto"),
        ("memory: {checkpointing: 1}", "memory.checkpointing: is 1; expected true or false or auto"),
        ("optimizer: {params: [1]}", "optimizer.params: is a list; expected a section"),
        ("optimizer: {params: {eps: small}}", "optimizer.params: eps is 'small'; expected a valid number"),
        ("optimizer: {params: {betas: [0.9]}}", "optimizer.params: betas is [0.9]; expected"),
        ("optimizer: {params: {betas: [0.9, 1.0]}}", "optimizer.params: betas is [0.9, 1.0]; expected less than 1"),
        ("optimizer: {name: prodigy, params: {decouple: 1}}", "optimizer.params: decouple is 1; expected"),
        ("sample: {prompts: [5]}", "sample.prompts.0: is 5; expected a section"),
        ("sample: {prompts: text}", "sample.prompts: is 'text' (text); expected a list"),
    ],
)  # fmt: skip
def test_value_of_another_type(refused, text: str, message: str):
    """3. A value of another type (1e3 steps, a rate in quotes) is refused, naming what it is and what is expected."""
    lines = refused(text)
    assert any(line.startswith(f"c.yaml:3: {message}") for line in lines), lines


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_number_that_is_not_finite(refused, value: str):
    """4. Not a number, or infinity, is refused in every setting that takes a number."""
    floats = [name for name, field in OPTIONS.items() if "float" in str(field.annotation)]
    assert len(floats) > 10
    number = strict_yaml.plain_value(value)
    for name in floats:
        assert load.validate_config(nested(name, number), load.dotted_key)[0] is None, name
    for optimizer, spec in OPTIMIZERS.items():
        for key in spec.params:
            held = [number, 0.9, 0.9][: 2 + (optimizer == "came")] if key == "betas" else number
            values = nested("optimizer.params", {key: held})
            values["optimizer"]["name"] = optimizer
            assert load.validate_config(values, load.dotted_key)[0] is None, key
    assert refused(f"optimizer: {{lr: {value}}}")[0].endswith("; give a finite number")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: 0.0}", "optimizer.lr: is 0.0; expected more than 0.0"),
        ("optimizer: {lr: -1.0}", "optimizer.lr: is -1.0; expected more than 0.0"),
        ("lora: {rank: 0}", "lora.rank: is 0; expected at least 1"),
        ("lora: {rank: 1025}", "lora.rank: is 1025; expected at most 1024"),
        ("save: {every: 0}", "save.every: is 0; expected at least 1, or null, which is never"),
        ("sample: {every: -1}", "sample.every: is -1; expected at least 1, or null, which is never"),
        ("train: {steps: -5}", "train.steps: is -5; expected at least 1"),
        ("lora: {dropout: 1.0}", "lora.dropout: is 1.0; expected less than 1.0"),
    ],
)
def test_number_out_of_range(refused, text: str, message: str):
    """4. A number out of its range is refused, naming the limit that it breaks."""
    assert refused(text) == [f"c.yaml:3: {message}"]


def test_budget_that_no_step_fits(make_config):
    """5. A memory budget that a training step does not fit is refused with exit code 2 and the plan that would fit."""
    with pytest.raises(ConfigError) as error:
        preflight.check_run(make_config(memory={"budget_gb": 0.0075}, train={"batch_size": 8}))
    assert error.value.exit_code == 2
    assert re.fullmatch(
        r"memory.budget_gb: is 0.0075, and a run takes \d+\.\d MB \(predicted\); "
        r"set train.batch_size: 1 \(predicted: \d\.\d MB\)",
        str(error.value),
    )
    assert preflight.check_run(make_config(memory={"budget_gb": 0.015}, train={"batch_size": 8}))
    with pytest.raises(ConfigError, match=r"set memory.checkpointing: auto, memory.offload: auto \(predicted"):
        preflight.check_run(make_config(memory={"budget_gb": 0.015, "checkpointing": False}, train={"batch_size": 8}))


@pytest.mark.parametrize("budget", ["0", "-1.0", "'24'", "10001"])
def test_a_budget_that_is_none_is_refused(refused, budget: str):
    """5. A memory budget that is no amount of memory is refused."""
    (line,) = refused(f"memory: {{budget_gb: {budget}}}")
    assert line.startswith("c.yaml:3: memory.budget_gb: is ")


def test_byte_order_mark_and_line_ends(tmp_path: Path):
    """6. A byte order mark, Windows line ends or a missing last line end change neither settings nor line numbers."""
    text = LEAST + "train:\n  steps: 5\n"
    expected = read_config(write(tmp_path, text))
    for content in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode(), text.rstrip().encode()):
        assert read_config(write(tmp_path, content)) == expected
    wrong = LEAST.replace("\n", "\r\n") + "\r\nlrr: 1\r\n"
    with pytest.raises(ConfigError, match=r"c\.yaml:4: lrr"):
        read_config(write(tmp_path, b"\xef\xbb\xbf" + wrong.encode()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "c.yaml: is empty; zimage-train init FOLDER writes a config"),
        (b"\xef\xbb\xbf", "c.yaml: is empty"),
        (b"# only a comment\n", "c.yaml: is empty"),
        (b"null\n", "c.yaml: is empty"),
        (b"- a\n", "c.yaml: holds a list, not settings"),
        (b"just text\n", "c.yaml: holds text, not settings"),
        (b"name: a\0b\n", "c.yaml: contains NUL bytes, so it is not a text file"),
        ("name: ä\n".encode("latin-1"), "c.yaml: is not UTF-8 text (byte 6)"),
        ("name: a\n".encode("utf-16"), "c.yaml: is not UTF-8 text (byte 0)"),
        (b"name: a\n" * 200_000, "c.yaml: is larger than 1 MB, so it is not a config"),
        (b"name: a\n\noutput_dir: \x07\n", "c.yaml:3: holds the control character 0x07"),
        (b'name: a\noutput_dir: "\\0"\n', "c.yaml:2: output_dir: holds a character that no text has"),
        (b'name: a\noutput_dir: "\\ud800"\n', "c.yaml:2: output_dir: holds a character that no text has"),
        (b'name: a\n"\\ud800": 1\n', "c.yaml:2: a key must be plain text"),
        (b"name: a\n? [x]\n: y\n", "c.yaml:2: a key must be plain text"),
        (b"name: !!str 5\n", "c.yaml:1: has the tag !!str, and only plain values are read"),
        (b"name: a\nseed: !!int '5'\n", "c.yaml:2: has the tag !!int"),
        (b"name: a\ndata: !!python/object/apply:os.system [x]\n", "c.yaml:2: has the tag !!python/object/apply:os"),
        (b"!!python/name:os.system name: a\n", "c.yaml:1: has the tag !!python/name:os.system"),
        (b"name: ! a\n", "c.yaml:1: has the tag !"),
        (b"name: a\nb: &x [*x]\n", "c.yaml:2: b.0.0"),
        (b"name: " + b"[" * 5000, "c.yaml:1: is nested more than 40 deep"),
        (b"name: " + b"[" * 50 + b"]" * 50, "c.yaml:1: is nested more than 40 deep"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_file_that_is_no_config(refused, content: bytes, message: str):
    """6. A file that is empty, binary, too large or anything but plain settings is refused in a single line."""
    (line,) = refused(content)
    assert line.startswith(message)


def test_missing_config_or_folder(tmp_path: Path):
    """6. A config that is missing, a folder or below a file is refused by its path."""
    for path, message in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder; give a file")):
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        assert str(caught.value).startswith(f"{path}: {message}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(write(tmp_path, LEAST) / "below.yaml")


def test_config_that_unfolds_to_gigabytes(refused):
    """6. A small file that would unfold to gigabytes, or keep the reader busy, is refused at once."""
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    start = time.monotonic()
    (line,) = refused("\n".join(layers), least="")
    assert "too large or nested too deeply" in line
    assert time.monotonic() - start < 30
    start = time.monotonic()
    (line,) = refused("train: {steps: " + "1" * 500_000 + "x}")  # slow for a regular expression that backtracks
    assert "expected a whole number" in line and len(line) < 200
    assert "whole number" in refused("train: {steps: " + "1" * 5_000 + "}")[0]  # more digits than int() takes
    assert time.monotonic() - start < 30


def matches_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; UPDATE_GOLDEN=1 rewrites it"


BAD = {
    "a misspelt key": (LEAST + "optimizer: {lrr: 1.0e-4}\nlora:\n  rnak: 8\n", []),
    "a key of another trainer": (LEAST + "learning_rate: 1.0e-4\nnetwork_dim: 16\nsave_every: 250\n", []),
    "a key in the wrong section": (LEAST + "train: {lr: 1.0e-4}\nsample: {rank: 8}\nsteps: 5\n", []),
    "a section misspelt": (LEAST + "optimiser: {lr: 1.0e-4}\n", []),
    "keys given twice": (LEAST + "train: {steps: 1, steps: 2}\nname: b\n", []),
    "types": (LEAST + 'train: {steps: 1e3}\nlora: {rank: true}\noptimizer: {lr: "1e-4"}\nsample: {first: yes}\n', []),
    "ranges": (LEAST + "train: {steps: 0}\nlora: {rank: 0}\noptimizer: {lr: -1}\nsave: {every: 0}\nseed: -1\n", []),
    "not finite": (LEAST + "optimizer: {lr: .nan}\nlora: {alpha: .inf}\nguidance: {differential: 1e999}\n", []),
    "sizes": (LEAST + "sample: {width: 1000, height: 16}\n", ["data.0.resolution=[512, 520]"]),
    "what only others have": (
        LEAST + "model: {attention: flash}\nlora: {type: lokr}\ntrain: {loss: huber}\n",
        ["memory.compile=true", "lora.type=oft"],
    ),
    "patterns of modules": (
        LEAST + 'lora:\n  ranks: {"(": 8}\noptimizer:\n  lr_factors: {"*": 2.0, attention: 0.0}\n',
        [],
    ),
    "ranks of a LoKr": (LEAST + "lora: {type: lokr, ranks: {attention: 8}}\n", []),
    "dropouts of a LoKr": (LEAST + "lora: {type: lokr, rank_dropout: 0.1}\n", []),
    "a dropout of all": (LEAST + "lora: {rank_dropout: 1.0, module_dropout: -0.1}\n", []),
    "a start of odd ranks": (LEAST + "lora: {start: orthogonal, ranks: {attention: 3}}\n", []),
    "dropout of principal parts": (LEAST + "lora: {start: pissa, rank_dropout: 0.1}\n", []),
    "a start beside another": (LEAST + "lora: {start: orthogonal, init_from: a.safetensors}\n", []),
    "rslora of a LoKr": (LEAST + "lora: {type: lokr, rslora: true}\n", []),
    "B of a LoKr": (LEAST + "lora: {type: lokr}\noptimizer: {lora_plus: 16}\n", []),
    "learning rates of Prodigy": (LEAST + "optimizer: {name: prodigy, lr: 1.0, lora_plus: 16}\n", []),
    "another variant's adapter": (LEAST + "model: {variant: base, adapter: v2}\n", []),
    "a choice misspelt": (LEAST + "model: {variant: turob}\ntimesteps: {type: sigmod}\nsave: {dtype: fp16}\n", []),
    "noise levels": (LEAST + "timesteps:\n  type: linear\n  mean: 0.5\n", []),
    "a density of another trainer": (LEAST + "timesteps: {type: shift}\n", []),
    "a slider without prompts": (LEAST + "train: {method: slider}\n", []),
    "a slider with an anchor elsewhere": (
        LEAST + "train: {method: slider}\nslider: {positive: old}\npreserve: {kind: blank}\n", []
    ),
    "prompts of a slider without a slider": (LEAST + "slider: {positive: old, negative: young}\n", []),
    "names": ("name: ../x\ndata: [{folder: photos}]\n", []),
    "a name that ends like a step": ("name: x-000250\ndata: [{folder: photos}]\n", []),
    "nothing to train on": ("name: a\n", []),
    "no folder": ("name: a\ndata: [{trigger: zorb}]\n", []),
    "params": (LEAST + "optimizer: {params: {momentum: 0.9}}\nschedule: {name: cosine, params: {end_factor: 2}}\n", []),
    "overrides": (LEAST, ["train.stpes=5", "train.steps", "data.3.folder=x", "lora.rank=x", "save={keep: 1, keep: 1}"]),
    "broken YAML": (LEAST + "train: {steps: 5\n", []),
    "a tab": (LEAST + "train:\n\tsteps: 5\n", []),
    "a tag": (LEAST + "output_dir: !!python/object/apply:os.system [true]\n", []),
    "a list": ("- name: a\n", []),
    "a section of another trainer": (LEAST + "network: {type: lokr}\n", []),
    "an empty file": ("", []),
}  # fmt: skip


def messages(folder: Path) -> str:
    """What the user reads for each bad config, and the exit code."""
    parts = []
    for title, (text, overrides) in BAD.items():
        (folder / "bad.yaml").write_text(text, encoding="utf-8")
        try:
            read_config(Path("bad.yaml"), overrides)
            outcome = "accepted"
        except ConfigError as error:
            outcome = f"{error}\n(exit code {error.exit_code})"
        command = "".join(f" --set '{one}'" for one in overrides)
        parts.append(f"# {title}{f'{chr(10)}#{command}' if command else ''}\n{outcome}\n")
    return "\n".join(parts)


def test_error_messages_are_the_golden_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """7. Every refusal reads word for word as the written list of messages says, so that none gets worse unnoticed."""
    monkeypatch.chdir(tmp_path)
    matches_golden("config_errors.txt", messages(tmp_path))


def test_refusals_do_not_depend_on_asserts(tmp_path: Path):
    """7. `python -O`, which drops assertions, refuses the same configs in the same words with the same exit codes."""
    (tmp_path / "bad.json").write_text(json.dumps(BAD))
    code = """
import json
from pathlib import Path
from zimage_train.config.load import read_config
from zimage_train.errors import ConfigError
for text, overrides in json.loads(Path("bad.json").read_text()).values():
    Path("bad.yaml").write_text(text)
    try:
        read_config(Path("bad.yaml"), overrides)
        print("accepted")
    except ConfigError as error:
        print(f"{error}\\n(exit code {error.exit_code})")
"""
    result = subprocess.run(
        [sys.executable, "-O", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    golden = (GOLDEN / "config_errors.txt").read_text(encoding="utf-8").splitlines()
    expected = [line for line in golden if line and not line.startswith("#")]
    assert (result.stdout.splitlines(), result.stderr) == (expected, "")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path):
    """8. Every config that ships is valid, takes overrides, and is the same file to a plain YAML reader."""
    config = read_config(path)
    assert read_config(path, ["train.steps=1"]).train.steps == 1
    assert yaml.safe_load(path.read_text())["name"] == config.name


def test_options_are_the_golden_list():
    """9. An option that appears, vanishes or is renamed: the written list of options has to change with it."""
    matches_golden("options.txt", "".join(f"{name}\n" for name in OPTIONS))


def test_options_are_all_described():
    """9. An option without documentation: every option and every section says what it does."""
    assert [name for name, field in OPTIONS.items() if len(field.description or "") < 10] == []
    sections = {name: field.description for name, field in Config.model_fields.items()}
    assert [name for name, text in sections.items() if not text] == []
