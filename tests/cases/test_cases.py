"""The case book: what people reported, as small inputs with the right answer; see CONTRIBUTING.md.

Each YAML file beside this one is a case: `source` (where it was reported or measured), `want` (what its reporter would
want), the input (`files`, `pictures` with their `texts`, and `loras` by name, each described), a `command`, and what is
`right`.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.lora import lora_file

from lora_files import TINY

CASES = sorted(Path(__file__).parent.glob("*.yaml"))
KEYS = {"source", "want", "files", "pictures", "texts", "loras", "command", "right"}
RIGHT = {"exit_code", "says", "says_not", "values", "scales"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_lora(path: Path, described: dict[str, Any]) -> None:
    """Write a LoRA on the attention of TINY's first block: `keys` with {m} and {p}, rank, alpha, header, config."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    ranks = described.get("ranks", [4, 4])
    spelling = described.get("keys", "diffusion_model.{m}.{p}.weight")
    for module, rank in zip(("layers.0.attention.to_q", "layers.0.attention.to_v"), ranks, strict=True):
        outputs, inputs = TINY.linears[module]
        a_part, b_part = described.get("parts", ["lora_A", "lora_B"])
        for part, size in ((a_part, (rank, inputs)), (b_part, (outputs, rank))):
            tensors[spelling.format(m=module, p=part)] = torch.randn(size, generator=draw)
        if "alpha" in described:
            tensors[spelling.split("{m}")[0] + f"{module}.alpha"] = torch.tensor(float(described["alpha"]))
    for key in described.get("more_keys", []):
        tensors[key] = torch.zeros(2, 2)
    header = {key: json.dumps(value) for key, value in described.get("header", {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, header or None)
    if "config" in described:
        path.with_name("adapter_config.json").write_text(json.dumps(described["config"]))


def look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path):
    """The command gives what the case says is right."""
    case = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert case.keys() <= KEYS and case["right"].keys() <= RIGHT
    for name, text in case.get("files", {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text.replace("{mini}", str(mini.TURBO.parent)), encoding="utf-8")
    for name, size in case.get("pictures", {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        info = PngInfo()
        for key, text in case.get("texts", {}).get(name, {}).items():
            info.add_itxt(key, text)
        Image.new("RGB", tuple(size), (90, 120, 30)).save(name, pnginfo=info)
    for name, described in case.get("loras", {}).items():
        write_lora(Path(name), described)
    words = shlex.split(case["command"].replace("{mini}", str(mini.TURBO.parent)))
    done = CliRunner().invoke(app, words)
    code = getattr(done.exception, "exit_code", 1) if done.exception else 0
    said, right = f"{done.output} {done.exception or ''}", case["right"]
    assert code == right.get("exit_code", 0), said
    for text in right.get("says", []):
        assert text in said, said
    for text in right.get("says_not", []):
        assert text not in said, said
    for name, values in right.get("values", {}).items():
        written = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        for key, value in values.items():
            assert look_up(written, key) == value, key
    for name, scale in right.get("scales", {}).items():
        before = load_file(next(iter(case["loras"])))
        for module, factors in lora_file.read_lora(Path(name)).items():
            parts = {key.rsplit(".", 2)[-2]: tensor for key, tensor in before.items() if module in key}
            expected = (scale[module] if isinstance(scale, dict) else scale) * (parts["lora_B"] @ parts["lora_A"])
            assert torch.allclose(factors.delta(), expected, rtol=1e-4, atol=1e-4), module


def test_every_case_says_where_it_is_from():
    """A case names its source and what its reporter would want."""
    assert len(CASES) > 20
    for path in CASES:
        case = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert len(case["source"]) > 5 and len(case["want"]) > 10, path.stem
