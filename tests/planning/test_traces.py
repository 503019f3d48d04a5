"""The steps recorded in traces/ can be replayed: each free has its allocation, each peak is as the header says."""

import itertools
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TRACES = Path(__file__).parent / "traces"
FILES = sorted(TRACES.glob("*.json.xz"))
MODES, SIDES, KINDS = ("none", "elementwise", "attention", "w1w3", "full"), (512, 768, 1024), (None, "int8", "nf4")


def trace(path: Path) -> dict[str, Any]:
    return json.loads(lzma.decompress(path.read_bytes()))


def peak_of(events: list[int]) -> tuple[int, int]:
    """The most bytes that live at a time, and those that are left; a free of what does not live is a KeyError."""
    live: dict[int, int] = {}
    now = peak = made = 0
    for event in events:
        if event > 0:
            live[made] = event
            made, now = made + 1, now + event
            peak = max(peak, now)
        else:
            now -= live.pop(made + event)
    return peak, now


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.partition(".")[0])
def test_a_trace_is_whole(path: Path):
    found = trace(path)
    events = found["events"]
    assert all(isinstance(event, int) and event != 0 for event in events)
    assert peak_of(events) == (found["peak_bytes"], 0)
    assert sum(event > 0 for event in events) == found["allocations"] == len(events) / 2
    assert 0 < found["backward"] < found["optimizer"] < len(events)
    assert all(event < 0 for event in events[found["optimizer"] :])
    assert path.name == f"{found['mode']}_{found['side_px']}_{found['kind'] or 'bf16'}.json.xz"


@pytest.mark.parametrize("path", FILES[:1] + FILES[-1:], ids=lambda path: path.name.partition(".")[0])
def test_traces_have_published_weights(path: Path):
    """A trace's weights are those of the published model."""
    found = trace(path)
    names = [name for name, _ in found["frozen"]]
    assert len(set(names)) == len(names) and all(size > 0 for _, size in found["frozen"])
    assert sum(name.startswith("layers.") and name.endswith("to_q.base_layer.weight") for name in names) == 30
    assert len(found["trained"]) == 2 * 7 * 30 and all(size > 0 for size in found["trained"])


def test_a_free_of_nothing_is_found():
    assert peak_of([8, 4, -1, -2]) == (12, 0)
    for wrong in ([-1], [8, -2], [8, -1, -1]):
        with pytest.raises(KeyError):
            peak_of(wrong)


def test_traces_of_every_measured_step():
    """There is a trace for every step that was measured."""
    found = {(one["mode"], one["side_px"], one["kind"]) for one in map(trace, FILES)}
    assert found == set(itertools.product(MODES, SIDES, KINDS))
    measured = json.loads((ROOT / "docs" / "bench" / "memory.json").read_text(encoding="utf-8"))["runs"]
    assert {(run["mode"], run["side_px"], run["kind"]) for run in measured} <= found


def test_they_are_small():
    assert sum(path.stat().st_size for path in TRACES.iterdir()) < 2_000_000
