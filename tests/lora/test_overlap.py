"""The overlap of LoRAs: against dense float64 arithmetic, and on spaces whose angles are known."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zimage_train.lora import overlap
from zimage_train.lora.deltas import Factors, Kronecker

from lora_commands import lora_command
from lora_files import TINY, Q, dense, random_lora, write

OUT, IN = TINY.linears[Q]


def outer(row: int, column: int, size: float, angle: float = 0.0) -> Factors:
    """A change of rank 1: from input `column` to output `row`, turned by `angle` towards output 0."""
    b, a = torch.zeros(OUT, 1), torch.zeros(1, IN)
    b[row], b[0], a[0, column] = math.cos(angle), math.sin(angle), 1.0
    return Factors(a, b, size)


def projection(matrix: Tensor) -> Tensor:
    """The projection on the columns of `matrix`, by its pseudo-inverse."""
    return matrix @ torch.linalg.pinv(matrix)


def test_measures_against_dense():
    """Every measure of three LoRAs is that of the dense matrices."""
    loras = [random_lora(rank, scale, seed) for rank, scale, seed in ((4, 0.5, 1), (6, 2.0, 2), (3, -1.0, 3))]
    matrices = [dense(lora, Q) for lora in loras]
    found = overlap.module_overlap({index: lora[Q] for index, lora in enumerate(loras)}, Q)
    for index, own in enumerate(matrices):
        others = [matrix for number, matrix in enumerate(matrices) if number != index]
        energy = float(own.square().sum())
        shares = found.sums[index].shares()
        writes, reads = projection(torch.cat(others, 1)), projection(torch.cat([one.T for one in others], 1))
        assert shares["survives"] == pytest.approx(float((own * sum(matrices)).sum()) / energy, rel=1e-9)
        assert shares["shared_writes"] == pytest.approx(float((writes @ own).square().sum()) / energy, rel=1e-9)
        assert shares["shared_reads"] == pytest.approx(float((own @ reads).square().sum()) / energy, rel=1e-9)
        assert shares["by_chance"] == pytest.approx((13 - loras[index][Q].rank) / OUT)
    inner = float((matrices[0] * matrices[1]).sum())
    assert found.pairs[0, 1].inner == pytest.approx(inner, rel=1e-9)
    total = overlap.total_cosine({Q: found}, 0, 1)
    assert total == pytest.approx(inner / float(matrices[0].norm() * matrices[1].norm()), rel=1e-9)


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 20.0, 60.0, 90.0])
def test_known_angle(degrees: float):
    """The angle between what two changes write is found, also where its cosine is 1 but for rounding."""
    angle = math.radians(degrees)
    first, second = outer(3, 5, 2.0), outer(3, 5, 1.0, angle)
    found = overlap.module_overlap({0: first, 1: second}, Q)
    assert found.pairs[0, 1].output_angle == pytest.approx(degrees, rel=1e-3, abs=1e-8)
    assert found.pairs[0, 1].input_angle == pytest.approx(0.0, abs=1e-6)
    shares = found.sums[1].shares()
    assert shares["shared_writes"] == pytest.approx(math.cos(angle) ** 2, abs=1e-7)
    assert shares["survives"] == pytest.approx(1 + 2 * math.cos(angle), abs=1e-6)


def test_disjoint_and_opposite():
    """Changes without a common direction survive whole; equal ones double; opposite ones vanish."""
    one = outer(3, 5, 2.0)
    apart = overlap.module_overlap({0: one, 1: outer(4, 6, 1.0)}, Q)
    assert apart.sums[0].shares() == {"survives": 1, "shared_writes": 0, "shared_reads": 0, "by_chance": 1 / OUT}
    assert (apart.pairs[0, 1].output_angle, apart.pairs[0, 1].input_angle) == (90, 90)
    assert overlap.module_overlap({0: one, 1: one}, Q).sums[0].shares()["survives"] == pytest.approx(2)
    assert overlap.module_overlap({0: one, 1: one.times(-1)}, Q).sums[0].shares()["survives"] == pytest.approx(0)


def test_redundant_rank_is_no_space():
    """Directions that cancel within a LoRA, and a change of zero, are no part of what it writes."""
    first = outer(3, 5, 1.0)
    doubled = Factors(torch.cat([first.a, first.a]), torch.cat([first.b, 2 * first.b], 1), 1.0)
    assert overlap.spaces_of(doubled, Q).s.shape == (1,)
    found = overlap.module_overlap({0: first, 1: first.times(0.0)}, Q)
    assert found.sums[1].shares()["survives"] == 0 and found.sums[0].shares()["shared_writes"] == 0
    assert found.pairs[0, 1].output_angle == 90


def test_lokr_is_measured():
    """A LoKr is measured by its largest directions, which here are all of them."""
    draw = torch.Generator().manual_seed(0)
    w2 = (torch.randn(OUT // 2, 3, generator=draw), torch.randn(3, IN // 2, generator=draw))
    lokr = Kronecker((torch.randn(2, 2, generator=draw),), w2)
    found = overlap.module_overlap({0: lokr, 1: outer(3, 5, 1.0)}, Q)
    whole = float(lokr.delta().double()[3, 5])
    assert found.pairs[0, 1].inner == pytest.approx(whole, rel=1e-4)


# The command


def test_stack_json(tmp_path: Path):
    """The command's JSON holds totals that follow from those of the modules, with weights applied."""
    loras = [random_lora(4, 1.0, 1), random_lora(4, 1.0, 2)]
    paths = [write(tmp_path / f"{index}.safetensors", lora) for index, lora in enumerate(loras)]
    code, output = lora_command("stack", paths[0], f"{paths[1]}=-0.5", "--json")
    assert code == 0, output
    facts = json.loads(output)
    first = torch.cat([dense(loras[0], module).flatten() for module in loras[0]])
    second = -0.5 * torch.cat([dense(loras[1], module).flatten() for module in loras[0]])
    assert facts["files"][0]["survives"] == pytest.approx(float(first @ (first + second) / (first @ first)))
    assert facts["files"][1]["norm"] == pytest.approx(float(second.norm()))
    assert facts["pairs"][0]["cosine"] == pytest.approx(float(first @ second / first.norm() / second.norm()))
    assert set(facts["groups"]) == {"attention", "feed_forward"} and set(facts["modules"]) == set(loras[0])


@pytest.mark.parametrize(("weight", "code"), [("1", "alike"), ("-1", "opposed"), ("10", "drowned")])
def test_conflict_is_named(tmp_path: Path, weight: str, code: str):
    """The same LoRA twice is alike, with a negative weight opposed, with a large one drowned, each with advice."""
    path = write(tmp_path / "a.safetensors", random_lora())
    status, output = lora_command("stack", path, f"{path}={weight}", "--json")
    assert status == 0 and code in {one["code"] for one in json.loads(output)["conflicts"]}
    status, text = lora_command("stack", path, f"{path}={weight}")
    assert status == 0 and "conflict: " in text and ("weight" in text or "leave one out" in text)


def test_unrelated_has_no_conflict(tmp_path: Path):
    paths = [write(tmp_path / f"{seed}.safetensors", random_lora(2, 1.0, seed)) for seed in (1, 2)]
    code, output = lora_command("stack", *paths)
    assert code == 0 and "no conflict by these measures" in output and "nearest in:" in output


def test_stack_is_refused(tmp_path: Path):
    """A single file, a weight of 0 and LoRAs of other sizes are refused."""
    path = write(tmp_path / "a.safetensors", random_lora())
    assert lora_command("stack", path)[0] == 2 and "give two or more" in lora_command("stack", path)[1]
    assert "has the weight 0" in lora_command("stack", path, f"{path}=0")[1]
    other = {Q: Factors(torch.ones(1, 7), torch.ones(5, 1), 1.0)}
    code, output = lora_command("stack", path, write(tmp_path / "b.safetensors", other))
    assert code != 0 and "different" in output and Q in output
