"""Captured steps, with a recorder of operations in place of CUDA graphs: the bits of the steps that they repeat."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from recorded_ops import OperationRecorder
from safetensors.torch import load_file

from zimage_train import mini
from zimage_train.commands.train import run_training
from zimage_train.config.schema import Config
from zimage_train.errors import Stopped
from zimage_train.planning.planner import MemoryPlan
from zimage_train.training import build, loop, step_runner
from zimage_train.training.step_runner import StepRunner

from helpers import PREVIEWED, facts, folder, stop_after

TWO_SIZES = [{"folder": str(mini.IMAGES), "resolution": [64, 96], "trigger": "zorb", "caption_dropout": 0.3}]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[OperationRecorder]:
    """The recorder of each run that is started in the test."""
    made: list[OperationRecorder] = []

    def make(config: Config, *args) -> OperationRecorder | None:
        if config.name == "eager":
            return None
        made.append(OperationRecorder())
        return made[-1]

    monkeypatch.setattr(build, "make_recorder", make)
    return made


def metrics(config: Config) -> list[tuple[float, ...]]:
    lines = (folder(config) / "metrics.jsonl").read_text().splitlines()
    names = ("loss", "grad_norm", "preservation")
    records = map(json.loads, lines)
    return [tuple(map(record.get, names)) for record in records]


KINDS = {
    "plain": {},
    "two sizes, batches": {"data": TWO_SIZES, "train": {"steps": 12, "batch_size": 2, "grad_accumulation": 2}},
    "recomputed": {"memory": {"checkpointing": "w1w3"}},
    "streamed": {"memory": {"offload": 1.0}},
    "half streamed": {"memory": {"offload": 0.5}},
    "streamed int8": {"memory": {"offload": 1.0}, "model": {"quantize": "int8"}},
    "preservation": {"preserve": {"kind": "blank"}},
    "preservation, streamed": {"preserve": {"kind": "blank"}, "memory": {"offload": 0.5}},
    "slider, streamed": {
        "train": {"steps": 8, "method": "slider"},
        "model": {"adapter": None},
        "slider": {"positive": "[prompt], large", "anchor": "a star"},
        "memory": {"offload": 0.5},
    },
    "guidance": {"guidance": {"differential": 2.0, "contrastive": 2.0}},
    "loss": {
        "loss": {"type": "huber", "detail": 2.0, "min_snr": 5.0},
        "timesteps": {"type": "linear"},
        "guidance": {"contrastive": 2.0, "contrastive_schedule": "sigma", "cfg_zero": True},
    },
    "modules": {"lora": {"targets": ["attention", "adaln"]}},
    "averaged": {"ema": {"decay": 0.9}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_replays_give_the_same_bits(make_config, recorded, kind: str):
    """A run whose steps are replayed has the losses, gradients and LoRA of a run without."""
    changes = {"train": {"steps": 8}, "save": {"every": 100}} | KINDS[kind]
    eager, captured = make_config(name="eager", **changes), make_config(name="captured", **changes)
    for config in (eager, captured):
        run_training(config, fresh=False)
    assert metrics(captured) == metrics(eager)
    assert lora(captured) == lora(eager)
    assert recorded[0].replays >= 4 and recorded[0].records < recorded[0].replays
    assert facts(captured)["captured_steps"] == {"failure": None} and "captured_steps" not in facts(eager)


def lora(config: Config) -> dict[str, list[float]]:
    tensors = load_file(folder(config) / "lora" / f"{config.name}.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


HISTORY = {
    "data": TWO_SIZES,
    "train": {"steps": 20, "batch_size": 1},
    "save": {"every": 6},
    "sample": PREVIEWED | {"every": 5},
    "memory": {"offload": 0.5},
}


@pytest.mark.slow
def test_history_does_not_matter(make_config, recorded, monkeypatch, tmp_path):
    """Previews, validation, evicted graphs and a new start change which steps are replayed, and no bit of them."""
    held_out = tmp_path / "held out"
    held_out.mkdir()
    image = next(iter(sorted(mini.IMAGES.glob("*.png"))))
    shutil.copy(image, held_out)
    shutil.copy(image.with_suffix(".txt"), held_out)
    changes = HISTORY | {"validation": {"folder": str(held_out), "every": 8, "resolution": 64}}
    eager = make_config(name="eager", **changes)
    run_training(eager, fresh=False)
    monkeypatch.setattr(step_runner, "MAX_GRAPHS", 1)
    monkeypatch.setattr(MemoryPlan, "previews_fit_beside", False)
    captured = make_config(name="captured", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stopped):
            run_training(captured, fresh=False)
    run_training(captured, fresh=False)
    assert metrics(captured) == metrics(eager) and lora(captured) == lora(eager)
    assert facts(captured)["starts"] == [0, 9]
    for recorder in recorded:
        assert recorder.records > 2 and recorder.replays > 2


def test_graphs_are_evicted(make_config, recorded, monkeypatch):
    """The graph that was used longest ago goes first."""
    monkeypatch.setattr(step_runner, "MAX_GRAPHS", 2)
    kept = {}
    original = StepRunner._record

    def spy(runner, inputs, recorder):
        kept["runner"] = runner
        return original(runner, inputs, recorder)

    monkeypatch.setattr(StepRunner, "_record", spy)
    config = make_config(data=TWO_SIZES, train={"steps": 30, "batch_size": 1})
    run_training(config, fresh=False)
    runner = kept["runner"]
    assert len(runner._graphs) == 2 < len(runner._seen)
    assert recorded[0].records > len(runner._seen)


def test_memory_that_stays_forgets_graphs(make_config, recorded, monkeypatch):
    """A step that leaves something in the memory of graphs makes them void, since a replay would write there."""
    original, seen = StepRunner._run_beside_graphs, []

    def leaking(runner, inputs, recorder):
        run = runner._run

        def leave(inputs) -> None:
            run(inputs)
            recorder.allocated += 1

        before = len(runner._graphs)
        with monkeypatch.context() as patch:
            if before and not seen:
                patch.setattr(runner, "_run", leave)
            original(runner, inputs, recorder)
        seen.extend([(before, len(runner._graphs))] if before else [])

    monkeypatch.setattr(StepRunner, "_run_beside_graphs", leaking)
    run_training(make_config(data=TWO_SIZES, train={"steps": 30, "batch_size": 1}), fresh=False)
    assert seen[0][0] > 0 and seen[0][1] == 0 and all(before == after for before, after in seen[1:])


class WrongRecorder(OperationRecorder):
    """Its replays add a little to the gradients."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(run)

        def wrong() -> None:
            replay()
            kept["runner"]._grads[0] += 1e-7

        return wrong


class BrokenRecorder(OperationRecorder):
    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class OldRecorder(OperationRecorder):
    """Its replays do nothing."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        super().record(run)
        return lambda: None


kept: dict[str, StepRunner] = {}


@pytest.mark.parametrize(
    ("recorder", "said"),
    [
        (WrongRecorder, "a replay gave other bits"),
        (OldRecorder, "a replay gave other bits"),
        (BrokenRecorder, "RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_replays_that_fail_are_off(make_config, monkeypatch, recorder, said: str):
    """If a replay fails or differs, the run says so, and trains as it would without."""
    eager = make_config(name="eager")
    run_training(eager, fresh=False)
    monkeypatch.setattr(build, "make_recorder", lambda *args: recorder())
    check = StepRunner.check
    monkeypatch.setattr(StepRunner, "check", lambda runner, batch: check(kept.setdefault("runner", runner), batch))
    kept.clear()
    config = make_config(name="captured")
    run_training(config, fresh=False)
    assert facts(config)["captured_steps"] == {"failure": said}
    log = (folder(config) / "log.txt").read_text()
    assert log.count(f"steps are not captured as CUDA graphs in this run, which is slower: {said}") == 1
    assert metrics(config) == metrics(eager) and lora(config) == lora(eager)


class LateRecorder(OperationRecorder):
    """It fails when the whole step has been recorded, and the ring of streamed blocks has turned."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        super().record(run)
        raise RuntimeError("late")


@pytest.mark.slow
def test_failed_recording_turns_no_ring(make_config, monkeypatch):
    """After a recording that failed, streamed blocks are found where they are, not where they would have been."""
    changes = {"preserve": {"kind": "blank"}, "memory": {"offload": 0.5}}
    eager = make_config(name="eager", **changes)
    run_training(eager, fresh=False)
    monkeypatch.setattr(build, "make_recorder", lambda *args: LateRecorder())
    record, states = StepRunner._record, []

    def watched(runner, *args):
        ring = runner._frozen.offloader
        before = ring.state()
        try:
            return record(runner, *args)
        finally:
            states.append((before, ring.state()))

    monkeypatch.setattr(StepRunner, "_record", watched)
    config = make_config(name="captured", **changes)
    run_training(config, fresh=False)
    assert len(states) == 1 and states[0][0] == states[0][1]
    assert facts(config)["captured_steps"] == {"failure": "RuntimeError: late"}
    assert metrics(config) == metrics(eager) and lora(config) == lora(eager)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_is_never_captured(make_config, kind: str):
    """Each step draws other masks, which a replay would not."""
    config = make_config(lora={kind: 0.1})
    assert step_runner.make_recorder(config, None, torch.device("cuda")) is None
    assert step_runner.make_recorder(config, None, torch.device("cpu")) is None


def test_recorder_knows_what_a_graph_cannot(recorded):
    """The recorder of the tests repeats what was recorded, not what would be computed now."""
    factor, x, total = 2.0, torch.ones(3), torch.zeros(3)

    def run() -> None:
        total.add_(x * factor)

    replay = OperationRecorder().record(run)
    assert total.tolist() == [0, 0, 0]
    factor = 5.0
    x.fill_(3)
    replay()
    assert total.tolist() == [6, 6, 6]
    with pytest.raises(AssertionError, match="waits for the device"):
        OperationRecorder().record(lambda: print(float(total.sum())))


def test_loop_waits_for_the_device_once(make_config, monkeypatch):
    """A step reads its numbers from the device in one call; whatever else is read is on the CPU already."""
    asked: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args):
            caller = sys._getframe(1)
            if "zimage_train" in caller.f_code.co_filename:
                asked.append(caller.f_code.co_name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)

    begin = loop.before_first_step

    def watched(*args):
        begin(*args)
        for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__"):
            watch(name)

    monkeypatch.setattr(loop, "before_first_step", watched)
    monkeypatch.setattr(loop, "after_step", lambda *args: None)
    run_training(make_config(train={"steps": 5}), fresh=False)
    counts = Counter(asked)
    assert counts["train"] == 5
    # Sigmas are read from the batch in main memory, as the checkpoint of the last step is written from it.
    assert counts.keys() <= {"train", "step_record", "tensor_entry"}
