"""What a LoRA file changes, and whether that fits a model: from its header alone (torch-free)."""

from collections.abc import Mapping
from pathlib import Path

from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import families, names
from zimage_train.model.headers import read_header

Sizes = Mapping[str, tuple[int, int]]
"""Module -> (out, in)."""


def read_sizes(path: Path) -> Sizes:
    """The modules that a LoRA file changes.

    Raises:
        WeightsError: unreadable, or not whole pairs of A and B under names that this trainer knows.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown, twice = [], []
    tensors = read_header(path).tensors
    if family := families.family_of(tensors):
        raise WeightsError(Problem(str(path), f"{family}: cannot work on Z-Image", "retrain from the dataset"))
    for key, info in tensors.items():
        parsed = names.parse_key(key)
        if parsed is None:
            unknown.append(key)
        elif parsed[1] in parts.setdefault(parsed[0], {}):
            twice.append(key)
        else:
            parts[parsed[0]][parsed[1]] = info.shape
    broken = [module for module, found in parts.items() if not fits(found)]
    if twice:
        what = f"holds {len(twice)} tensors twice, under two names each, such as {min(twice)}"
        raise WeightsError(Problem(str(path), what, "remove one of each"))
    if unknown or broken or not parts:
        raise WeightsError(Problem(str(path), _complaint(unknown, broken), families.advice(unknown)))
    return {module: (found["B"][0], found["A"][1]) for module, found in parts.items()}


def fits(found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether A and B of these shapes are factors of one change, and alpha, if there is one, a single number."""
    a, b, alpha = found.get("A", ()), found.get("B", ()), found.get("alpha", ())
    return len(a) == len(b) == 2 and a[0] == b[1] > 0 and alpha in ((), (1,))


def require_match(path: Path, found: Sizes, linears: Sizes) -> None:
    """Require that every module of a LoRA is a linear of the model with the right shape.

    Raises:
        WeightsError: names what matches nothing; a LoRA that is applied in part would be worse than none.
    """
    lost = sorted(module for module, size in found.items() if linears.get(module) != size)
    if lost:
        first, there = lost[0], linears.get(lost[0])
        why = "the model has no such module" if there is None else f"{found[first]} there, {there} in the model"
        what = f"matched {len(found) - len(lost)}/{len(found)} modules; not matched: {first} ({why})"
        raise WeightsError(Problem(str(path), what, "it belongs to another model, and is used in whole or not at all"))


def _complaint(unknown: list[str], broken: list[str]) -> str:
    if unknown:
        return f"has {len(unknown)} keys that are not of a Z-Image LoRA, such as {min(unknown)}"
    if broken:
        return f"has {len(broken)} modules whose A, B or alpha are missing or do not fit, such as {min(broken)}"
    return "holds no LoRA"
