"""The command `lora stack`: how LoRAs that are used at once get in each other's way."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zimage_train.commands.lora_args import WeightedLora
from zimage_train.errors import ConfigError, Note, Problem
from zimage_train.lora import lora_file, overlap, targets
from zimage_train.lora.deltas import Deltas
from zimage_train.lora.overlap import ModuleOverlap

OPPOSED, ALIKE = -0.05, 0.3
"""Cosines of the changes from which two LoRAs are said to cancel, or to do the same."""
LARGER = 3.0
"""Ratio of norms from which one LoRA is said to drown the other."""
SHARED, OVER_CHANCE = 0.2, 3.0
"""Shared part of a change, and its ratio to chance, from which it is a conflict."""
NUM_WORST = 3
DEPTHS = ("first third", "middle third", "last third")
Overlaps = Mapping[str, ModuleOverlap]


@dataclass(frozen=True)
class StackReport:
    """The overlap of several LoRAs."""

    inputs: Sequence[WeightedLora]
    overlaps: Overlaps

    @property
    def names(self) -> list[str]:
        """The names of the files, with their folders where two are the same."""
        names = [weighted.path.name for weighted in self.inputs]
        return names if len(set(names)) == len(names) else [str(weighted.path) for weighted in self.inputs]

    def facts(self) -> dict[str, Any]:
        """Return all measures, as `--json` prints them."""
        return {
            "files": [
                {"file": name, "weight": weighted.weight, **_file_facts(self.overlaps, index)}
                for index, (name, weighted) in enumerate(zip(self.names, self.inputs, strict=True))
            ],
            "pairs": [
                {
                    "files": [self.names[i], self.names[j]],
                    "cosine": overlap.total_cosine(_of_both(self.overlaps, i, j), i, j),
                }
                for i, j in self.pairs()
            ],
            "groups": self._parts(_by_group(self.overlaps)),
            "depths": self._parts(_by_depth(self.overlaps)),
            "modules": {name: self._module_facts(name) for name in self.overlaps},
            "conflicts": [{"code": note.code, "text": note.text} for note in self.conflicts()],
        }

    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of indices of the files."""
        return list(itertools.combinations(range(len(self.inputs)), 2))

    def _parts(self, parts: Mapping[str, Overlaps]) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for part, found in parts.items():
            files = {name: _file_facts(found, index) for index, name in enumerate(self.names)}
            cosines = [overlap.total_cosine(_of_both(found, i, j), i, j) for i, j in self.pairs()]
            facts[part] = {"cosines": cosines, "files": files}
        return facts

    def _module_facts(self, module: str) -> dict[str, Any]:
        found = self.overlaps[module]
        alone = {module: found}
        pairs = [
            {
                "files": [self.names[i], self.names[j]],
                "cosine": overlap.total_cosine(alone, i, j),
                "output_angle": pair.output_angle,
                "input_angle": pair.input_angle,
            }
            for (i, j), pair in found.pairs.items()
        ]
        files = {self.names[index]: sums.shares() for index, sums in found.sums.items()}
        return {"pairs": pairs, "files": files}

    def conflicts(self) -> list[Note]:
        """Return the conflicts of using the LoRAs together, with their remedies."""
        notes: list[Note] = []
        for i, j in self.pairs():
            notes += self._pair_conflicts(i, j)
        for index, name in enumerate(self.names):
            shares = overlap.total_sums(self.overlaps, index).shares()
            for key, verb in (("shared_writes", "write to"), ("shared_reads", "read")):
                if shares[key] >= max(SHARED, OVER_CHANCE * shares["by_chance"]):
                    text = (
                        f"{shares[key]:.0%} of {name} lies where the others {verb} too ({shares['by_chance']:.0%} by "
                        "chance), so each may overwrite the other; train one with images of the other in "
                        "data, as regularization"
                    )
                    notes.append(Note("shared-space", text))
        return notes

    def _pair_conflicts(self, i: int, j: int) -> list[Note]:
        first, second = self.names[i], self.names[j]
        found = _of_both(self.overlaps, i, j)
        if not found:
            return []
        cosine = overlap.total_cosine(found, i, j)
        notes: list[Note] = []
        if cosine <= OPPOSED:
            text = f"{first} and {second} cancel a part of each other (cosine {cosine:.2f}); leave one out, or lower it"
            notes.append(Note("opposed", text))
        if cosine >= ALIKE:
            text = (
                f"{first} and {second} do much the same (cosine {cosine:.2f}), which then counts twice; halve both "
                "weights, or use one of them"
            )
            notes.append(Note("alike", text))
        norms = [overlap.total_sums(found, index).energy ** 0.5 for index in (i, j)]
        (small, weak), (large, strong) = sorted(zip(norms, (first, second), strict=True))
        if large > LARGER * small > 0:
            text = f"{strong} changes {large / small:.1f} times as much as {weak} and may hide it; lower its weight"
            notes.append(Note("drowned", text))
        return notes


def measure_stack(inputs: Sequence[WeightedLora]) -> StackReport:
    """Return the overlap of LoRAs with their weights.

    Raises:
        ConfigError: there are fewer than two, or a weight is 0.
        WeightsError: the change of a file depends on the weights, or they change weights of different shapes.
    """
    if len(inputs) < 2:
        raise ConfigError(Problem("lora stack", "has a single LoRA", "give two or more", "too-few-files"))
    loras: list[Deltas] = []
    for weighted in inputs:
        if weighted.weight == 0:
            raise ConfigError(Problem(str(weighted.path), "has the weight 0", "leave it out", "bad-argument"))
        deltas = lora_file.read_deltas(weighted.path)
        loras.append({module: delta.times(weighted.weight) for module, delta in deltas.items()})
    return StackReport(inputs, overlap.overlaps(loras))


def format_json(report: StackReport) -> list[str]:
    """Return the measures as a JSON object."""
    return [json.dumps(report.facts(), indent=2)]


def format_report(report: StackReport) -> list[str]:
    """Return the measures as text: the files, groups and depths, the modules that overlap most, and the conflicts."""
    names, found = report.names, report.overlaps
    lines: list[str] = []
    for index, (name, weighted) in enumerate(zip(names, report.inputs, strict=True)):
        sums = overlap.total_sums(found, index)
        count = sum(index in module.sums for module in found.values())
        lines.append(f"{name}: weight {weighted.weight:g}, {count} modules, norm {sums.energy**0.5:.4g}")
    for i, j in report.pairs():
        both = _of_both(found, i, j)
        if not both:
            lines.append(f"{names[i]} and {names[j]} have no module in common")
            continue
        lines.append(
            f"{names[i]} and {names[j]}: {len(both)} modules of both, cosine {overlap.total_cosine(both, i, j):.3f}"
        )
    width = max(20, *(len(name) + 2 for name in names))
    header = f"{'survives':>10}{'shared writes':>15}{'shared reads':>14}{'by chance':>11}"
    parts = {"": found} | {f"{name}:": part for name, part in (_by_group(found) | _by_depth(found)).items()}
    for part, modules in parts.items():
        lines += ["", f"{part:{width}}{header}"]
        for index, name in enumerate(names):
            shares = overlap.total_sums(modules, index).shares()
            cells = f"{shares['survives']:>10.1%}{shares['shared_writes']:>15.1%}{shares['shared_reads']:>14.1%}"
            lines.append(f"{name:{width}}{cells}{shares['by_chance']:>11.1%}")
    lines += ["", *_closest_modules(report), ""]
    conflicts = report.conflicts()
    lines += [f"conflict: {note.text}" for note in conflicts]
    return lines if conflicts else [*lines, "no conflict by these measures"]


def _closest_modules(report: StackReport) -> list[str]:
    """Return the lines on the modules whose deltas are nearest to each other or to opposites."""
    rows: list[tuple[float, str]] = []
    for module, found in report.overlaps.items():
        for (i, j), pair in found.pairs.items():
            cosine = overlap.total_cosine({module: found}, i, j)
            between = "" if len(report.inputs) == 2 else f" ({report.names[i]}, {report.names[j]})"
            text = (
                f"  {module}{between}: cosine {cosine:.3f}, smallest angle of outputs {pair.output_angle:.0f} degrees, "
                f"of inputs {pair.input_angle:.0f}"
            )
            rows.append((abs(cosine), text))
    rows.sort(reverse=True)
    return ["nearest in:", *(text for _, text in rows[:NUM_WORST])] if rows else []


def _file_facts(found: Overlaps, index: int) -> dict[str, float]:
    sums = overlap.total_sums(found, index)
    return {"norm": sums.energy**0.5, **sums.shares()}


def _of_both(found: Overlaps, i: int, j: int) -> dict[str, ModuleOverlap]:
    return {module: one for module, one in found.items() if (i, j) in one.pairs}


def _by_group(found: Overlaps) -> dict[str, Overlaps]:
    return _split(found, targets.group_of)


def _by_depth(found: Overlaps) -> dict[str, Overlaps]:
    """Return the modules of the blocks `layers.N` by thirds of the network, as far as the files reach."""
    numbers: dict[str, int] = {}
    for module in found:
        block, number = targets.block_order(targets.block_and_component(module)[0])
        if block == "layers":
            numbers[module] = number
    count = max(numbers.values(), default=0) + 1
    parts = _split({module: found[module] for module in numbers}, lambda module: DEPTHS[3 * numbers[module] // count])
    return {name: parts[name] for name in DEPTHS if name in parts}


def _split(found: Overlaps, part_of: Callable[[str], str]) -> dict[str, Overlaps]:
    parts: dict[str, dict[str, ModuleOverlap]] = {}
    for module, one in found.items():
        parts.setdefault(part_of(module), {})[module] = one
    return {**parts}
