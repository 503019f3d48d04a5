"""`check` knows everything that can be known without a GPU, says all of it at once, and changes nothing."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zimage_train import mini
from zimage_train.cli import app
from zimage_train.commands import check as checking
from zimage_train.config.load import dump_config
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Note, WeightsError, ZImageTrainError
from zimage_train.io import atomic, safetensors_format
from zimage_train.io.safetensors_format import TensorEntry, read_header
from zimage_train.models import components, text_encoder, vae
from zimage_train.models.components import ExtrasPaths
from zimage_train.models.locate import cached_only
from zimage_train.planning import gpus, memory, preflight
from zimage_train.planning.preflight import RunSpec

Make = Callable[..., Config]
BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def offline(*_: object) -> Path:
    raise AssertionError("local paths ask no hub")


def refused(config: Config) -> ZImageTrainError:
    with pytest.raises(ZImageTrainError) as caught:
        preflight.check_run(config, offline)
    return caught.value


def adapter(path: Path, change: Callable[[dict[str, tuple[int, ...]]], None] = lambda shapes: None) -> Path:
    """The miniature's adapter with other keys or shapes, its values zero."""
    header = read_header(mini.ADAPTER_V1)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    change(shapes)
    entries = {}
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        entries[name] = TensorEntry("F32", shape, bytes(4 * count))
    safetensors_format.write_safetensors(path, entries, header.metadata)
    return path


def renamed(old: str, new: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    def change(shapes: dict[str, tuple[int, ...]]) -> None:
        for name in [name for name in shapes if old in name]:
            shapes[name.replace(old, new)] = shapes.pop(name)

    return change


def of_part(shapes: dict[str, tuple[int, ...]], part: str) -> str:
    return next(name for name in shapes if f".{part}." in name)


def wider(shapes: dict[str, tuple[int, ...]]) -> None:
    name = of_part(shapes, "lora_A")
    shapes[name] = (shapes[name][0], shapes[name][1] + 1)


def other_rank(shapes: dict[str, tuple[int, ...]]) -> None:
    name = of_part(shapes, "lora_A")
    shapes[name] = (shapes[name][0] + 1, shapes[name][1])


def without_half(shapes: dict[str, tuple[int, ...]]) -> None:
    del shapes[of_part(shapes, "lora_B")]


def flat(shapes: dict[str, tuple[int, ...]]) -> None:
    name = of_part(shapes, "lora_A")
    shapes[name] = (shapes[name][0] * shapes[name][1],)


def with_foreign_key(shapes: dict[str, tuple[int, ...]]) -> None:
    shapes["text_encoder.layers.0.weight"] = (2, 2)


def a_dora(shapes: dict[str, tuple[int, ...]]) -> None:
    name = of_part(shapes, "lora_B")
    shapes[name.replace("lora_B.weight", "dora_scale")] = (shapes[name][0], 1)


def an_oft(shapes: dict[str, tuple[int, ...]]) -> None:
    rows = shapes.pop(of_part(shapes, "lora_B"))[0]
    shapes[of_part(shapes, "lora_A").replace("lora_A.weight", "oft_blocks")] = (rows // 8, 8, 8)
    del shapes[of_part(shapes, "lora_A")]


FITTING = {"unchanged": lambda shapes: None, "another prefix": renamed("diffusion_model.", "transformer.")}
FOREIGN = {
    "another model's modules": renamed("layers.", "double_blocks."),
    "one more layer": renamed("layers.0.", "layers.99."),
    "another width": wider,
    "ranks that differ": other_rank,
    "B is missing": without_half,
    "no matrix": flat,
    "a foreign key": with_foreign_key,
    "nothing": dict.clear,
    "a DoRA": a_dora,
    "an OFT": an_oft,
}
COMPLAINTS = {
    "another model's modules": "FLUX LoRA: cannot work on Z-Image; retrain from the dataset",
    "one more layer": "matched 40/{total} modules; not matched: layers.99.",
    "another width": "matched {less}/{total} modules; not matched: ",
    "ranks that differ": "has 1 modules whose A, B or alpha are missing or do not fit, such as ",
    "B is missing": "has 1 modules whose A, B or alpha are missing or do not fit, such as ",
    "no matrix": "has 1 modules whose A, B or alpha are missing or do not fit, such as ",
    "a foreign key": "has a LoRA of the text encoder: 1 keys, such as text_encoder.layers.0.weight",
    "nothing": "holds no LoRA",
    "a DoRA": "is a DoRA (1 modules, such as ",
    "an OFT": "is a OFT (1 modules, such as ",
}


# Fine


def test_what_a_run_needs_is_all_there(make_config: Make):
    config = make_config(data=[{"folder": str(mini.IMAGES), "resolution": [64, 96], "trigger": "zorb"}])
    checked = preflight.check_run(config, offline)
    assert len(checked.images[0]) == len(list(mini.IMAGES.glob("*.txt"))) >= 12
    assert len(checked.items) == 2 * len(checked.images[0])
    assert checked.model_files is not None
    assert len(checked.model_files.modules) == 42
    assert checked.model_files.adapter_modules == adapter_modules(mini.ADAPTER_V1) > 0
    (note,) = checked.notes
    assert note.code == "smaller-than-resolution" and note.text.endswith("1 of 16 images (zorb_12.jpg)")


def adapter_modules(path: Path) -> int:
    return len({name.split(".lora_")[0] for name in read_header(path).tensors if ".lora_" in name})


def test_report_of_a_run(make_config: Make, monkeypatch: pytest.MonkeyPatch):
    """The report describes what a run would do."""
    data = [{"folder": str(mini.IMAGES), "resolution": [64, 96], "trigger": "zorb"}]
    config = make_config(data=data, train={"steps": 30, "batch_size": 2}, model={"adapter_strength": 0.5})
    checked = preflight.check_run(config, offline)
    lines = checking.check_report(checked)
    count = len(checked.images[0])
    assert lines[0] == "tiny: no problems found"
    assert f"{count} images" in lines
    table = [line for line in lines if "->" in line]
    assert len(table) == count and all("zorb" in line for line in table)
    assert re.search(
        r"zorb_01\.png: \d+x\d+ -> 64x64 \(scale 0\.67, crop 0 %\), 96x96 \(scale 1\.00, crop 0 %\)  '", table[0]
    )
    (epochs,) = [line for line in lines if "samples an epoch" in line]
    per_epoch = float(re.search(r"([\d.]+) steps an epoch", epochs)[1])
    assert epochs.startswith(f"{2 * count} samples an epoch") and "30 steps of up to 2 samples" in epochs
    assert float(re.search(r"= ([\d.]+) epochs", epochs)[1]) == pytest.approx(30 / per_epoch, abs=0.1)
    assert "LoRA of rank 4 on 42 modules (attention 24, feed_forward 18)" in lines
    matched = adapter_modules(mini.ADAPTER_V1)
    assert f"adapter fits {matched}/{matched} modules" in lines
    assert any(line.startswith("  at the most") for line in lines)
    assert [line.split(":")[0] for line in lines[-2:]] == ["warning", "warning"]
    assert "model.adapter_strength is 0.5" in "\n".join(lines)


def test_report_without_an_adapter(make_config: Make):
    """A run without an adapter has no adapter to fit."""
    checked = preflight.check_run(make_config(model={"adapter": None}), offline)
    assert checked.model_files is not None and checked.model_files.adapter_modules == 0
    assert not any(line.startswith("adapter fits") for line in checking.check_report(checked))


def test_plan_follows_budget_and_gpu(make_config: Make):
    """The plan follows the budget and the GPU."""

    def lines(gpu: str | None = None, price: float | None = None, **settings: Any) -> str:
        checked = preflight.check_run(make_config(memory=settings), offline)
        return "\n".join(checking.check_report(checked, gpu, price))

    assert "memory on cpu (" in lines() and "time" in lines()
    assert "memory on one 4090 (25.30 GB)" in lines("4090") and "recomputed: nothing\n" in lines("4090")
    assert "memory on one 4090 (0.30 GB)" in lines("rtx 4090", budget_gb=0.3)
    assert "recomputed: everything" in lines("4090", checkpointing=True)
    assert re.search(r"3 of 6 blocks streamed from \d\.\d MB of main memory", lines("4090", offload=0.5))
    assert re.search(
        r"time on one h100, for 4 steps: (0 h 01 min|\d+ s), at 2.99 an hour 0.0\d \(predicted\)", lines("H100", 2.99)
    )
    assert re.search(
        r"train.reproducible takes some 0 ms of a step at 64x64 \(\d+%\), judged by an H100", lines("H100")
    )
    assert "0.55 to 1.65 times as long, as runs on an H100 did; no run on a 4090 was measured" in lines("4090")
    assert "as runs on an H100 did\n" in lines("H100") + "\n"
    assert "memory on one 4060 (8.10 GB)" in lines("4060", budget_gb=24), "no budget makes a card larger"
    assert "memory on one a100 40gb (42.4" in lines("NVIDIA A100-SXM4-40GB")
    with pytest.raises(ConfigError, match="--gpu: 'riva' is not known; give one of 3060"):
        lines("riva")


def test_plans_for_four_gpu_sizes(make_config: Make, private: Path):
    """Without a GPU, the published model is planned for four sizes of GPU."""
    config = make_config(
        model={"path": None, "adapter": None, "dtype": "bf16"},
        data=[{"folder": str(mini.IMAGES), "trigger": "zorb"}],
        sample={"prompts": ["a"], "width": 1024, "height": 1024},
    )
    lines = checking.check_report(preflight.check_run(config, cached_only), price=2.0)
    found = [line for line in lines if re.match(r" +\d+\.\d GB \(\w+\): ", line)]
    assert [re.search(r"\((\w+)\)", line)[1] for line in found] == ["4090", "4080", "4070", "4060"]
    assert all(re.search(r"\d (s|min), at 2 an hour 0\.\d\d$", line) for line in found)
    assert "blocks streamed" in found[3] and "streamed" not in found[0]


def test_report_of_a_run_that_does_not_fit(make_config: Make, private: Path):
    """A config that does not fit is not reported as free of problems."""
    config = make_config(
        model={"path": None, "adapter": None, "dtype": "bf16"},
        data=[{"folder": str(mini.IMAGES), "trigger": "zorb"}] * 2,
        memory={"offload": 0},
    )
    lines = checking.check_report(preflight.check_run(config, cached_only), "4060")
    assert lines[0] == "tiny: does not fit the memory planned for, see below"
    assert any(line.startswith("  this does not fit 8.10 GB: set memory.checkpointing: auto") for line in lines)


@pytest.mark.parametrize("text", ["0.69", "0.69/h", " 0.69/h "])
def test_a_price_is_a_number_an_hour(text: str):
    assert checking.parse_price(text) == 0.69


@pytest.mark.parametrize("text", ["", "cheap", "-1", "1/min", "nan", "1.2.3", "0,69", "$0.69/h", "prices.yaml"])
def test_what_is_no_price_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"give the price per hour, such as 0\.69/h") as caught:
        checking.parse_price(text)
    assert caught.value.exit_code == 2


def test_gpu_detection_never_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A GPU that is missing or answers oddly is no error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.detect_gpu() is None
    tool = tmp_path / "nvidia-smi"
    good = gpus.DetectedGpu("NVIDIA GeForce RTX 4090", 24564 * 2**20)
    for script, expected in (
        ("echo 'NVIDIA GeForce RTX 4090, 24564'", good),
        ("echo no devices", None),
        ("exit 9", None),
        ("", None),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert gpus.detect_gpu() == expected


# Refused


def test_problems_are_listed_together(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Problems of config, data, weights and disk are listed together."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "page.png").write_text("<html>")
    Image.new("RGB", (64, 5000)).save(photos / "strip.png")
    Image.new("RGB", (64, 64)).save(photos / "fine.png")
    (photos / "fine.txt").write_bytes(b"\xff")
    config = make_config(
        data=[{"folder": str(photos), "resolution": [64]}, {"folder": str(tmp_path / "none")}],
        lora={"targets": "nothing_like_this"},
        model={"adapter": str(adapter(tmp_path / "a.safetensors", FOREIGN["another model's modules"]))},
    )
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: type("Usage", (), {"free": -1}))
    error = refused(config)
    found = {str(problem.location): problem.message for problem in error.problems}
    assert found.keys() == {
        str(photos / "page.png"),
        str(photos / "strip.png"),
        str(photos / "fine.txt"),
        str(tmp_path / "none"),
        "lora.targets",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "runs"),
    }
    assert error.exit_code == 2
    assert all(problem.hint for problem in error.problems)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data": [{"folder": "/nowhere"}]}, 3),
        ({"data": [{"folder": "/nowhere"}], "model": {"adapter": "/nowhere/x.safetensors"}}, 3),
        ({"model": {"adapter": "/nowhere/x.safetensors"}}, 4),
        ({"lora": {"targets": "no"}, "data": [{"folder": "/nowhere"}]}, 2),
    ],
)
def test_exit_code_is_the_lowest(make_config: Make, changes: dict[str, Any], code: int):
    """The exit code is the lowest that applies."""
    assert refused(make_config(**changes)).exit_code == code


@pytest.mark.parametrize("kind", FOREIGN)
def test_adapter_must_fit_in_full(make_config: Make, tmp_path: Path, kind: str):
    """An adapter that does not fit in full is refused."""
    path = adapter(tmp_path / "a.safetensors", FOREIGN[kind])
    error = refused(make_config(model={"adapter": str(path)}))
    assert error.exit_code == 4 and len(error.problems) == 1
    total = adapter_modules(mini.ADAPTER_V1)
    assert str(error).startswith(f"{path}: {COMPLAINTS[kind].format(total=total, less=total - 1)}")


@pytest.mark.parametrize("kind", FITTING)
def test_an_adapter_that_fits_is_counted(make_config: Make, tmp_path: Path, kind: str):
    path = adapter(tmp_path / "a.safetensors", FITTING[kind])
    checked = preflight.check_run(make_config(model={"adapter": str(path)}), offline)
    assert checked.model_files is not None
    assert checked.model_files.adapter_modules == adapter_modules(mini.ADAPTER_V1)


def test_adapter_check_equals_loading(make_config: Make, tmp_path: Path):
    """`check` and loading agree about adapters."""
    lora_files = pytest.importorskip("zimage_train.lora.lora_file")
    checked = preflight.check_run(make_config(), offline)
    assert checked.model_files is not None
    linears = checked.model_files.shape.linears
    for name, change in (FITTING | FOREIGN).items():
        path = adapter(tmp_path / f"{name}.safetensors", change)
        if name in FITTING:
            lora_files.require_modules(path, lora_files.read_lora(path), linears)
        else:
            with pytest.raises(ZImageTrainError):
                lora_files.require_modules(path, lora_files.read_lora(path), linears)


def damaged_adapter(path: Path, content: bytes | None) -> Path:
    whole = mini.ADAPTER_V1.read_bytes()
    path.write_bytes(whole[:-1] if content is None else content)
    return path


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cut off or overwritten"),
        (b"", "is empty"),
        (b"\x80\x04\x95 a pickle, with more bytes", "is a pickle, which can run code and is never opened"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ],
)
def test_a_damaged_adapter_is_refused(make_config: Make, tmp_path: Path, content: bytes | None, what: str):
    path = damaged_adapter(tmp_path / "a.safetensors", content)
    error = refused(make_config(model={"adapter": str(path)}))
    assert error.exit_code == 4 and what in str(error) and str(path) in str(error)


def missing_folder(root: Path) -> str:
    return str(root / "none")


def empty_folder(root: Path) -> str:
    (root / "empty").mkdir()
    return str(root / "empty")


def without_a_shard(root: Path) -> str:
    model = copied(root)
    next(iter(sorted((model / "transformer").glob("*-00002-*")))).unlink()
    return str(model)


def with_a_pickle(root: Path) -> str:
    model = copied(root)
    for path in (model / "transformer").glob("*.safetensors*"):
        path.unlink()
    (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    return str(model)


def copied(root: Path) -> Path:
    """The miniature, of links."""
    for path in mini.TURBO.rglob("*"):
        if path.is_file():
            target = root / "model" / path.relative_to(mini.TURBO)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return root / "model"


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (missing_folder, "is neither a path that exists nor a hub id"),
        (empty_folder, "holds no transformer/config.json"),
        (without_a_shard, "does not exist"),
        (with_a_pickle, "diffusion_pytorch_model.bin is a pickle, which is never opened"),
    ],
)
def test_missing_weights_are_refused(make_config: Make, tmp_path: Path, break_it: Callable[[Path], str], what: str):
    path = break_it(tmp_path)
    error = refused(make_config(model={"path": path}))
    assert error.exit_code == 4 and what in str(error) and path in str(error)


def damaged(part: str, content: bytes | None) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / part
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("part", "content", "what"),
    [
        ("text_encoder/config.json", b'{"model_type": "t5"}', "is t5, not a Qwen3"),
        ("text_encoder/config.json", b'{"model_type": "qwen3", "hidden_size": 7}', "vocab_size is None"),
        ("text_encoder/model-00001-of-00002.safetensors", None, "does not exist"),
        ("text_encoder/model-00001-of-00002.safetensors", b"version https://git-lfs", "is a Git LFS pointer"),
        ("tokenizer/tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer/tokenizer.json", b"{", "is not JSON"),
        ("vae/config.json", b'{"_class_name": "AutoencoderKLWan"}', "is AutoencoderKLWan"),
        ("vae/diffusion_pytorch_model.safetensors", b"", "is empty"),
    ],
)
def test_other_model_parts_are_checked(make_config, tmp_path, part: str, content: bytes, what: str):
    """The text encoder, VAE and tokenizer are checked, too."""
    damaged(part, content)(copied(tmp_path))
    error = refused(make_config(model={"path": str(tmp_path / "model")}))
    assert error.exit_code == 4 and what in str(error)


def test_text_encoder_of_another_width(make_config: Make, tmp_path: Path):
    """A text encoder of another width is refused, with both widths."""
    folder = copied(tmp_path) / "text_encoder"
    config = json.loads((folder / "config.json").read_bytes()) | {"hidden_size": 8}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = components._qwen3_tensors(folder / "config.json", config)
    entries = {key: TensorEntry("BF16", shape, bytes(2 * math.prod(shape))) for key, shape in tensors.items()}
    safetensors_format.write_safetensors(folder / "model.safetensors", entries, {})
    text = str(refused(make_config(model={"path": str(tmp_path / "model")})))
    assert "makes embeddings of 8 features, and the transformer takes 64" in text


def edited(tmp_path: Path, part: str, change: dict[str, Any]) -> Path:
    """The miniature with other values in a JSON file."""
    model = copied(tmp_path)
    if "chat_template" in change:
        (model / "tokenizer/chat_template.jinja").unlink()
    values = json.loads((model / part).read_bytes()) | change
    (model / part).unlink()
    (model / part).write_text(json.dumps(values))
    return model


@pytest.mark.parametrize(
    ("part", "change", "what"),
    [
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("text_encoder/config.json", {"head_dim": -1}, "head_dim is -1"),
        ("text_encoder/config.json", {"intermediate_size": "wide"}, "intermediate_size is 'wide'"),
        ("text_encoder/config.json", {"intermediate_size": 3}, "expected [64, 3]"),
        ("text_encoder/config.json", {"vocab_size": True}, "vocab_size is True"),
        ("vae/config.json", {"block_out_channels": None}, "stride None"),
        ("vae/config.json", {"block_out_channels": []}, "stride None"),
        ("tokenizer/tokenizer_config.json", {"chat_template": None}, "has no chat template"),
        ("tokenizer/tokenizer.json", {"model": 3}, "is not a tokenizer"),
        ("transformer/config.json", {"n_layers": 10**9}, "n_layers"),
    ],
)
def test_odd_model_config_is_one_line(make_config: Make, tmp_path: Path, part: str, change: dict[str, Any], what: str):
    """An odd model config is an error of a single line, without a traceback."""
    model = edited(tmp_path, part, change)
    error = refused(make_config(model={"path": str(model)}))
    assert error.exit_code == 4 and what in str(error), str(error)


def load_text_encoder(model: Path) -> None:
    text_encoder.load_text_encoder(ExtrasPaths.in_folder(model), torch.device("cpu"), torch.float32)


def load_vae(model: Path) -> None:
    vae.load_vae(model / "vae", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("load", "part", "change"),
    [
        (load_text_encoder, "text_encoder/config.json", {"rope_scaling": {"rope_type": "nonsense"}}),
        (load_vae, "vae/config.json", {"scaling_factor": None}),
        (load_vae, "vae/config.json", {"layers_per_block": "two"}),
        (
            load_text_encoder,
            "tokenizer/tokenizer_config.json",
            {"chat_template": "{{ raise_exception('no') }}"},
        ),
    ],
)
def test_class_errors_are_one_line(tmp_path: Path, load, part: str, change: dict[str, Any]):
    """Errors that only the model's class can detect are a single line, too."""
    model = edited(tmp_path, part, change)
    with pytest.raises(WeightsError, match=r"does not describe|template fails"):
        load(model)


def test_damaged_parts_reported_at_once(make_config: Make, tmp_path: Path):
    """Every damaged or missing part of the model is reported at once."""
    model = copied(tmp_path)
    damaged("text_encoder/config.json", b"{}")(model)
    damaged("vae/config.json", b"[]")(model)
    damaged("tokenizer/tokenizer.json", None)(model)
    text = str(refused(make_config(model={"path": str(model), "adapter": "nowhere.safetensors"})))
    assert len(text.splitlines()) == 4, text


def test_bad_adapter_before_the_download(make_config: Make, private: Path):
    """A bad adapter is reported although the model is not downloaded yet."""
    config = make_config(model={"extras": "org/repo", "adapter": str(private / "a.safetensors")})
    (private / "a.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"a\.safetensors: is empty"):
        preflight.check_run(config, cached_only)


def test_missing_part_not_from_the_hub(make_config: Make, tmp_path: Path):
    """A pipeline folder that lacks a part is not completed from the hub."""
    model = copied(tmp_path)
    shutil.rmtree(model / "vae")
    assert f"model.extras: {model} has no vae" in str(refused(make_config(model={"path": str(model)})))


def test_misspelt_path_names_its_setting(make_config: Make, private: Path):
    """A misspelt path is reported with its setting."""
    checked = preflight.check_run(make_config(model={"path": "models/zimage"}), cached_only)
    assert checked.notes == [
        Note("not-downloaded", "model.path: models/zimage: not on this machine yet; train downloads it")
    ]


# Not here yet


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, empty, with every cache in it."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TMPDIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    "changes", [{"path": None, "adapter": None}, {"adapter": "v2"}, {"path": "org/repo@v1"}, {"extras": "org/repo"}]
)
def test_not_downloaded_is_a_note(make_config: Make, private: Path, changes: dict[str, Any]):
    """Files that are not downloaded yet are a note."""
    checked = preflight.check_run(make_config(model=changes), cached_only)
    assert checked.model_files is None
    assert memory.parameters_of(preflight.workload_of(checked).shape) > 6e9, "as large as the published models"
    assert {note.code for note in checked.notes} == {"not-downloaded"}
    lines = checking.check_report(checked)
    assert lines[0] == "tiny: no problems found"
    assert any(line.startswith("note: ") and "not on this machine yet" in line for line in lines)
    assert list(private.iterdir()) == []


def test_errors_beside_a_missing_download(make_config: Make, private: Path):
    """Errors are reported although other files are not downloaded yet."""
    with pytest.raises(ZImageTrainError) as caught:
        preflight.check_run(make_config(model={"path": None, "adapter": "/nowhere/a.safetensors"}), cached_only)
    assert caught.value.exit_code == 4 and "/nowhere/a.safetensors" in str(caught.value)
    with pytest.raises(ZImageTrainError) as caught:
        preflight.check_run(make_config(model={"path": None}, lora={"targets": "blocks"}), cached_only)
    assert caught.value.exit_code == 2 and "'blocks' matches none of the" in str(caught.value)


# The command


def tree(*roots: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its size, time and mode."""
    found = {}
    for root in roots:
        for path in (root, *root.rglob("*")):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_mode)
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command, as the console script runs it."""
    monkeypatch.setattr(sys, "argv", ["zimage-train", *arguments])
    try:
        app.main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, private: Path, capsys: pytest.CaptureFixture[str]):
    """`check(config, ...)`: exit code, stdout and stderr of the command; everything it could touch stays as it was."""

    def command(config: Config | str, *arguments: str) -> tuple[int, str, str]:
        path = private.parent / "config.yaml"
        path.write_text(config if isinstance(config, str) else dump_config(config), encoding="utf-8")
        places = (private.parent, mini.TURBO.parent)
        before = tree(*places)
        code = run(monkeypatch, "check", str(path), *arguments)
        assert tree(*places) == before, "check writes nothing"
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return command


def test_check_valid_config(check, make_config: Make):
    """A valid config exits with 0, and is described."""
    code, out, err = check(make_config())
    assert (code, err) == (0, "")
    assert out.startswith("tiny: no problems found\n") and "LoRA of rank 4 on 42 modules" in out


def test_check_problem_codes(check, make_config: Make, tmp_path: Path):
    """Every kind of problem has its exit code, and no traceback."""
    broken = str(adapter(tmp_path / "a.safetensors", FOREIGN["another width"]))
    (tmp_path / "file").write_text("")
    kinds = [
        (2, "lr: 1.0e-4\n", [], "lr: unknown key; did you mean 'optimizer.lr'?"),
        (2, make_config(), ["--set", "train.stpes=5"], "--set train.stpes=5: train.stpes: unknown key; did you mean"),
        (2, make_config(lora={"targets": "no"}), [], "lora.targets: 'no' matches none of the"),
        (3, make_config(), ["--set", "data.0.folder=/nowhere"], "/nowhere: does not exist; check the path"),
        (4, make_config(model={"adapter": broken}), [], "a.safetensors: matched "),
        (7, make_config(output_dir=str(tmp_path / "file")), [], "is not a folder; choose another place"),
    ]  # fmt: skip
    for code, config, arguments, message in kinds:
        found, out, err = check(config, *arguments)
        assert (found, out) == (code, "")
        assert message in err and all(line for line in err.splitlines())


def test_check_missing_hub_model(check, make_config: Make):
    """A hub ID that is not on this machine exits with 0 and a note."""
    code, out, err = check(make_config(model={"path": None, "adapter": "v2"}))
    assert (code, err) == (0, "")
    assert "note: model.path: Tongyi-MAI/Z-Image-Turbo: not on this machine yet; train downloads it" in out


def test_check_odd_file_names(check, make_config: Make, tmp_path: Path):
    """File names that are not text, and brackets, are printed."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64)).save(photos / "[red]é.png")
    os.link(photos / "[red]é.png", os.fsencode(photos) + b"/x\xff.txt")
    code, out, _ = check(make_config(data=[{"folder": str(photos), "default_caption": "a [b] c", "resolution": [64]}]))
    assert code == 0
    assert (
        "[red]é.png: 64x64 -> 64x64" in out and "'a [b] c'" in out and "x\\udcff.txt: a caption without an image" in out
    )


def test_check_bad_usage(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    """A missing config and bad usage exit with 2."""
    for arguments in (["check", str(tmp_path / "none.yaml")], ["check"], ["check", "--nonsense"], ["chekc"]):
        assert run(monkeypatch, *arguments) == 2
        _, err = capsys.readouterr()
        assert err and "Traceback" not in err
    assert run(monkeypatch, "--help") == 0
    assert "Train LoRAs for Z-Image. Start with: zimage-train" in capsys.readouterr().out


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_config: Make):
    def broken(checked: RunSpec, gpu: str | None, price: float | None) -> list[str]:
        raise ZeroDivisionError

    monkeypatch.setattr(checking, "check_report", broken)
    (tmp_path / "c.yaml").write_text(dump_config(make_config()))
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "check", str(tmp_path / "c.yaml"))


def test_missing_package_is_refused_first(make_config: Make, monkeypatch):
    """A setting that needs a missing package is refused before anything is loaded."""
    find = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    error = refused(make_config(model={"quantize": "nf4"}, optimizer={"name": "adamw8bit"}))
    assert error.exit_code == 2
    assert "model.quantize: nf4 needs bitsandbytes, which is not installed; install it" in str(error)
    assert "optimizer.name: adamw8bit needs bitsandbytes" in str(error)
    assert preflight.check_run(make_config(model={"quantize": "int8"}, optimizer={"name": "adamw"}), offline)


# What folders add to the plan


def folders(**changes: Any) -> list[dict[str, Any]]:
    return [{"folder": str(mini.IMAGES), "resolution": [64], "trigger": "zorb"} | changes]


def test_batches_are_planned_as_they_come(make_config: Make):
    data = [*folders(batch_size=8), *folders(resolution=[128])]
    workload = preflight.workload_of(preflight.check_run(make_config(data=data, train={"batch_size": 1})))
    by_size = {size: workload.batch(size) for size in workload.sizes}
    assert max(number for size, number in by_size.items() if size.width * size.height > 64 * 64) == 1
    assert max(by_size.values()) > 1
    assert sum(workload.shares().values()) == pytest.approx(1.0)


def test_regularization_share_of_time(make_config: Make):
    """Regularization has its share of the predicted time."""

    def share_of_large(part: float) -> float:
        data = [*folders(resolution=[128]), *folders(resolution=[32], regularization=True, trigger=None)]
        config = make_config(data=data, train={"batch_size": 1, "regularization_share": part})
        shares = preflight.workload_of(preflight.check_run(config)).shares()
        return sum(share for size, share in shares.items() if size.width * size.height > 32 * 32)

    assert share_of_large(0.25) == pytest.approx(0.75) and share_of_large(0.9) == pytest.approx(0.1)


def test_suggestion_names_folder_settings(make_config: Make):
    """Suggestions name the settings that each folder has."""
    data = [*folders(batch_size=8), *folders(max_pixels=1024 * 1024)]
    del data[1]["resolution"]
    config = make_config(data=data, model={"path": None, "adapter": None, "dtype": "bf16"}, train={"batch_size": 1})
    found = preflight.how_to_fit(preflight.check_run(config, cached_only), 2.2e9)
    changes = {one.key: one.value for one in found.changes}
    assert changes.get("data.0.batch_size", 1) == 1 and "train.batch_size" not in changes
    assert "data.1.resolution" not in changes
    assert ("data.0.resolution" in changes) == ("data.1.max_pixels" in changes) and "data.*.resolution" not in changes


def test_preserve_prompt_length_counts(make_config: Make):
    """The length of a longer prompt for preservation counts."""
    word = "a thing of many words " * 8
    plain, kept = (
        preflight.workload_of(preflight.check_run(make_config(**changes))).caption_tokens
        for changes in ({}, {"preserve": {"kind": "trigger", "class_word": word}})
    )
    assert kept > plain


def test_class_images_do_not_count(make_config: Make, tmp_path: Path):
    """Images of the class do not count as images of the concept."""
    few = tmp_path / "few"
    few.mkdir()
    for path in mini.IMAGES.glob("zorb_0[1-3].*"):
        shutil.copy(path, few)
    data = [*folders(folder=str(few)), *folders(regularization=True, trigger=None)]
    warnings = list(map(str, preflight.check_run(make_config(data=data, train={"steps": 5000})).warnings))
    assert any("for 3 images" in warning for warning in warnings)


def test_preservation_needs_triggers(make_config: Make):
    """Preservation needs a trigger for every folder of the concept."""
    kept = {"kind": "trigger", "class_word": "shape"}
    with pytest.raises(AssertionError, match=r"set data\.1\.trigger, or use blank"):
        make_config(data=[*folders(), *folders(trigger=None)], preserve=kept)
    assert make_config(data=[*folders(), *folders(trigger=None, regularization=True)], preserve=kept)


def test_unused_settings_are_noted(make_config: Make):
    """Settings that another setting replaces are noted."""
    data = folders(max_pixels=64 * 64)
    checked = preflight.check_run(make_config(data=data, train={"epochs": 2.0, "steps": 6}))
    assert checked.config.train.steps != 6
    unused = [note.text for note in checked.notes if note.code == "setting-not-used"]
    assert [text.partition(" decides")[0] for text in unused] == ["train.epochs", "data.0: max_pixels"]


def test_check_counts_what_an_epoch_holds(make_config: Make):
    data = [*folders(shuffle_tags=True), *folders(regularization=True, trigger=None)]
    text = "\n".join(checking.check_report(preflight.check_run(make_config(data=data))))
    assert re.search(r"\n16 samples an epoch, .* epochs; plus 16 regularization samples, in 50% of the passes\n", text)
    assert re.search(r"\n\d+ prompts to encode, as tags change in each epoch\n", text)
    assert "prompts to encode" not in "\n".join(checking.check_report(preflight.check_run(make_config())))


def test_warmup_longer_than_the_run(make_config: Make):
    """A warm-up longer than the run is pointed out."""
    warnings = list(map(str, preflight.check_run(make_config(schedule={"warmup_steps": 4})).warnings))
    assert "schedule.warmup_steps is 4 of 4 steps: the rate is never reached" in warnings
