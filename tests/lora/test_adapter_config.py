"""The scale of a LoRA, wherever it stands: in tensors, in peft's config beside it, in the header; and what reads it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.errors import WeightsError
from zimage_train.lora import inspect, lora_file, verify
from zimage_train.lora.adapter_config import header_text, make_config
from zimage_train.lora.deltas import Factors
from zimage_train.lora.readers import LoraTraits, readers_of
from zimage_train.planning import preflight

from helpers import PREVIEWED, ROOT
from lora_commands import converted, lora_command
from lora_files import TINY, Q, dense, random_lora, relative, write

RANK = 4


def model() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(**TINY.config())


def made_by_peft(folder: Path, config: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that peft has written, with random factors, and the change of each module as peft computes it."""
    wrapped = get_peft_model(model(), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator).mul_(0.1)
    wrapped.save_pretrained(folder)
    deltas = {}
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "scaling"):
            deltas[name] = module.get_delta_weight("default").detach().double()
    return folder / "adapter_model.safetensors", deltas


TARGETS = ["layers.0.attention.to_q", "layers.0.attention.to_k", "layers.1.feed_forward.w2"]


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"r": 4, "lora_alpha": 16}, {4.0}),
        ({"r": 4, "lora_alpha": 4}, {1.0}),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, {8.0}),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attention.to_q": 2, "layers.1.*": 1}}, {0.5, 4.0, 0.25}),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"to_k": 8}}, {4.0, 2.0}),
        ({"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 9}, "use_rslora": True}, {1.5, 1.0}),
        ({"r": 4}, {2.0}),
    ],
    ids=str,
)
def test_a_folder_of_peft_is_read(tmp_path: Path, settings: dict[str, Any], scales: set[float]):
    """Every change in a folder that peft has written is the change that peft itself computes."""
    path, deltas = made_by_peft(tmp_path / "peft", LoraConfig(target_modules=TARGETS, **settings))
    if "lora_alpha" not in settings:  # a config by hand: peft takes its own default for what is missing
        config_path = path.with_name("adapter_config.json")
        config = json.loads(config_path.read_text())
        assert config.pop("lora_alpha") == 8
        config_path.write_text(json.dumps(config))
    lora = lora_file.read_lora(path)
    assert lora.keys() == deltas.keys() == set(TARGETS)
    assert {round(factors.scale, 6) for factors in lora.values()} == scales
    assert all(relative(dense(lora, name), deltas[name]) < 1e-6 for name in deltas)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LoHaConfig(r=4, alpha=16, target_modules=TARGETS), "LoHa"),
        (LoKrConfig(r=4, alpha=16, target_modules=TARGETS), "LoKr"),
        (LoKrConfig(r=64, alpha=16, target_modules=TARGETS), "LoKr"),  # whole matrices, which have no rank
    ],
    ids=["loha", "lokr", "lokr of whole matrices"],
)
def test_other_kinds_of_peft_are_read(tmp_path: Path, config: Any, kind: str):
    """A LoHa or LoKr that peft has written keeps its scale in ComfyUI's layout."""
    path, deltas = made_by_peft(tmp_path / "peft", config)
    found = converted(path, "comfyui", tmp_path / "x.safetensors")
    tensors = {key.removeprefix("diffusion_model."): tensor.double() for key, tensor in load_file(found).items()}
    for name in TARGETS:
        part = {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}
        if kind == "LoHa":
            delta = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
            rank = part["hada_w1_b"].shape[0]
        else:
            # As LyCORIS and ComfyUI: alpha / rank, where a factor is a product; else alpha has no effect.
            rank = 0
            factors = []
            for number in (1, 2):
                if f"lokr_w{number}" in part:
                    factors.append(part[f"lokr_w{number}"])
                else:
                    rank = part[f"lokr_w{number}_b"].shape[0]
                    factors.append(part[f"lokr_w{number}_a"] @ part[f"lokr_w{number}_b"])
            delta = torch.kron(*factors)
        scale = float(part["alpha"]) / rank if "alpha" in part and rank else 1.0
        assert relative(scale * delta, deltas[name]) < 1e-6, name


COMMANDS = {
    "inspect": ["inspect", "{}"],
    "verify": ["verify", "{}"],
    "convert": ["convert", "{}", "--to", "comfyui", "-o", "{out}"],
    "merge": ["merge", "{}=1", "-o", "{out}"],
    "resize": ["resize", "{}", "--rank", "2", "-o", "{out}"],
    "weight": ["weight", "{}", "--scale", "all=0.5", "-o", "{out}"],
    "diff": ["diff", "{}", "{}"],
}


@pytest.mark.parametrize("command", ["merge", "resize", "weight", "convert"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_commands_keep_the_scale(tmp_path: Path, command: str, given: str):
    """What a command makes of peft's folder, or of the file in it, has the scale of the config."""
    path, deltas = made_by_peft(tmp_path / "peft", LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    source, out = str(path if given == "file" else path.parent), tmp_path / "out.safetensors"
    words = [word.replace("{out}", str(out)).replace("{}", source) for word in COMMANDS[command]]
    code, said = lora_command(*words)
    assert code == 0, said
    found = lora_file.read_lora(out)
    factor = 0.5 if command == "weight" else 1.0
    if command == "resize":  # the best of half the rank
        norms = {name: float(torch.linalg.svdvals(delta)[:2].square().sum().sqrt()) for name, delta in deltas.items()}
        assert all(float(dense(found, name).norm()) == pytest.approx(norms[name], rel=2e-2) for name in deltas)
    else:
        assert all(relative(dense(found, name), factor * deltas[name]) < 1e-2 for name in deltas)


@pytest.mark.slow
def test_folders_where_loras_are_given(tmp_path: Path, make_config):
    """peft's folder can be given to `bake`, `lora.init_from` and `sample.extra_loras`; another folder is named."""
    folder = converted(mini.ADAPTER_V1, "peft", tmp_path / "peft").parent
    baked = []
    for name, lora in (("a", folder), ("b", mini.ADAPTER_V1)):
        out = tmp_path / f"{name}.safetensors"
        code, said = lora_command("bake", mini.TURBO, "--lora", f"{lora}=0.5", "--to", "comfyui", "-o", out)
        assert code == 0, said
        baked.append(load_file(out))
    assert all(torch.equal(tensor, baked[1][key]) for key, tensor in baked[0].items())
    lora = {"rank": 8, "targets": ["attention", "feed_forward", "adaln"], "init_from": str(folder)}
    config = make_config(
        model={"adapter": None}, lora=lora, train={"steps": 1}, sample=PREVIEWED | {"extra_loras": [str(folder)]}
    )
    run_training(config, fresh=False)
    (tmp_path / "nothing").mkdir()
    for words in (["bake", mini.TURBO, "--to", "comfyui", "-o", tmp_path / "c.safetensors", "--lora"], ["inspect"]):
        code, said = lora_command(*words, tmp_path / "nothing")
        assert code == 4 and "is a folder without adapter_model.safetensors" in said
    with pytest.raises(WeightsError, match=r"lora\.init_from: .*nothing: is a folder without"):
        preflight.check_run(make_config(model={"adapter": None}, lora={"init_from": str(tmp_path / "nothing")}))


def test_inspect_names_the_place(tmp_path: Path):
    """`inspect` says where the scale stands, and that it is taken as 1 where nothing says it."""
    path, _ = made_by_peft(tmp_path / "peft", LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    assert "alpha / rank  4 (3 modules), from adapter_config.json" in lora_command("inspect", path.parent)[1]
    other = path.rename(tmp_path / "other.safetensors")  # the config is for the name that peft gives only
    said = lora_command("inspect", other)[1]
    assert "alpha / rank  1 (3 modules), taken as 1, which the file does not say" in said
    with_tensors = write(tmp_path / "x.safetensors", random_lora(RANK, 0.5))
    assert "alpha / rank  0.5 (14 modules), from .alpha" in lora_command("inspect", with_tensors)[1]


def described(tmp_path: Path, config: Any, **header: Any) -> Path:
    """A LoRA of rank 4 in peft's folder with a config, and perhaps alphas in its header."""
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 96)}
    tensors[f"base_model.model.{Q}.lora_B.weight"] = torch.ones(96, 4)
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in header.items()})}
    save_file(tensors, folder / "adapter_model.safetensors", metadata if header else None)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("config", "header", "said"),
    [
        ({"r": 4, "lora_alpha": 8}, {"lora_alpha": 16}, f"{Q} is multiplied by 2 according to adapter_config.json, "),
        ({"r": 8, "lora_alpha": 8}, {}, f"says that {Q} has rank 8, and its factors have 4"),
        ({"r": 4, "lora_alpha": "8"}, {}, "its metadata says that alpha is 8"),
        ({"r": 4, "lora_alpha": -8}, {}, "its metadata says that alpha is -8"),
        ({"r": True, "lora_alpha": 8}, {}, "its metadata says that rank is True"),
        ({"r": 4, "lora_alpha": None}, {}, "its metadata says that alpha is None"),
        ({"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}, {}, "began with pissa_niter_4"),
        ({"peft_type": "IA3"}, {"r": 4, "init_lora_weights": "olora"}, "began with olora, which changed the weights"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": math.nan}}, {}, "its metadata says that alpha is nan"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": [1]}, {}, "its metadata says that alpha is [1]"),
        ("{", {}, "is not JSON"),
        ("[]", {}, "is not a JSON object"),
    ],
    ids=str,
)
def test_doubtful_scales_are_refused(tmp_path: Path, config: Any, header: dict[str, Any], said: str):
    """Two places that disagree, or a place that cannot be read, are an error that shows them."""
    path = described(tmp_path, config, **header)
    for words in (["inspect", path], ["convert", path, "--to", "comfyui", "-o", tmp_path / "x.safetensors"]):
        code, output = lora_command(*words)
        assert code == 4 and said in output
    assert not (tmp_path / "x.safetensors").exists()


def test_places_that_agree_are_fine(tmp_path: Path):
    path = described(tmp_path, {"r": 4, "lora_alpha": 8}, lora_alpha=8, r=4)
    assert lora_file.read_lora(path)[Q].scale == 2.0
    no_alpha = described(tmp_path, {"peft_type": "IA3"}, lora_alpha=16)
    assert lora_file.read_lora(no_alpha)[Q].scale == 4.0
    described(tmp_path, {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "use_rslora": 1})
    assert lora_file.read_lora(path)[Q].scale == 4.0


def test_patterns_have_names_of_the_file(tmp_path: Path):
    """A pattern is of the module's name in the model that peft wrapped, which may be more than the transformer."""
    path = described(tmp_path, {"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^transformer.{Q}": 32}})
    tensors = {key.replace("model.layers", "model.transformer.layers"): one for key, one in load_file(path).items()}
    save_file(tensors, path)
    assert lora_file.read_lora(path)[Q].scale == 8.0


def test_alpha_tensors_against_the_header(tmp_path: Path):
    """An alpha in tensors that the header contradicts is an error, too."""
    path = write(tmp_path / "x.safetensors", {Q: random_lora()[Q]})
    tensors = load_file(path)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})})
    with pytest.raises(WeightsError, match=r"multiplied by 1 according to \.alpha, and by 2 to the header"):
        lora_file.read_lora(path)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_peft_reads_what_convert_writes(tmp_path: Path, scale: float):
    """`PeftModel.from_pretrained` makes of `convert --to peft` the same change, with ranks and alphas that differ."""
    lora = random_lora(scale=scale)
    lora |= {name: Factors(one.a[:2], one.b[:, :2], 2.5) for name, one in lora.items() if "layers.1." in name}
    path = write(tmp_path / "x.safetensors", lora)
    folder = converted(path, "peft", tmp_path / "peft").parent
    loaded = PeftModel.from_pretrained(model(), folder)
    found = {}
    for name, module in loaded.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            found[name] = module.get_delta_weight("default").detach().double()
    assert found.keys() == lora.keys()
    assert all(relative(found[name], dense(lora, name)) < 1e-6 for name in lora)
    again = lora_file.read_lora(folder / "adapter_model.safetensors")
    assert all(relative(dense(again, name), dense(lora, name)) < 1e-6 for name in lora)


def test_peft_writes_a_new_folder(tmp_path: Path):
    """peft's layout is a folder of its own: none that exists, and no file."""
    path = write(tmp_path / "x.safetensors", random_lora())
    (tmp_path / "there").mkdir()
    for name, said in (("there", "exists"), ("y.safetensors", "ends in .safetensors, and peft reads a folder")):
        code, output = lora_command("convert", path, "--to", "peft", "-o", tmp_path / name)
        assert code == 2 and said in output
    code, output = lora_command("inspect", tmp_path / "there")
    assert code == 4 and "is a folder without adapter_model.safetensors or pytorch_lora_weights.safetensors" in output


def test_folder_of_a_diffusers_script(tmp_path: Path):
    """A folder of diffusers' scripts is read by its file."""
    (tmp_path / "made").mkdir()
    write(
        tmp_path / "made" / "pytorch_lora_weights.safetensors", random_lora(), "transformer.{m}.lora_{p}.weight", False
    )
    code, said = lora_command("inspect", tmp_path / "made")
    assert code == 0 and "diffusers' layout" in said


# Who reads what


def lora_of(modules: str = "blocks", scale: float = 1.0, mixed: bool = False) -> dict[str, Factors]:
    lora = random_lora(scale=scale, targets=("attention", "feed_forward", "adaln"))
    if modules == "all":
        draw = torch.Generator().manual_seed(5)
        for name, (outputs, inputs) in TINY.linears.items():
            a, b = torch.randn(4, inputs, generator=draw), torch.randn(outputs, 4, generator=draw)
            lora.setdefault(name, Factors(a, b, scale))
    if mixed:
        lora |= {name: Factors(one.a[:1], one.b[:, :1], scale) for name, one in lora.items() if "to_v" in name}
    return lora


SPELLINGS = {
    "comfyui": "diffusion_model.{m}.lora_{p}.weight",
    "diffusers": "transformer.{m}.lora_{p}.weight",
    "diffsynth": "{m}.lora_{p}.default.weight",
    "no weight": "diffusion_model.{m}.lora_{p}",
    "peft": "base_model.model.{m}.lora_{p}.weight",
}


@pytest.mark.parametrize("place", ["tensors", "config", "header", "nowhere"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_none_is_promised_that_fails(tmp_path: Path, spelling: str, place: str):
    """What `inspect` promises of a file of another tool is what the loaders do, wherever its scale stands."""
    lora = random_lora(RANK, 1.0 if place == "nowhere" else 2.0)
    path = write(tmp_path / "adapter_model.safetensors", lora, SPELLINGS[spelling], alpha=place == "tensors")
    config = make_config({name: RANK for name in lora}, {name: 2.0 * RANK for name in lora}, is_dora=False)
    if place == "config":
        path.with_name("adapter_config.json").write_text(json.dumps(config))
    if place == "header":
        save_file(load_file(path), path, {"lora_adapter_metadata": header_text(config)})
    readers = " ".join(inspect.summarize_lora(path).readers)
    code, said = lora_command("verify", path, "--model", mini.TURBO)
    assert ("ComfyUI" in readers) <= (code == 0 or "ComfyUI would" not in said), (readers, said)
    assert ("diffusers" in readers) <= (code == 0 or "diffusers 0" not in said), (readers, said)
    assert "peft" not in readers or (spelling, place) == ("peft", "config")


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("modules", ["blocks", "all"])
@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya", "musubi", "diffsynth", "peft"])
def test_readers_are_those_that_read(tmp_path: Path, layout: str, modules: str, scale: float):
    """What `convert` promises of ComfyUI and diffusers is what their loaders do, module by module."""
    lora = lora_of(modules, scale)
    path = converted(write(tmp_path / "x.safetensors", lora), layout, tmp_path / "y.safetensors")
    said = lora_command("inspect", path)[1]
    promised = next(line for line in said.splitlines() if line.startswith("read by"))
    loaders = {
        "diffusers": lambda: verify.as_diffusers(path, TINY),
        "ComfyUI": lambda: verify.as_comfyui(path, TINY.linears),
    }
    for name, load in loaders.items():
        try:
            found = load()
            is_right = found.keys() == lora.keys()
            is_right = is_right and all(relative(dense(found, one), dense(lora, one)) < 1e-5 for one in lora)
        except WeightsError:
            is_right = False
        assert (name in promised) == is_right, (name, promised)


def test_mixed_ranks_without_alpha(tmp_path: Path):
    """Mixed ranks, with alpha or without, are read by the diffusers that is installed, and by none before 0.40."""
    lora = lora_of(mixed=True)
    for alpha in (True, False):
        path = write(tmp_path / "x.safetensors", lora, alpha=alpha)
        found = verify.as_diffusers(path, TINY)
        assert all(relative(dense(found, name), dense(lora, name)) < 1e-5 for name in lora)
        assert "diffusers 0.40 and newer" in inspect.summarize_lora(path).readers
    code, _ = lora_command("resize", path, "--rank", "auto", "-o", tmp_path / "y.safetensors")
    assert code == 0 and "diffusers 0.40 and newer" in inspect.summarize_lora(tmp_path / "y.safetensors").readers


MEASURED = json.loads((ROOT / "docs" / "bench" / "lora_readers.json").read_text())["diffusers"]


@pytest.mark.parametrize("case", ["plain", "scaled", "outside", "mixed", "mixedscaled"])
def test_versions_are_those_measured(case: str):
    """Every version from the promised one on has read the file whole, and the one before it has not."""
    numbers = {version: tuple(map(int, version.split("."))) for version in MEASURED}
    modules = PLAIN.modules | {"all_x_embedder.2-1"} if case == "outside" else PLAIN.modules
    for name in MEASURED["0.42.1"][case]:
        layout = name.removesuffix("_noalpha")
        has_alpha = layout == name and layout not in ("diffusers", "diffsynth")
        is_scaled = "scaled" in case
        traits = LoraTraits(
            kinds=PLAIN.kinds,
            alpha_is_rank=not is_scaled,
            has_alpha_tensors=has_alpha or (layout == "diffsynth" and is_scaled),
            scale_in=frozenset(["header" if layout == "diffusers" else "tensors"]),
            is_uniform="mixed" not in case,
            modules=modules,
        )
        promised = [reader.split()[1] for reader in readers_of(layout, traits) if reader.startswith("diffusers")]
        since = tuple(map(int, promised[0].split("."))) if promised else (9,)
        for version, number in numbers.items():
            if number >= since:
                assert MEASURED[version][case][name] == "ok", (name, version)
        older = [version for version, number in numbers.items() if number < since]
        # diffsynth with alphas is right from 0.37 on: it is promised from 0.38 on, as without them.
        if older and (name, case) != ("diffsynth", "scaled"):
            assert MEASURED[older[-1]][case][name] != "ok", (name, older[-1])


PLAIN = LoraTraits(frozenset({"LoRA"}), True, True, frozenset({"tensors"}), True, frozenset({Q}))


def test_readers_as_measured():
    """The table of what was measured: layout, contents and the programs that read them."""
    scaled = replace(PLAIN, alpha_is_rank=False)
    everywhere = replace(PLAIN, modules=frozenset({Q, "all_x_embedder.2-1"}))
    lokr, dora, loha = (replace(PLAIN, kinds=frozenset({kind})) for kind in ("LoKr", "DoRA", "LoHa"))
    old, synth = "diffusers 0.36 and newer", "DiffSynth-Studio"
    assert readers_of("comfyui", PLAIN) == ["ComfyUI", old, "AI Toolkit", synth]
    assert readers_of("comfyui", scaled) == ["ComfyUI", "diffusers 0.37 and newer", synth]
    without = replace(PLAIN, has_alpha_tensors=False, scale_in=frozenset())
    in_header = replace(without, alpha_is_rank=False, scale_in=frozenset({"header"}))
    in_config = replace(in_header, scale_in=frozenset({"config"}))
    assert readers_of("diffusers", without) == ["ComfyUI", old, "AI Toolkit"]
    assert readers_of("diffusers", in_header) == [old]
    assert readers_of("diffusers", PLAIN) == readers_of("diffusers", scaled) == ["ComfyUI"]
    assert readers_of("kohya", PLAIN) == ["ComfyUI", "diffusers 0.41 and newer"]
    assert readers_of("kohya", everywhere) == ["ComfyUI"]
    assert readers_of("musubi", PLAIN) == ["diffusers 0.39 and newer", "musubi-tuner"]
    assert readers_of("musubi", everywhere) == ["diffusers 0.39 and newer"]
    assert readers_of("diffsynth", PLAIN) == ["ComfyUI", "diffusers 0.38 and newer", synth]
    assert readers_of("comfyui", lokr) == ["ComfyUI", "diffusers 0.42 and newer"]
    assert readers_of("comfyui", dora) == readers_of("comfyui", loha) == ["ComfyUI"]
    assert readers_of("diffusers", replace(dora, has_alpha_tensors=False)) == ["diffusers 0.42 and newer"]
    assert readers_of("peft", in_config) == ["peft, from its folder"]
    assert readers_of("peft", scaled) == readers_of("peft", without) == readers_of("peft", in_header) == []
    for layout in ("comfyui", "diffusers", "diffsynth", "kohya", "musubi"):
        assert readers_of(layout, in_config) == [], "no program looks for a config beside such keys"
    assert readers_of("comfyui", in_header) == []
    assert diffusers.__version__ >= "0.42"
