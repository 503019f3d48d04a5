"""`lora convert`: every layout in, five out, there and back to the bit, and what those make of it who read them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from zimage_train import mini
from zimage_train.cli.app import app
from zimage_train.errors import WeightsError
from zimage_train.io import tensorfile
from zimage_train.lora import formats, headers, keys, lora_file, qkv, verify
from zimage_train.lora.formats import LAYOUTS
from zimage_train.lora.qkv import Change
from zimage_train.models.arch import TransformerShape

from lora_commands import converted, lora_command, metadata_of
from lora_files import TINY, Q, data_digest, dense, random_lora, relative, write

ATTENTION = [f"layers.0.attention.to_{part}" for part in "qkv"]


# Names


@pytest.mark.parametrize("module", [*TransformerShape().linears, "layers.3.attention.qkv"])
def test_modules_in_every_spelling(module: str):
    """Every module is known in each of its spellings."""
    native = keys.native_name(module)
    spellings = [f"{prefix}{name}" for prefix in (*keys.PREFIXES, "") for name in (module, native)]
    spellings += [f"{prefix}{keys.underscored(name)}" for prefix in keys.UNDERSCORED for name in (module, native)]
    for spelling in spellings:
        for suffix, part in keys.SUFFIXES.items():
            assert keys.parse_key(spelling + suffix) == (module, part)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("diffusion_model.layers.0.attention.to.q.lora_A.weight", "layers.0.attention.to_q"),
        ("layers.0.attention.to_out.lora_A.weight", "layers.0.attention.to_out.0"),
        ("lora_unet_layers_10_attention_to_out.lora_down.weight", "layers.10.attention.to_out.0"),
        ("lora_unet_context_refiner_1_feed_forward_w3.alpha", "context_refiner.1.feed_forward.w3"),
        ("lycoris_final_layer_adaLN_modulation_1.lora_up.weight", "all_final_layer.2-1.adaLN_modulation.1"),
    ],
)
def test_spellings_of_older_tools_are_known(key: str, module: str):
    parsed = keys.parse_key(key)
    assert parsed is not None and parsed[0] == module


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_layers_0_attention.lora_down.weight",
        "lora_unet_double_blocks_0.alpha",
        "layers.0.x",
        "alpha",
        "diffusion_model..lora_A.weight",
        "transformer_blocks.0.attn1.to_q.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "foo.layers.0.attention.to_q.lora_A.weight",
        f"layers.{'9' * 5000}.attention.to_q.lora_A.weight",
    ],
)
def test_other_keys_are_not(key: str):
    assert keys.parse_key(key) is None


# There and back


@pytest.mark.slow
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3, 1 / 3])
def test_there_and_back_is_the_same_file(tmp_path: Path, to: str, scale: float):
    lora = random_lora(scale=scale, targets=("attention", "feed_forward", "adaln", "refiners"))
    for source in LAYOUTS:
        start = converted(write(tmp_path / "x.safetensors", lora), source, tmp_path / f"{source}-0.safetensors")
        there = converted(start, to, tmp_path / f"{source}-{to}.safetensors")
        back = converted(there, source, tmp_path / f"{source}-{to}-back.safetensors")
        assert back.read_bytes() == start.read_bytes(), (source, to)


ranks = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)


@settings(max_examples=60, deadline=None)
@given(ranks, st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_qkv_fuse_and_split_is_identity(ranks_: list[int], seed: int, dtype: torch.dtype, zero: bool):
    """Fusing and splitting Q, K and V is the identity."""
    draw = torch.Generator().manual_seed(seed)
    changes: list[Change | None] = []
    for rank in ranks_:
        a = torch.randn(rank, 7, generator=draw).to(dtype)
        b = torch.randn(6, rank, generator=draw).to(dtype)
        if zero and rank:
            b[:, 0] = 0.0  # a direction that is not used
        changes.append({"A": a, "B": b, "alpha": torch.tensor(rank * 0.75)} if rank else None)
    whole = qkv.fuse_qkv(changes)
    expected = torch.cat([_delta(one) if one else torch.zeros(6, 7, dtype=torch.float64) for one in changes])
    assert relative(_delta(whole), expected) < 1e-12
    back = qkv.split_qkv(whole)
    assert relative(torch.cat([_delta(one) if one else expected[:6] * 0 for one in back]), expected) < 1e-12
    if not zero:
        assert [sorted(one) if one else None for one in back] == [sorted(one) if one else None for one in changes]
        pairs = [(one, other) for one, other in zip(back, changes, strict=True) if one and other]
        assert all(torch.equal(one[part], other[part]) for one, other in pairs for part in ("A", "B"))
        assert all(float(one["alpha"]) == pytest.approx(float(other["alpha"]), rel=1e-6) for one, other in pairs)


def _delta(change: Change) -> Tensor:
    return qkv.scale_of(change) * (change["B"].double() @ change["A"].double())


def test_qkv_scales_that_differ(tmp_path: Path):
    """Scales that differ between Q, K and V are multiplied into the factors."""
    lora = random_lora(scale=0.5)
    lora[ATTENTION[1]] = lora_file.Factors(lora[ATTENTION[1]].a, lora[ATTENTION[1]].b, 1 / 3)
    there = converted(write(tmp_path / "x.safetensors", lora), "kohya", tmp_path / "k.safetensors")
    found = lora_file.read_lora(there)
    assert all(relative(dense(found, module), dense(lora, module)) < 1e-7 for module in lora)


def test_qkv_with_a_shared_factor(tmp_path: Path):
    """A fused LoRA with a shared A for Q, K and V is split, and fused again at the same rank."""
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.randn(4, 96, generator=draw),
        "diffusion_model.layers.0.attention.qkv.lora_B.weight": torch.randn(288, 4, generator=draw),
        "diffusion_model.layers.0.attention.out.lora_A.weight": torch.randn(4, 96, generator=draw),
        "diffusion_model.layers.0.attention.out.lora_B.weight": torch.randn(96, 4, generator=draw),
    }  # as diffusion-pipe writes it
    save_file(tensors, tmp_path / "x.safetensors")
    found = lora_file.read_lora(tmp_path / "x.safetensors")
    assert sorted(found) == sorted([*ATTENTION, "layers.0.attention.to_out.0"])
    whole = (
        tensors["diffusion_model.layers.0.attention.qkv.lora_B.weight"] @ tensors[min(tensors).replace("out", "qkv")]
    )
    for index, module in enumerate(ATTENTION):
        assert relative(dense(found, module), whole[index * 96 : (index + 1) * 96].double()) < 1e-6
    split = converted(tmp_path / "x.safetensors", "comfyui", tmp_path / "c.safetensors")
    together = load_file(converted(split, "kohya", tmp_path / "k.safetensors"))
    assert together["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape == (4, 96)


def test_metadata_without_old_hashes(tmp_path: Path):
    """Metadata is kept, and a hash of the old file becomes that of the new."""
    tensors = load_file(write(tmp_path / "x.safetensors", random_lora(scale=0.5)))
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_dim": "4", "sshs_model_hash": "0", "note": "ä"})
    there = converted(tmp_path / "x.safetensors", "diffusers", tmp_path / "d.safetensors")
    assert set(metadata_of(there)) == {"ss_network_dim", "note", "sshs_model_hash", "lora_adapter_metadata"}
    back = converted(there, "musubi", tmp_path / "m.safetensors")
    assert metadata_of(back) == {"ss_network_dim": "4", "note": "ä", "sshs_model_hash": data_digest(back)}


def test_a_precision_can_be_asked_for(tmp_path: Path):
    path = write(tmp_path / "x.safetensors", random_lora())
    code, _ = lora_command("convert", path, "--to", "comfyui", "--dtype", "bf16", "-o", tmp_path / "b.safetensors")
    kinds = {key.rpartition(".")[2]: tensor.dtype for key, tensor in load_file(tmp_path / "b.safetensors").items()}
    assert code == 0 and kinds == {"weight": torch.bfloat16, "alpha": torch.float32}


@pytest.mark.parametrize("to", LAYOUTS)
def test_files_of_other_tools_round_trip(tmp_path: Path, to: str):
    """Files of other tools come back tensor for tensor.

    They have no alpha, ranks that differ between Q, K and V, and columns and whole factors that are zero.
    """
    draw = torch.Generator().manual_seed(7)
    widths = dict(zip(ATTENTION, (2, 4, 3), strict=True)) | {"layers.1.attention.to_q": 2, "layers.1.attention.to_k": 4}
    lora = {
        m: lora_file.Factors(torch.randn(r, 96, generator=draw), torch.randn(96, r, generator=draw), 1.0)
        for m, r in widths.items()
    }
    lora[ATTENTION[1]].b[:, 0] = 0.0
    lora["layers.1.attention.to_k"].b.zero_()
    for alpha in (False, True):
        start = write(tmp_path / f"{alpha}.safetensors", lora, alpha=alpha)
        there = converted(start, to, tmp_path / f"{alpha}-{to}.safetensors")
        back = load_file(converted(there, "comfyui", tmp_path / f"{alpha}-{to}-back.safetensors"))
        expected = load_file(start) | (
            {} if alpha else {f"diffusion_model.{m}.alpha": torch.tensor(float(r)) for m, r in widths.items()}
        )
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[key], expected[key]) for key in expected)


def test_alpha_is_left_out_again(tmp_path: Path):
    """Converting back to a layout without alpha leaves alpha out again."""
    start = write(tmp_path / "x.safetensors", random_lora(), "lora_unet_{m}.lora_{p}.weight", alpha=False)
    tensors = {key.replace("_A.", "_down.").replace("_B.", "_up."): t for key, t in load_file(start).items()}
    spelled = {
        keys.underscored(key.split(".lora")[0]) + ".lora" + key.split(".lora")[1]: t for key, t in tensors.items()
    }
    save_file(spelled, start)
    back = load_file(
        converted(converted(start, "comfyui", tmp_path / "c.safetensors"), "musubi", tmp_path / "m.safetensors")
    )
    factors = {key: tensor for key, tensor in back.items() if not key.endswith(".alpha")}
    assert factors.keys() == spelled.keys() and all(torch.equal(factors[key], spelled[key]) for key in spelled)


def test_layouts_of_a_hint_can_be_had(tmp_path: Path):
    """Each layout that a refusal names can hold the file, whatever is in it."""
    dora = next(change for kind, change, _ in kinds() if kind == "DoRA")
    lokr = next(change for kind, change, _ in kinds() if kind == "LoKr")
    per_input = {**dora, "magnitude": torch.ones(1, 96)}
    for number, (changes, target) in enumerate(
        [
            ({Q: dora}, "kohya"),
            ({Q: dora}, "musubi"),
            ({Q: per_input}, "diffusers"),
            ({Q: per_input}, "peft"),
            ({Q: lokr}, "kohya"),
            ({Q: lokr, "layers.1.attention.to_q": dora}, "diffusers"),
        ]
    ):
        tensors = {}
        for name, change in changes.items():
            for part, tensor in change.items():
                spelt = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "dora_scale"}.get(part, part)
                tensors[f"diffusion_model.{name}.{spelt}"] = tensor
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        output = tmp_path / (f"{number} folder" if target == "peft" else f"{number} out.safetensors")
        code, said = lora_command("convert", path, "--to", target, "-o", output)
        assert code == 4, said
        named = re.findall(r"--to (\w+)", said)
        assert named and target not in named
        for name in named:
            converted(path, name, tmp_path / f"{number} {name}.safetensors")


def test_dora_fused_keeps_magnitudes(tmp_path: Path):
    """A fused DoRA keeps its magnitudes where a factor is zero."""
    dora, _ = next((change, delta) for kind, change, delta in kinds() if kind == "DoRA")
    three = [dict(dora), dora | {"B": torch.zeros_like(dora["B"])}, dict(dora)]
    foreign = {f"lora_unet_layers_0_attention_qkv.{name}": t for name, t in (
        ("lora_down.weight", torch.cat([one["A"] for one in three[:2]])),
        ("lora_up.weight", torch.block_diag(three[0]["B"], three[1]["B"], torch.zeros(96, 0))),
        ("dora_scale", torch.cat([one["magnitude"] for one in three]).reshape(-1, 1)),
    )}  # fmt: skip
    save_file(foreign, tmp_path / "x.safetensors")
    found = lora_file.read_changes(tmp_path / "x.safetensors").changes
    assert sorted(found) == sorted(ATTENTION)
    assert all(torch.equal(found[m]["magnitude"], dora["magnitude"]) for m in ATTENTION)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c[1].update({"B": torch.ones(48, 4)}), "has q, k and v of different shapes"),
        (lambda c: c[1].update({"A": torch.ones(4, 64)}), "has q, k and v of different shapes"),
        (lambda c: c[1].update({"magnitude": torch.ones(1, 96)}), "has changes of several kinds for q, k and v"),
    ],
)
def test_qkv_without_a_fused_form(tmp_path: Path, spoil, said: str):
    """Q, K and V that have no fused form are refused."""
    draw = torch.Generator().manual_seed(0)
    three = [{"A": torch.randn(4, 96, generator=draw), "B": torch.randn(96, 4, generator=draw)} for _ in "qkv"]
    spoil(three)
    path = write_changes(tmp_path / "x.safetensors", dict(zip(ATTENTION, three, strict=True)))
    code, output = lora_command("convert", path, "--to", "kohya", "-o", tmp_path / "y.safetensors")
    assert code == 4 and said in output


@pytest.mark.parametrize("alpha", [0.0, -4.0, 1e9])
def test_alpha_beyond_the_header(tmp_path: Path, alpha: float):
    """An alpha that the header of a layout cannot store is refused for that layout."""
    path = write(tmp_path / "x.safetensors", random_lora(4, alpha / 4))
    code, said = lora_command("convert", path, "--to", "diffusers", "-o", tmp_path / "y.safetensors")
    assert code == 4 and "which the layout diffusers cannot store" in said
    assert lora_command("convert", path, "--to", "kohya", "-o", tmp_path / "z.safetensors")[0] == 0


def test_fp8_becomes_16_bits(tmp_path: Path):
    """Eight-bit values become sixteen-bit values, which hold them exactly."""
    lora = random_lora(2)
    tensors = {
        key: t.to(torch.float8_e4m3fn) if t.dim() else t
        for key, t in load_file(write(tmp_path / "x.safetensors", lora)).items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    for to in LAYOUTS:
        found = lora_file.read_lora(converted(tmp_path / "x.safetensors", to, tmp_path / f"{to}.safetensors"))
        for module, one in found.items():
            assert torch.equal(one.a.float(), tensors[f"diffusion_model.{module}.lora_A.weight"].float())


# Who reads what


@pytest.mark.parametrize("to", LAYOUTS)
def test_layouts_load_in_their_programs(tmp_path: Path, to: str):
    """diffusers reads all layouts, and ComfyUI those that say so."""
    lora = random_lora(scale=0.5)
    path = converted(write(tmp_path / "x.safetensors", lora), to, tmp_path / "y.safetensors")
    if to == "peft":  # for peft itself, see test_adapter_config.py
        with pytest.raises(WeightsError, match=r"would not load it|would load 0 of"):
            verify.verify_export(path, lora, "fp32", TINY)
        return
    read = verify.as_diffusers(path, TINY)
    assert all(relative(dense(read, module), dense(lora, module)) < 1e-6 for module in lora)
    try:
        read = verify.as_comfyui(path, TINY.linears)
        is_right = all(relative(dense(read, module), dense(lora, module)) < 1e-6 for module in lora)
    except WeightsError:
        is_right = False
    assert is_right is (to in ("comfyui", "kohya", "diffsynth"))


def test_diffusers_layout_in_comfyui(tmp_path: Path):
    """The diffusers layout of plain alphas needs no header, and ComfyUI reads it, too."""
    lora = random_lora()
    path = converted(write(tmp_path / "x.safetensors", lora), "diffusers", tmp_path / "y.safetensors")
    assert metadata_of(path) == {"zimage_train.converted": '{"alpha": true}'}  # there was an alpha, for the way back
    assert verify.verify_export(path, lora, "fp32", TINY) < 1e-6


@pytest.mark.parametrize(
    ("to", "code"), [("comfyui", 0), ("diffusers", 0), ("kohya", 0), ("diffsynth", 0), ("musubi", 4)]
)
def test_verify_layouts_not_of_comfyui(tmp_path: Path, to: str, code: int):
    """`verify` fails for layouts that ComfyUI does not read."""
    path = converted(mini.ADAPTER_V1, to, tmp_path / "x.safetensors")
    assert lora_command("verify", path, "--model", mini.TURBO)[0] == code


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_model_computes_the_same(tmp_path: Path, to: str):
    """A model of diffusers with the file computes the change that the factors give.

    The file is loaded by peft, so this proves the strength of each module, and not only its keys.
    """
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    lora = lora_file.read_lora(mini.ADAPTER_V1)
    ranked = {m: lora_file.Factors(f.a.float(), f.b.float(), 2.5 if "layers.1." in m else 0.5) for m, f in lora.items()}
    path = converted(write(tmp_path / "x.safetensors", ranked), to, tmp_path / "y.safetensors")
    model = ZImageTransformer2DModel.from_pretrained(mini.TURBO / "transformer", dtype=torch.float32)
    state, metadata = ZImagePipeline.lora_state_dict(path, return_lora_metadata=True)
    ZImagePipeline.load_lora_into_transformer(state, model, adapter_name="x", metadata=metadata)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A}
    assert layers.keys() == lora.keys()
    for name, layer in layers.items():
        assert relative(layer.get_delta_weight("x").detach().double(), _dense_of(ranked[name])) < 1e-6, name


def _dense_of(factors: lora_file.Factors) -> Tensor:
    return factors.scale * (factors.b.double() @ factors.a.double())


# Other kinds


def kinds() -> Iterator[tuple[str, Change, Tensor]]:
    """A change of each kind for a weight (96, 96), and what it adds in float64 as ComfyUI and LyCORIS compute it."""
    draw = torch.Generator().manual_seed(3)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    loha = {"hada_w1_a": r(96, 4), "hada_w1_b": r(4, 96), "hada_w2_a": r(96, 4), "hada_w2_b": r(4, 96)}
    product = (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"])
    yield "LoHa", loha | {"alpha": torch.tensor(2.0)}, product.double() * 0.5
    lokr = {"lokr_w1": r(6, 6), "lokr_w2_a": r(16, 4), "lokr_w2_b": r(4, 16)}
    product = torch.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"])
    yield "LoKr", lokr | {"alpha": torch.tensor(1.0)}, product.double() * 0.25
    dora = {"A": r(4, 96), "B": r(96, 4), "alpha": torch.tensor(4.0), "magnitude": r(96).abs()}
    yield "DoRA", dora, (dora["B"] @ dora["A"]).double()
    oft = {"oft_blocks": r(12, 8, 8)}
    yield "OFT", oft, torch.zeros(96, 96).double()


def write_changes(path: Path, changes: dict[str, Change], to: str = "comfyui") -> Path:
    tensors, metadata = formats.to_layout(path, changes, {}, to)
    tensorfile.save(path, tensors, metadata)
    return path


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, change, _ in kinds()])
def test_other_kinds_round_trip(tmp_path: Path, kind: str, change: Change):
    """Other kinds of LoRA are converted to the layouts that can hold them, and back."""
    changes: dict[str, Change] = {name: dict(change) for name in (*ATTENTION, "layers.0.attention.to_out.0")}
    start = write_changes(tmp_path / "x.safetensors", changes)
    for to, layout in LAYOUTS.items():
        output = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        code, said = lora_command("convert", start, "--to", to, "-o", output)
        if kind not in layout.kinds:
            assert code == 4 and f"is a {kind}, which the layout {to} cannot hold; --to " in said
        elif kind == "LoKr" and to == "kohya":
            assert code == 4 and "is a Kronecker product, and three of those have no fused form" in said
        else:
            assert code == 0, said
            back = converted(output, "comfyui", tmp_path / f"{to}-back.safetensors")
            assert back.read_bytes() == start.read_bytes(), to
    for command in (["verify"], ["inspect"], ["weight", "--scale", "attention=0.5", "-o", tmp_path / "w.safetensors"]):
        code, said = lora_command(command[0], start, *command[1:])
        if command[0] != "weight":
            size = {"LoKr": "LoKr 6x6 of rank 4", "LoHa": "LoHa 4", "DoRA": "DoRA 4", "OFT": "OFT 8"}[kind]
            assert code == 0 and f"{size} (4 modules)" in said
            continue
        assert code == 4 and f"is a {kind} (4 modules, such as {min(changes)}), and this takes a LoRA" in said
        assert f"zimage-train lora {'bake' if kind in ('DoRA', 'OFT') else 'resize FILE --rank auto -o OUT'}" in said


def test_a_fused_loha_is_its_three(tmp_path: Path):
    loha, _ = next((change, delta) for kind, change, delta in kinds() if kind == "LoHa")
    draw = torch.Generator().manual_seed(4)
    three = [
        {p: t if p == "alpha" else t + torch.randn(t.shape, generator=draw) for p, t in loha.items()} for _ in "qkv"
    ]
    whole = qkv.fuse_qkv(three)

    def delta(one: Change) -> Tensor:
        first, second = (one[f"hada_w{i}_a"].double() @ one[f"hada_w{i}_b"].double() for i in (1, 2))
        return qkv.scale_of(one) * first * second

    assert relative(delta(whole), torch.cat([delta(one) for one in three])) < 1e-12
    assert all(
        torch.equal(one[p], other[p]) for one, other in zip(qkv.split_qkv(whole), three, strict=True) for p in one
    )


def test_a_fused_oft_is_its_three():
    """Without one of the three its groups do not turn; what cannot be fused says why."""
    q, k = ({"oft_blocks": torch.randn(12, 8, 8), "alpha": torch.tensor(0.0)} for _ in "qk")
    whole = qkv.fuse_qkv([q, k, None])
    assert torch.equal(whole["oft_blocks"], torch.cat([q["oft_blocks"], k["oft_blocks"], torch.zeros(12, 8, 8)]))
    for third, change in zip(qkv.split_qkv(whole), (q, k), strict=False):
        assert third is not None and torch.equal(third["oft_blocks"], change["oft_blocks"])
    larger = {"oft_blocks": torch.randn(6, 16, 16)}
    for others, why in (([q, larger, q], "groups of different sizes"), ([q | {"alpha": torch.ones(())}] * 3, "")):
        with pytest.raises(qkv.CannotFuseError, match=f"is an OFT with {why}"):
            qkv.fuse_qkv(others)
    with pytest.raises(qkv.CannotFuseError, match="a constraint on q, k and v together"):
        qkv.split_qkv(whole | {"alpha": torch.tensor(0.5)})


def test_lokr_is_split_into_thirds(tmp_path: Path):
    """A fused LoKr is split if its first factor has three groups of rows."""
    draw = torch.Generator().manual_seed(5)
    w1, w2 = torch.randn(6, 6, generator=draw), torch.randn(48, 16, generator=draw)
    name = "lycoris_layers_0_attention_qkv"
    save_file({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path / "x.safetensors")
    found = lora_file.read_changes(tmp_path / "x.safetensors").changes
    thirds = [torch.kron(found[module]["lokr_w1"], found[module]["lokr_w2"]) for module in ATTENTION]
    assert torch.equal(torch.cat(thirds), torch.kron(w1, w2))
    save_file({f"{name}.lokr_w1": w1[:4].contiguous(), f"{name}.lokr_w2": w2}, tmp_path / "y.safetensors")
    with pytest.raises(WeightsError, match="Kronecker product with 4 rows in its first factor, not 3 groups"):
        lora_file.read_changes(tmp_path / "y.safetensors")


@pytest.mark.slow
def test_dora_in_diffusers(tmp_path: Path):
    """A DoRA computes the same in diffusers as peft's formula: magnitude * (W + delta) / ||W + delta|| of each row."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    dora, delta = next((change, delta) for kind, change, delta in kinds() if kind == "DoRA")
    path = write_changes(tmp_path / "x.safetensors", {Q: dora}, "diffusers")
    model = ZImageTransformer2DModel.from_pretrained(mini.TURBO / "transformer", dtype=torch.float32)
    weight = model.get_submodule(Q).weight.detach().clone()
    state, metadata = ZImagePipeline.lora_state_dict(path, return_lora_metadata=True)
    ZImagePipeline.load_lora_into_transformer(state, model, adapter_name="x", metadata=metadata)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(6))
    moved = weight.double() + delta
    expected = x.double() @ (dora["magnitude"].double()[:, None] * moved / moved.norm(dim=1, keepdim=True)).T
    assert relative(model.get_submodule(Q)(x).detach().double(), expected) < 1e-5


@pytest.mark.slow
def test_lokr_in_diffusers(tmp_path: Path):
    """A LoKr computes the same in diffusers."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    lokr, delta = next((change, delta) for kind, change, delta in kinds() if kind == "LoKr")
    path = write_changes(tmp_path / "x.safetensors", {Q: lokr})
    model = ZImageTransformer2DModel.from_pretrained(mini.TURBO / "transformer", dtype=torch.float32)
    weight = model.get_submodule(Q).weight.detach().clone()
    state, metadata = ZImagePipeline.lora_state_dict(path, return_lora_metadata=True)
    ZImagePipeline.load_lora_into_transformer(state, model, adapter_name="x", metadata=metadata)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(6))
    assert relative(model.get_submodule(Q)(x).detach().double(), x.double() @ (weight.double() + delta).T) < 1e-5


# Bad files


def spoiled() -> Iterator[tuple[str, dict[str, Tensor] | bytes, str]]:
    a, b = (f"diffusion_model.{Q}.lora_{part}.weight" for part in "AB")
    good = {a: torch.ones(2, 96), b: torch.ones(96, 2)}
    whole = {a.replace("to_q", "qkv"): torch.ones(2, 96), b.replace("to_q", "qkv"): torch.ones(288, 2)}
    misfit = "has 1 modules whose A, B or alpha are missing or do not fit"
    yield "nan", good | {b: torch.full((96, 2), float("nan"))}, "holds values that are not finite"
    yield "inf", good | {a: torch.full((2, 96), float("inf"))}, "holds values that are not finite"
    yield "ranks", good | {b: torch.ones(96, 3)}, misfit
    yield "no b", {a: good[a]}, misfit
    yield "alphas", good | {f"diffusion_model.{Q}.alpha": torch.ones(2)}, misfit
    yield "no thirds", whole | {b.replace("to_q", "qkv"): torch.ones(97, 2)}, misfit
    yield "fused and split", good | whole, "tensors twice"
    yield "sdxl", {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, "SDXL LoRA"
    yield "mixed", good | {"transformer.single_transformer_blocks.0.attn.to_q.lora_A": torch.ones(2)}, "FLUX LoRA"
    yield "ints", good | {a: torch.ones(2, 96, dtype=torch.int32)}, "holds int32"
    yield (
        "text encoder",
        good | {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)},
        "has a LoRA of the text encoder: 1 keys",
    )
    sizes = {"hada_w1_a": (96, 2), "hada_w1_b": (2, 96), "hada_w2_a": (96, 4), "hada_w2_b": (4, 96)}
    yield "loha ranks", {f"diffusion_model.{Q}.{name}": torch.ones(size) for name, size in sizes.items()}, misfit
    blocks = f"diffusion_model.{Q}.oft_blocks"
    yield "oft not square", {blocks: torch.ones(12, 8, 4)}, misfit
    yield "fused oft", {blocks.replace("to_q", "qkv"): torch.ones(4, 72, 72)}, misfit
    yield (
        "oft of others",
        {blocks.replace("blocks", "diag"): torch.ones(12, 8)},
        "an OFT that is not LyCORIS's diag-oft",
    )
    yield (
        "oft rescaled",
        {blocks: torch.ones(12, 8, 8), f"diffusion_model.{Q}.rescale": torch.ones(96, 1)},
        "an OFT that",
    )
    header = b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"
    yield "nested", len(header).to_bytes(8, "little") + header, "is not a safetensors file, or damaged"
    yield "pickle", b"PK\x03\x04" + b"0" * 100, "is a pickle, which can run code and is never opened"
    yield "empty", b"", "is empty"
    yield "nothing", {}, "holds no LoRA"


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "said"), [case[1:] for case in spoiled()], ids=[case[0] for case in spoiled()])
def test_bad_files_in_every_command(tmp_path: Path, tensors, said: str):
    """Each bad file is an error of a single line with exit code 4, in every command."""
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(tensors) if isinstance(tensors, bytes) else save_file(tensors, path)
    for command in (
        ["verify", path],
        ["inspect", path],
        ["diff", path, path],
        ["convert", path, "--to", "comfyui", "-o", out],
        ["convert", path, "--to", "kohya", "-o", out],
        ["weight", path, "--scale", "layers=0.5", "-o", out],
        ["weight", path, "--scale", "layers=0.5", "--dry-run"],
        ["merge", f"{path}=0.5", f"{mini.ADAPTER_V1}=1", "-o", out],
        ["resize", path, "--rank", "1", "-o", out],
        ["ema", path, mini.ADAPTER_V1, "-o", out],
        ["bake", mini.TURBO, "--lora", path, "--to", "comfyui", "-o", out],
    ):
        done = CliRunner().invoke(app, ["lora", *map(str, command)])
        error = done.exception
        assert getattr(error, "exit_code", None) == 4, (command, done.output, error)
        lines = str(error).splitlines()
        assert said in lines[0] and len({line for line in lines if str(path) in line}) == 1, (command, lines)
        assert not out.exists()


def test_truncated_file(tmp_path: Path):
    """A file that was cut off is refused, wherever it was cut."""
    whole = write(tmp_path / "x.safetensors", random_lora()).read_bytes()
    for length in (1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        code, said = lora_command(
            "convert", tmp_path / "x.safetensors", "--to", "kohya", "-o", tmp_path / "y.safetensors"
        )
        assert code == 4 and len(said.strip().splitlines()) == 1


def test_header_sizes_equal_the_tensors(tmp_path: Path):
    """The sizes from the header are those of the tensors."""
    lora = random_lora()
    for to in LAYOUTS:
        path = converted(write(tmp_path / "x.safetensors", lora), to, tmp_path / f"{to}.safetensors")
        found = lora_file.read_lora(path)
        assert headers.read_sizes(path) == {module: (f.b.shape[0], f.a.shape[1]) for module, f in found.items()}


def test_null_metadata_and_odd_paths(tmp_path: Path):
    """Metadata that is null counts as none, and odd paths are named."""
    content = write(tmp_path / "x.safetensors", random_lora()).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = b'{"__metadata__":null,' + content[9 : 8 + length].lstrip(b"{")
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert lora_command("inspect", tmp_path / "x.safetensors")[0] == 0
    assert "is a folder without adapter_model.safetensors" in lora_command("inspect", tmp_path)[1]
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in lora_command("inspect", tmp_path / "pipe")[1]
    save_file({"a\nb\x1b[31m.lora_A.weight": torch.ones(2, 2)}, tmp_path / "y.safetensors")
    code, said = lora_command("inspect", tmp_path / "y.safetensors")
    assert code == 4 and "\x1b" not in said and "\\x1b[31m" in said


def test_broken_link_exists(tmp_path: Path):
    """A broken link at the output path counts as an existing file."""
    path = write(tmp_path / "x.safetensors", random_lora())
    (tmp_path / "y.safetensors").symlink_to(tmp_path / "gone")
    code, said = lora_command("convert", path, "--to", "kohya", "-o", tmp_path / "y.safetensors")
    assert code == 2 and "exists; give another name, or --force" in said
