"""`lora weight`, `merge`, `resize`, `ema`, `diff`, `extract`, `bake`: against dense float64 arithmetic."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_train import mini
from zimage_train.lora import arithmetic, blending, lora_file, scale_rules
from zimage_train.lora.deltas import Factors, Lora
from zimage_train.models import locate, transformer
from zimage_train.models.arch import TransformerShape

from lora_commands import converted, lora_command, metadata_of
from lora_files import TINY, Q, dense, random_lora, relative, write

FULL = [name for name in TransformerShape().linears if ".refiner" not in name and name.startswith("layers.")]
WEIGHTS = st.floats(-2, 2, allow_subnormal=False).filter(lambda one: one == 0 or abs(one) > 1e-3)


def factors_of(texts: list[str]) -> dict[str, float]:
    """Of the 240 modules of the 6 B model."""
    return scale_rules.module_weights(scale_rules.parse_rules(texts), FULL)


# Rules


@pytest.mark.parametrize(
    ("texts", "module", "factor"),
    [
        (["layers.0-9=0.5"], "layers.9.attention.to_q", 0.5),
        (["layers.0-9=0.5"], "layers.10.attention.to_q", 1.0),
        (["attention.to_{q,k,v}=0.8"], "layers.3.attention.to_v", 0.8),
        (["attention.to_{q,k,v}=0.8"], "layers.3.attention.to_out.0", 1.0),
        (["layers.0-9=0.5", "attention.to_{q,k,v}=0.8"], "layers.3.attention.to_v", 0.4),
        (["attention.to_{q,k,v}=0.8", "layers.0-9=0.5"], "layers.3.attention.to_v", 0.4),
        (["adaln=0", "layers.0-9=0.5"], "layers.3.adaLN_modulation.0", 0.0),
        (["to_q=0.5", "attention=2"], "layers.3.attention.to_q", 2.0),
        (["attention=2", "to_q=0.5"], "layers.3.attention.to_q", 0.5),
        (["layers=2", "layers.3-5=0.5", "layers.5=3"], "layers.5.feed_forward.w1", 3.0),
        (["layers=2", "w1=3", "layers.5.w1=0.5"], "layers.5.feed_forward.w1", 3.0),
        (["likeness=-1.5"], "layers.0.feed_forward.w2", -1.5),
        (["likeness=-1.5"], "layers.0.attention.to_q", 1.0),
        (["layers=linear_in"], "layers.0.attention.to_q", 0.0),
        (["layers=linear_in"], "layers.29.attention.to_q", 1.0),
        (["layers=2*linear_out"], "layers.0.attention.to_q", 2.0),
        (["layers.10-20=linear_out"], "layers.15.attention.to_q", 0.5),
        (["layers.10-20=linear_out"], "layers.9.attention.to_q", 1.0),
        (["layers=bell"], "layers.0.attention.to_q", 0.05233595624294383),
        (["layers.0-2=bell"], "layers.1.attention.to_q", 1.0),
    ],
)
def test_rules_replace_or_multiply(texts: list[str], module: str, factor: float):
    """Rules of the same list replace each other; those of several lists multiply."""
    assert factors_of(texts)[module] == pytest.approx(factor, abs=1e-15)


def test_selector_names_its_modules():
    """A selector names exactly its modules."""
    touched = {module for module, factor in factors_of(["layers.0,3-4.feed_forward.w{1,3}=0"]).items() if factor == 0}
    assert touched == {f"layers.{i}.feed_forward.w{j}" for i in (0, 3, 4) for j in (1, 3)}
    for name, count in (("prompt_adherence", 90), ("clothing", 90), ("colour_light", 60), ("background", 90)):
        assert sum(factor == 0 for factor in factors_of([f"{name}=0"]).values()) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers", "has no factor"),
        ("=1", "names no module"),
        ("0.5", "all=0.5"),
        ("layers.9-2=1", "9-2 runs backwards; write 2-9"),
        ("adalnn=1", "did you mean adaln?"),
        ("layers.99999=1", "is neither a block nor a component"),
        ("layers=x", "is neither a number from -100 to 100 nor one of linear_in, linear_out, bell"),
        ("layers=nan", "is neither a number"),
        ("layers=1000", "is neither a number"),
        ("layer.0=1", "'layer.0' is neither a block nor a component"),
        ("attention.w1=1", "'attention.w1' is neither a block nor a component"),
        ("to_{q,x}=1", "is neither a block nor a component"),
        ("adaln=bell", "is a curve over no layers; write layers=bell"),
    ],
)
def test_invalid_rule_is_refused(tmp_path: Path, text: str, said: str):
    """An invalid rule is refused, with the names that exist."""
    path = write(tmp_path / "x.safetensors", random_lora())
    code, output = lora_command("weight", path, "--scale", text, "--dry-run")
    assert code == 2 and f"--scale {text}: " in output and said in output


def test_dry_run_of_weight(tmp_path: Path):
    """A dry run shows thirty rows and eight columns, and writes nothing."""
    draw = torch.Generator().manual_seed(0)
    lora = {m: Factors(torch.randn(1, 3, generator=draw), torch.randn(2, 1, generator=draw), 1.0) for m in FULL}
    path = write(tmp_path / "x.safetensors", lora)
    texts = ["layers.0-9=0.5", "attention.to_{q,k,v}=0.8", "adaln=0"]
    code, output = lora_command("weight", path, "--dry-run", *(word for text in texts for word in ("--scale", text)))
    lines = [line.split() for line in output.splitlines()]
    assert code == 0 and lines[0] == ["to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3", "adaLN"]
    rows = [["0.4"] * 3 + ["0.5"] * 4 + ["0"]] * 10 + [["0.8"] * 3 + ["1"] * 4 + ["0"]] * 20
    assert lines[1:] == [[f"layers.{index}", *row] for index, row in enumerate(rows)]
    assert list(tmp_path.iterdir()) == [path]


def test_weights_scale_modules(tmp_path: Path):
    """Weights scale each module, and zero leaves it out."""
    lora = random_lora(scale=0.3, targets=("attention", "feed_forward", "adaln"))
    path, out = write(tmp_path / "x.safetensors", lora), tmp_path / "y.safetensors"
    code, output = lora_command("weight", path, "--scale", "layers.1=-0.5", "--scale", "adaln=0", "-o", out)
    assert code == 0 and "2 modules have factor 0 and are left out" in output
    found = lora_file.read_lora(out)
    assert found.keys() == {module for module in lora if "adaLN" not in module}
    for module in found:
        factor = -0.5 if module.startswith("layers.1.") else 1.0
        assert relative(dense(found, module), factor * dense(lora, module)) < 1e-6
    assert {float(t) for key, t in load_file(out).items() if key.endswith(".alpha")} == {4.0}


def test_rules_without_modules(tmp_path: Path):
    """Rules that name no module are mentioned; it is an error if none of them names any."""
    path, out = write(tmp_path / "x.safetensors", random_lora()), tmp_path / "y.safetensors"
    code, output = lora_command("weight", path, "--scale", "layers=0.5", "--scale", "adaln=0", "-o", out)
    assert code == 0 and "note: adaln=0 names nothing in" in output
    code, output = lora_command("weight", path, "--scale", "adaln=0", "-o", tmp_path / "z.safetensors")
    assert code == 2 and "no rule names any of its 14 modules; it has layers.0 to layers.1, to_q" in output
    code, output = lora_command("weight", path, "--scale", "layers=0", "-o", tmp_path / "z.safetensors")
    assert code == 2 and "every factor is 0" in output


# Sums


loras = st.builds(
    lambda rank, scale, seed, gone: {m: f for m, f in random_lora(rank, scale, seed).items() if m not in gone},
    st.integers(1, 6),
    st.sampled_from([1.0, 0.5, 1 / 3, 4.0]),
    st.integers(0, 1000),
    st.sets(st.sampled_from(sorted(random_lora())), max_size=5),
)


def total(parts: list[tuple[Lora, float]], module: str) -> Tensor:
    return sum((weight * dense(lora, module) for lora, weight in parts), torch.zeros(TINY.linears[module]).double())


def close(found: Lora, expected: list[tuple[Lora, float]], tolerance: float) -> bool:
    """Whether the changes agree, as a share of the sum of the sizes of all that went in."""
    sizes = {m: sum(abs(w) * float(dense(one, m).norm()) for one, w in expected) for m in TINY.linears}
    return all(
        float((dense(found, m) - total(expected, m)).norm()) <= tolerance * size + 1e-30 for m, size in sizes.items()
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(loras, WEIGHTS), min_size=1, max_size=4))
def test_merge_is_the_weighted_sum(parts: list[tuple[Lora, float]]):
    """A merge is the weighted sum of all changes."""
    merged = arithmetic.sum_deltas(parts)
    assert close(merged, parts, 1e-6)
    assert merged.keys() == {module for lora, weight in parts if weight for module in lora}
    for module, one in merged.items():
        assert one.rank == sum(lora[module].rank for lora, weight in parts if weight and module in lora)


@settings(max_examples=15, deadline=None)
@given(loras, loras, WEIGHTS.filter(bool), WEIGHTS.filter(bool))
def test_a_merge_is_linear_in_the_ratios(one: Lora, other: Lora, a: float, b: float):
    twice = arithmetic.sum_deltas([(one, 2 * a), (other, 2 * b)])
    assert close(twice, [(arithmetic.sum_deltas([(one, a), (other, b)]), 2.0)], 1e-6)
    both = arithmetic.sum_deltas([(one, a), (one, b)])
    for m in one:
        rounding = 1e-6 * (abs(a) + abs(b)) * float(dense(one, m).norm())
        assert float((dense(both, m) - (a + b) * dense(one, m)).norm()) <= rounding


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(loras, WEIGHTS.filter(bool)), min_size=1, max_size=3))
def test_a_full_rank_svd_is_the_sum(parts: list[tuple[Lora, float]]):
    merged = arithmetic.sum_deltas(parts)
    full: Lora = {}
    for module, one in merged.items():
        full[module], kept, whole = arithmetic.reduce_rank(one, one.rank, 1.0)
        assert kept == pytest.approx(whole) and whole == pytest.approx(float(dense(merged, module).square().sum()))
    assert close(full, [(merged, 1.0)], 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.floats(0.1, 0.999))
def test_resize_is_the_best_of_its_rank(seed: int, rank: int, energy: float):
    """A lower rank is the best approximation; `auto` is the lowest rank that keeps enough."""
    one = random_lora(8, 0.7, seed)[Q]
    values = torch.linalg.svdvals(dense({Q: one}, Q)).square()
    small, kept, whole = arithmetic.reduce_rank(one, rank, 1.0)
    assert kept == pytest.approx(float(values[:rank].sum()), rel=1e-6) and whole == pytest.approx(float(values.sum()))
    lost = float((dense({Q: small}, Q) - dense({Q: one}, Q)).square().sum())
    assert lost == pytest.approx(float(values[rank:].sum()), rel=1e-4, abs=1e-6 * whole)
    auto, kept, _ = arithmetic.reduce_rank(one, None, energy)
    assert kept >= energy * whole * (1 - 1e-9)
    assert auto.rank == 1 or float(values[: auto.rank - 1].sum()) < energy * whole * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(96, 40), (700, 600), (600, 1400)])
@pytest.mark.parametrize("rank", [3, 8, None])
def test_factorize_is_optimal(shape: tuple[int, int], rank: int | None):
    """Factors of a dense change keep the most energy for their rank, and are the same each time."""
    draw = torch.Generator().manual_seed(1)
    change = torch.randn(shape[0], 8, generator=draw) @ torch.randn(8, shape[1], generator=draw)
    change += 0.02 * torch.randn(shape, generator=draw)  # a tail, as real differences have
    values = torch.linalg.svdvals(change.double()).square()
    found, kept, whole = arithmetic.factorize(change, rank, 0.95, "x")
    assert whole == pytest.approx(float(values.sum()), rel=1e-5)
    assert kept == pytest.approx(float(values[: found.rank].sum()), rel=1e-4)
    least = int((values.cumsum(0) < 0.95 * values.sum()).sum()) + 1
    assert found.rank == (rank or least)
    again, _, _ = arithmetic.factorize(change, rank, 0.95, "x")
    assert torch.equal(again.a, found.a) and torch.equal(again.b, found.b)


def test_merge_of_other_layouts(tmp_path: Path):
    """Merging files of other tools is exact, and writes the same bytes each time."""
    one, other = random_lora(4, 0.5, 1), random_lora(3, 4.0, 2, ("attention", "adaln"))
    first = converted(write(tmp_path / "a.safetensors", one), "kohya", tmp_path / "k.safetensors")
    second = converted(write(tmp_path / "b.safetensors", other), "diffusers", tmp_path / "d.safetensors")
    out = [tmp_path / f"{name}.safetensors" for name in ("m", "n")]
    for path in out:
        code, said = lora_command("merge", f"{first}=0.8", f"{second}=-0.6", "--scale", "2:adaln=0.5", "-o", path)
        assert code == 0, said
    merged = lora_file.read_lora(out[0])
    halved = {m: Factors(f.a, f.b, f.scale * (0.5 if "adaLN" in m else 1.0)) for m, f in other.items()}
    assert close(merged, [(one, 0.8), (halved, -0.6)], 1e-6)
    assert merged.keys() == one.keys() | other.keys()
    assert out[0].read_bytes() == out[1].read_bytes()
    said = json.loads(metadata_of(out[0])["zimage_train.merge"])
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    assert [one["sha256"] for one in said["from"]] == digests
    assert [one["ratio"] for one in said["from"]] == [0.8, -0.6]
    assert [one["scale"] for one in said["from"]] == [[], ["adaln=0.5"]]


def test_merge_auto_dtype(tmp_path: Path):
    """`auto` writes bf16 where that is exact, and the cost of rounding is reported."""
    lora = {m: Factors(f.a.bfloat16(), f.b.bfloat16(), 1.0) for m, f in random_lora().items()}
    path = write(tmp_path / "x.safetensors", lora)
    for ratio, options, kind, words in (
        ("0.5", [], torch.bfloat16, "in bf16, which is exact"),
        ("0.8", [], torch.float32, "in fp32, since bf16 would round by up to"),
        ("0.8", ["--dtype", "bf16"], torch.bfloat16, "in bf16, rounded by up to"),
        ("0.5", ["--dtype", "fp32"], torch.float32, "in fp32, though bf16 would be exact too"),
    ):
        out = tmp_path / f"{ratio}{''.join(options)}.safetensors"
        code, said = lora_command("merge", f"{path}={ratio}", "-o", out, *options)
        assert code == 0 and words in said, said
        found = load_file(out)
        assert {t.dtype for key, t in found.items() if key.endswith("weight")} == {kind}
        tolerance = 2**-7 if "rounded" in words else 1e-6
        assert close(lora_file.read_lora(out), [(lora, float(ratio))], tolerance)


def test_merge_normalized_ratios(tmp_path: Path):
    """Normalized ratios have absolute values that sum to 1."""
    one, other = random_lora(seed=1), random_lora(seed=2)
    a, b = write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", other)
    code, _ = lora_command("merge", f"{a}=3", f"{b}=-1", "--normalize", "-o", tmp_path / "m.safetensors")
    assert code == 0 and close(lora_file.read_lora(tmp_path / "m.safetensors"), [(one, 0.75), (other, -0.25)], 1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["a.safetensors", "-o", "m.safetensors"], 2, "a.safetensors: has no ratio; write a.safetensors=0.8"),
        (["a.safetensors=x", "-o", "m.safetensors"], 2, "'x' is not a number from -100 to 100"),
        (["a.safetensors:0.5", "-o", "m.safetensors"], 2, "has no ratio; write a.safetensors=0.8"),
        (["a.safetensors=0", "-o", "m.safetensors"], 2, "every ratio is 0"),
        (["a.safetensors=0", "--normalize", "-o", "m.safetensors"], 2, "every ratio is 0"),
        (["a.safetensors=1"], 2, "-o: is missing"),
        (["a.safetensors=1", "-o", "a.safetensors", "--force"], 2, "is a file that is read"),
        (["a.safetensors=1", "-o", "big.safetensors"], 2, "exists; give another name, or --force"),
        (["a.safetensors=1", "-o", "m.pt"], 2, "does not end in .safetensors"),
        (["a.safetensors=1", "-o", "m.safetensors", "--dtype", "fp16"], 2, "give auto, bf16 or fp32"),
        (["a.safetensors=1", "-o", "m.safetensors", "--method", "slerp"], 2, "give one of sum, ties, dare_ties"),
        (["a.safetensors=1", "-o", "m.safetensors", "--density", "0.5"], 2, "--density: does nothing for --method sum"),
        (["a.safetensors=1", "-o", "m.safetensors", "--seed", "5"], 2, "--seed: does nothing for --method sum"),
        (
            ["a.safetensors=1", "-o", "m.safetensors", "--energy", "0.5"],
            2,
            "--energy: does nothing without --rank auto",
        ),
        (["a.safetensors=1", "-o", "m.safetensors", "--dry-run"], 2, "--dry-run: is given beside -o"),
        (
            ["a.safetensors=1", "a.safetensors=-1", "-o", "m.safetensors"],
            2,
            "would change nothing: all its changes are 0",
        ),
        (["a.safetensors=1", "-o", "m.safetensors", "--rank", "9" * 5000], 2, "give auto, or a number from 1 to"),
        (["a.safetensors=1", "-o", "m.safetensors", "--rank", "0"], 2, "give auto, or a number from 1 to"),
        (["a.safetensors=1", "-o", "m.safetensors", "--scale", "2:layers=1"], 2, "is for file 2, but there are 1"),
        (["a.safetensors=1", "gone.safetensors=1", "-o", "m.safetensors"], 4, "gone.safetensors: does not exist"),
        (["a.safetensors=1", "big.safetensors=1", "-o", "m.safetensors"], 4, "[96, 96] and [128, 128]"),
    ],
)
def test_what_cannot_be_merged_is_said(tmp_path: Path, monkeypatch, arguments: list[str], code: int, said: str):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors", random_lora())
    big = {Q: Factors(torch.ones(2, 128), torch.ones(128, 2), 1.0)}
    write(tmp_path / "big.safetensors", big)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found, output = lora_command("merge", *arguments)
    assert found == code and said in output, output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Methods


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_merge_methods_at_full_rank(tmp_path: Path, method: str):
    """Each merge method, written at full rank, is the change that it computes."""
    one, other = random_lora(2, 1.0, 1, ("attention",)), random_lora(3, 0.5, 2, ("attention", "adaln"))
    a, b = write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", other)
    options = ["--method", method, "--density", "0.6", "--rank", "96"]
    options += ["--seed", "5"] if method.startswith("dare") else []
    code, said = lora_command("merge", f"{a}=0.8", f"{b}=-0.4", *options, "-o", tmp_path / "m.safetensors")
    assert code == 0 and f"{method} with density 0.6, then rank 96" in said and "keeps 100.00%" in said
    found = lora_file.read_lora(tmp_path / "m.safetensors")
    changes = [one[Q].delta(), -other[Q].delta()]
    assert relative(dense(found, Q), blending.blend_deltas(method, changes, [0.8, 0.4], 0.6, 5, Q).double()) < 1e-4
    assert found.keys() == one.keys() | other.keys()
    code, said = lora_command("merge", f"{a}=0.8", f"{b}=-0.4", "--method", method, "-o", tmp_path / "n.safetensors")
    assert code == 0 and {f.rank for m, f in lora_file.read_lora(tmp_path / "n.safetensors").items() if m in one} == {5}


# Resize, average, difference


def test_resize_says_what_is_kept(tmp_path: Path):
    path, out = write(tmp_path / "x.safetensors", random_lora(8, 0.5)), tmp_path / "y.safetensors"
    code, said = lora_command("resize", path, "--rank", "3", "-o", out)
    found, lora = lora_file.read_lora(out), lora_file.read_lora(path)
    assert code == 0 and {f.rank for f in found.values()} == {3} and "rank 8 -> rank 3: keeps " in said
    values = {m: torch.linalg.svdvals(dense(lora, m)).square() for m in lora}
    share = sum(float(v[:3].sum()) for v in values.values()) / sum(float(v.sum()) for v in values.values())
    assert f"keeps {share:.2%} of the squared change, least in " in said
    assert metadata_of(out)["ss_network_dim"] == "3"
    code, said = lora_command("resize", path, "--rank", "auto", "--energy", "0.8", "-o", out, "--force")
    assert code == 0 and {f.rank for f in lora_file.read_lora(out).values()} <= {5, 6, 7}


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        (["--decay", "0.99"], [0.99**200, 0.99**100 - 0.99**200, 1 - 0.99**100]),
        (["--decay", "0"], [0.0, 0.0, 1.0]),
        (["--sigma-rel", "0.2"], None),
    ],
)
def test_ema_of_the_saves_of_a_run(tmp_path: Path, options: list[str], shares):
    """Saves of a run are averaged with the weights of their steps."""
    saves = [random_lora(4, 0.5, seed) for seed in range(3)]
    paths = []
    for index, lora in enumerate(saves):
        paths.append(write(tmp_path / f"run-{(index + 1) * 100:06d}.safetensors", lora))
    code, said = lora_command("ema", *reversed(paths), *options, "-o", tmp_path / "ema.safetensors")
    assert code == 0, said
    if shares is None:
        widths = {p / 1000: (p / 1000 + 1) ** 0.5 / (p / 1000 + 2) / (p / 1000 + 3) ** 0.5 for p in range(10**4)}
        power = min(widths, key=lambda p: abs(widths[p] - 0.2))
        shares = [(i / 3) ** (power + 1) - ((i - 1) / 3) ** (power + 1) for i in (1, 2, 3)]
    else:
        first = 0.99**300 if options[1] == "0.99" else 0.0
        shares = [(share - (first if i == 0 else 0)) / (1 - first) for i, share in enumerate(shares)]
    found = lora_file.read_lora(tmp_path / "ema.safetensors")
    for module in found:
        a = sum(share * lora[module].a.double() for share, lora in zip(shares, saves, strict=True))
        b = sum(share * 0.5 * lora[module].b.double() for share, lora in zip(shares, saves, strict=True))
        assert relative(found[module].b.double() @ found[module].a.double(), b @ a) < 1e-3
    assert [line.split(":")[0] for line in said.splitlines()[:3]] == ["step 100", "step 200", "step 300"]


def test_what_is_no_run_is_not_averaged(tmp_path: Path):
    one = write(tmp_path / "a.safetensors", random_lora())
    other = write(tmp_path / "x-000100.safetensors", random_lora(2))
    third = write(tmp_path / "x-000200.safetensors", random_lora(4))
    out = tmp_path / "m.safetensors"
    assert lora_command("ema", one, other, "-o", out)[1].endswith("give LoRAs that a run saved")
    assert "differs in rank or shape between them" in lora_command("ema", other, third, "-o", out)[1]
    assert "nothing to average" in lora_command("ema", other, "-o", out)[1]
    assert lora_command("ema", tmp_path, "-o", out)[0] in (2, 4)
    same = write(tmp_path / "y-000100.safetensors", random_lora(2, seed=9))
    assert "is of step 100, as" in lora_command("ema", other, same, "-o", out)[1]
    for name, step in (("one", 100), ("two", 200)):
        tensors = load_file(write(tmp_path / f"{name}.safetensors", random_lora()))
        save_file(tensors, tmp_path / f"{name}.safetensors", {"ss_steps": str(step), "ss_output_name": name})
    code, said = lora_command("ema", tmp_path / "one.safetensors", tmp_path / "two.safetensors", "-o", out)
    assert code == 2 and "these are of several runs (one, two)" in said
    said = lora_command("ema", other, third, "--decay", "0.9", "--sigma-rel", "0.1", "-o", out)[1]
    assert "give either of them" in said


def test_diff_distance_and_direction(tmp_path: Path):
    """`diff` reports how far apart two LoRAs are, and in which direction."""
    lora = random_lora(scale=0.5)
    minus = {m: Factors(f.a, f.b, -f.scale if "to_q" in m else f.scale) for m, f in lora.items() if "w3" not in m}
    one = write(tmp_path / "a.safetensors", lora)
    other = converted(write(tmp_path / "b.safetensors", minus), "musubi", tmp_path / "c.safetensors")
    code, said = lora_command("diff", one, other, "--plot", tmp_path / "d.png")
    lines = said.splitlines()
    assert code == 0 and f"only in {one}: 2 modules, such as layers.0.feed_forward.w3" in lines
    shared = [dense(lora, m) for m in minus]
    apart = sum(float((dense(minus, m) - dense(lora, m)).square().sum()) for m in minus) ** 0.5
    norm = sum(float(one.square().sum()) for one in shared) ** 0.5
    assert f"in the 12 modules of both: |A - B| / |A| = {apart / norm:.3g}, |B| / |A| = 1, cosine" in said
    assert next(line.split() for line in lines if line.startswith("layers.1")) == [
        "layers.1", "-1", "1", "1", "1", "1", "1", "-", "-",
    ]  # fmt: skip
    assert (tmp_path / "d.png").exists()
    assert "|A - B| / |A| = 0," in lora_command("diff", one, one)[1]


# Checkpoints


def tensors_of(path: Path) -> dict[str, Tensor]:
    return dict(transformer.read_weights(path)[1])


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_bake_adds_the_change_once(tmp_path: Path, to: str):
    """Baking adds the change once, and touches nothing else."""
    out = tmp_path / ("baked.safetensors" if to == "comfyui" else "baked")
    code, said = lora_command("bake", mini.TURBO, "--lora", f"{mini.ADAPTER_V1}=0.8", "--to", to, "-o", out)
    assert code == 0 and "matched 48/48 modules, weight 0.8" in said and "48 weights changed" in said, said
    before, after, lora = tensors_of(mini.TURBO / "transformer"), tensors_of(out), lora_file.read_lora(mini.ADAPTER_V1)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        factors = lora.get(name.removesuffix(".weight"))
        moved = tensor.double() + 0.8 * (factors.b.double() @ factors.a.double()) if factors else tensor
        assert after[name].dtype == tensor.dtype
        assert torch.allclose(after[name].double(), moved.double(), rtol=2**-8, atol=1e-6), name
        assert factors is not None or torch.equal(after[name], tensor)
    if to == "comfyui":
        with safe_open(out, "pt") as file:
            keys = list(file.keys())
        assert "layers.0.attention.qkv.weight" in keys and not any("to_q" in key for key in keys)
    assert locate.transformer_tensors(out)[0].parameters.keys() == before.keys()


@pytest.mark.slow
def test_diffusers_loads_both_baked_layouts(tmp_path: Path):
    from diffusers import ZImageTransformer2DModel

    for to, name in (("comfyui", "one.safetensors"), ("diffusers", "folder")):
        assert lora_command("bake", mini.TURBO, "--lora", mini.ADAPTER_V1, "--to", to, "-o", tmp_path / name)[0] == 0
    folder = ZImageTransformer2DModel.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    single = ZImageTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), dtype=torch.float32
    )
    ours = tensors_of(tmp_path / "folder")
    assert folder.state_dict().keys() == single.state_dict().keys() == ours.keys()
    for name, tensor in folder.state_dict().items():
        assert torch.equal(tensor, single.state_dict()[name]) and torch.equal(tensor, ours[name].float()), name


def test_what_rounding_costs_is_measured(tmp_path: Path):
    """A change far below the weights' precision is lost, and said to be."""
    shape, stream = transformer.read_weights(mini.TURBO / "transformer")
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in stream}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((mini.TURBO / "transformer" / "config.json").read_bytes())
    code, said = lora_command(
        "bake", folder, "--lora", f"{mini.ADAPTER_V1}=0.0001", "--to", "diffusers", "-o", tmp_path / "out"
    )
    assert code == 0
    assert "--dtype fp32, loses none" in said
    share = float(said.split("rounding to BF16 cost ")[1].split("%")[0]) / 100
    lora, lost, whole = lora_file.read_lora(mini.ADAPTER_V1), 0.0, 0.0
    for module, factors in lora.items():
        weight, change = tensors[f"{module}.weight"], 0.0001 * (factors.b.double() @ factors.a.double())
        lost += float(((weight.float() + change.float()).bfloat16().double() - weight.double() - change).square().sum())
        whole += float(change.square().sum())
    assert share == pytest.approx((lost / whole) ** 0.5, rel=0.01) and share > 0.5
    assert shape.parameters.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["turbo", "--lora", "x", "--to", "kohya", "-o", "y"], 2, "give one of comfyui, diffusers"),
        (["turbo", "--lora", "x", "--to", "comfyui", "-o", "y"], 2, "ComfyUI takes one file"),
        (["turbo", "--lora", "x", "--to", "diffusers", "-o", "y.safetensors"], 2, "diffusers takes a folder"),
        ([str(mini.TURBO), "--lora", "gone", "--to", "diffusers", "-o", "y"], 4, "gone: does not exist"),
    ],
)
def test_what_cannot_be_baked_is_said(tmp_path: Path, monkeypatch, arguments: list[str], code: int, said: str):
    monkeypatch.chdir(tmp_path)
    found, output = lora_command("bake", *arguments)
    assert found == code and said in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_what_was_baked_is_extracted_again(tmp_path: Path, layout: str):
    baked = tmp_path / ("baked.safetensors" if layout == "comfyui" else "baked")
    assert lora_command("bake", mini.TURBO, "--lora", f"{mini.ADAPTER_V1}=20", "--to", layout, "-o", baked)[0] == 0
    out = tmp_path / "x.safetensors"
    code, said = lora_command("extract", baked, mini.TURBO, "--rank", "8", "--dtype", "fp32", "-o", out)
    assert code == 0 and "adaln 6, attention 24, feed_forward 18: keeps 100.00%" in said, said
    found, lora = lora_file.read_lora(out), lora_file.read_lora(mini.ADAPTER_V1)
    assert found.keys() == lora.keys()
    for module in lora:
        assert relative(_dense(found[module]), 20 * _dense(lora[module])) < 5e-3, module  # bf16 weights


def _dense(factors: Factors) -> Tensor:
    return factors.scale * (factors.b.double() @ factors.a.double())


def test_extract_is_refused(tmp_path: Path):
    """Extracting from equal checkpoints, or from checkpoints of different sizes, is refused."""
    out = tmp_path / "x.safetensors"
    code, said = lora_command("extract", mini.TURBO, mini.TURBO, "-o", out)
    assert code == 4 and "there is nothing to extract" in said
    folder = tmp_path / "narrow"
    folder.mkdir()
    tensors = {name: torch.zeros(size) for name, size in TINY.parameters.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "ZImageTransformer2DModel", **TINY.config()}
    (folder / "config.json").write_text(json.dumps(config))
    code, said = lora_command("extract", folder, mini.TURBO, "-o", out)
    assert code == 4 and "give the checkpoint that it was trained from" in said and not out.exists()


def test_bake_dtype(tmp_path: Path):
    """The data type of a baked checkpoint can be chosen, and is reported."""
    command = ["bake", mini.TURBO, "--lora", mini.ADAPTER_V1, "--to", "diffusers"]
    code, said = lora_command(*command, "--dtype", "fp32", "-o", tmp_path / "x")
    assert code == 0 and "in fp32" in said and "rounding to fp32 cost 0.00% of the change" in said
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "x").values()} == {torch.float32}
    noted = json.loads(metadata_of(tmp_path / "x" / "diffusion_pytorch_model.safetensors")["zimage_train.bake"])
    assert noted[0]["sha256"] == hashlib.sha256(mini.ADAPTER_V1.read_bytes()).hexdigest() and noted[0]["weight"] == 1.0
    assert "--dtype: is 'fp8'" in lora_command(*command, "--dtype", "fp8", "-o", tmp_path / "y")[1]


def folder_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_bytes((mini.TURBO / "transformer" / "config.json").read_bytes())
    return path


def test_bake_qkv_of_different_types(tmp_path: Path):
    """Q, K and V of different types are baked into a type that holds them all."""
    tensors = {
        name: tensor.bfloat16().contiguous() for name, tensor in transformer.read_weights(mini.TURBO / "transformer")[1]
    }
    mixed = {name: tensor.float() if "to_v" in name else tensor for name, tensor in tensors.items()}
    source, out = folder_of(tmp_path / "model", mixed), tmp_path / "x.safetensors"
    assert lora_command("bake", source, "--lora", f"{mini.ADAPTER_V1}=0", "--to", "comfyui", "-o", out)[0] == 0
    after = tensors_of(out)
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in mixed.items())


def test_bake_refuses_harm(tmp_path: Path):
    """Values that are not finite are not written, and no checkpoint is overwritten."""
    lora = {
        m: Factors(f.a.float() * 1e25, f.b.float() * 1e25, 1.0) for m, f in lora_file.read_lora(mini.ADAPTER_V1).items()
    }
    huge, out = write(tmp_path / "huge.safetensors", lora), tmp_path / "x.safetensors"
    code, said = lora_command("bake", mini.TURBO, "--lora", huge, "--to", "comfyui", "-o", out)
    assert code == 4 and "would not be finite with this LoRA; nothing was written" in said and not out.exists()
    tensors = {name: tensor.contiguous() for name, tensor in transformer.read_weights(mini.TURBO / "transformer")[1]}
    untouched = next(name for name in tensors if name.endswith("norm1.weight"))
    tensors[untouched] = torch.full_like(tensors[untouched], torch.nan)
    source = folder_of(tmp_path / "model", tensors)
    code, said = lora_command("bake", source, "--lora", mini.ADAPTER_V1, "--to", "comfyui", "-o", out)
    assert code == 4 and f"{untouched}: holds values that are not finite" in said and not out.exists()
    code, said = lora_command("merge", f"{huge}=1", "--method", "ties", "-o", out)
    assert code == 4 and "beyond the range of fp32" in said and not out.exists()
    assert lora_command("bake", mini.TURBO, "--lora", mini.ADAPTER_V1, "--to", "comfyui", "-o", out)[0] == 0
    before = out.read_bytes()
    for command in (
        ["bake", out, "--lora", mini.ADAPTER_V1, "--to", "comfyui", "-o", out, "--force"],
        ["extract", out, mini.TURBO, "-o", out, "--force"],
        ["extract", mini.TURBO, out, "-o", out, "--force"],
        ["inspect", mini.ADAPTER_V1, "--plot", out],
        ["diff", mini.ADAPTER_V1, mini.ADAPTER_V1, "--plot", out],
    ):
        assert lora_command(*command)[0] == 2 and out.read_bytes() == before, command


def test_local_checkpoints_need_no_hub(tmp_path: Path, monkeypatch):
    """Checkpoints on this machine are read without asking a hub."""

    def asked(*arguments: object) -> Path:
        raise AssertionError(arguments)

    out = tmp_path / "x.safetensors"
    assert lora_command("bake", mini.TURBO, "--lora", mini.ADAPTER_V1, "--to", "comfyui", "-o", out)[0] == 0
    monkeypatch.setattr(locate, "download", asked)
    monkeypatch.setattr(locate, "cached_only", asked)
    for command in (
        ["bake", out, "--lora", mini.ADAPTER_V1, "--to", "comfyui", "-o", tmp_path / "y.safetensors"],
        ["extract", out, mini.TURBO, "-o", tmp_path / "z.safetensors"],
        ["verify", mini.ADAPTER_V1, "--model", out],
    ):
        assert lora_command(*command)[0] == 0, command


def test_merge_rule_for_all_files(tmp_path: Path):
    """A rule for all files is allowed to match no module in some of them."""
    one = write(tmp_path / "a.safetensors", random_lora())
    other = write(tmp_path / "b.safetensors", random_lora(seed=1, targets=("attention", "adaln")))
    out = tmp_path / "m.safetensors"
    code, said = lora_command("merge", f"{one}=1", f"{other}=1", "--scale", "adaln=0", "-o", out)
    assert code == 0 and "note" not in said and not any("adaLN" in module for module in lora_file.read_lora(out))
    code, said = lora_command("merge", f"{one}=1", f"{other}=1", "--scale", "1:adaln=0", "-o", out, "--force")
    assert code == 2 and "no rule names any of its 14 modules" in said
    assert lora_command("merge", f"{one}=0.5", "--scale", "all=0.5", "-o", out, "--force")[0] == 0
    assert close(lora_file.read_lora(out), [(lora_file.read_lora(one), 0.25)], 1e-6)


def test_model_and_lora_confused(tmp_path: Path):
    """A model and a LoRA are not taken for each other."""
    baked = tmp_path / "baked.safetensors"
    assert lora_command("bake", mini.TURBO, "--lora", mini.ADAPTER_V1, "--to", "comfyui", "-o", baked)[0] == 0
    for command in (["inspect", baked], ["merge", f"{baked}=1", "-o", tmp_path / "x.safetensors"]):
        code, said = lora_command(*command)
        assert code == 4 and "it is a whole model: give it as MODEL, or make a LoRA of what it changes" in said
    code, said = lora_command("extract", mini.ADAPTER_V1, mini.TURBO, "-o", tmp_path / "x.safetensors")
    assert code == 4 and "is a LoRA, no transformer; give a model, or this as --lora" in said


def test_resize_dtype_and_larger_rank(tmp_path: Path):
    """`resize` keeps the data type, and refuses a rank that is not lower."""
    code, said = lora_command("resize", mini.ADAPTER_V1, "--rank", "2", "-o", tmp_path / "x.safetensors")
    assert code == 0 and "in bf16, rounded by up to" in said
    code, said = lora_command("resize", mini.ADAPTER_V1, "--rank", "8", "-o", tmp_path / "y.safetensors")
    assert code == 2 and "--rank: is 8" in said and "already has rank 8" in said


def test_ema_folder_beside_a_run(tmp_path: Path):
    """A folder beside a run is refused, naming the run that was meant."""
    run = tmp_path / "runs" / "x"
    (run / "lora").mkdir(parents=True)
    (run / "config.yaml").write_text("name: x\n")
    for folder in (run / "lora", tmp_path / "runs"):
        code, said = lora_command("ema", folder, "-o", tmp_path / "m.safetensors")
        assert code == 2 and f"it has no config.yaml; did you mean {run}?" in said


def test_merge_metadata(tmp_path: Path):
    """A merge keeps the metadata that all files which have it agree on."""
    tensors = load_file(write(tmp_path / "a.safetensors", random_lora()))
    save_file(
        tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "zimage", "modelspec.title": "a", "x": "1"}
    )
    save_file(tensors, tmp_path / "b.safetensors", {"x": "2"})
    out = tmp_path / "m.safetensors"
    assert (
        lora_command("merge", f"{tmp_path / 'a.safetensors'}=1", f"{tmp_path / 'b.safetensors'}=1", "-o", out)[0] == 0
    )
    found = metadata_of(out)
    assert found["ss_base_model_version"] == "zimage" and not found.keys() & {"modelspec.title", "x"}
