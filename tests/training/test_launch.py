"""Launchers: what accelerate is asked for in vain is said or refused, and processes that fall silent are noticed."""

from types import SimpleNamespace

import pytest
from torch.distributed import DistNetworkError

from zimage_train.training.heartbeat import BEAT_SECONDS, DONE, LOST_SECONDS, Beats
from zimage_train.training.launch import launch_problems, launch_warnings

ONE_OF_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_split_models_are_refused(variable: str):
    """A launcher that splits the model is refused in one line that says why it is not needed."""
    assert launch_problems({f"ACCELERATE_USE_{variable}": "false"}) == []
    (problem,) = launch_problems({f"ACCELERATE_USE_{variable}": "true"})
    assert "here it is frozen" in str(problem) and "\n" not in str(problem) and problem.code == "splits-model"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, []),
        ({"MASTER_ADDR": "127.0.0.1"}, []),
        (ONE_OF_ACCELERATE | {"MASTER_ADDR": "node-1"}, []),
        (ONE_OF_ACCELERATE, []),
        (ONE_OF_ACCELERATE | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, []),
        (ONE_OF_ACCELERATE | {"MASTER_ADDR": "127.0.0.1"}, ["has started one"]),
        (ONE_OF_ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "bf16"}, []),
        (ONE_OF_ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["mixed_precision fp16 has no effect"]),
        (ONE_OF_ACCELERATE | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["dynamo_backend inductor has no effect"]),
    ],
)
def test_requests_in_vain_are_said(environment: dict[str, str], said: list[str]):
    """What accelerate was asked for and has no effect is said, and nothing else."""
    warnings = launch_warnings(environment, "bf16")
    assert len(warnings) == len(said)
    assert all(text in warning for text, warning in zip(said, warnings, strict=True))


class Store:
    """The store of the processes, which may not answer."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.answers = True

    def _ask(self) -> None:
        if not self.answers:
            raise DistNetworkError("timed out")

    def set(self, key: str, value: str) -> None:
        self._ask()
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self._ask()
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        self._ask()
        return self.values[key].encode()


@pytest.fixture
def pair() -> SimpleNamespace:
    """Two processes that share a store."""
    store = Store()
    first, second = (Beats(lambda: store, "0", rank, 2) for rank in range(2))
    return SimpleNamespace(beat=0, store=store, first=first, second=second)


def rounds(pair: SimpleNamespace, seconds: float, second: bool = True) -> None:
    for _ in range(int(seconds / BEAT_SECONDS)):
        pair.beat += 1
        for beats in (pair.first, pair.second):
            beats.wait(BEAT_SECONDS)
        pair.first.exchange(f"a{pair.beat}")
        if second:
            pair.second.exchange(f"b{pair.beat}")


def test_a_silent_process_is_noticed(pair: SimpleNamespace):
    """A process that was heard and falls silent is lost after that time, and not before."""
    rounds(pair, 10 * LOST_SECONDS)
    assert pair.first.silent() == pair.second.silent() == []
    rounds(pair, LOST_SECONDS, second=False)
    assert pair.first.silent() == []
    rounds(pair, 2 * BEAT_SECONDS, second=False)
    assert pair.first.silent() == [1]


def test_a_store_without_answer_is_silence(pair: SimpleNamespace):
    """If the machine with the store is gone, the others are silent; an answer in time makes all good."""
    rounds(pair, 60)
    pair.store.answers = False
    rounds(pair, LOST_SECONDS / 2)
    pair.store.answers = True
    rounds(pair, LOST_SECONDS)
    assert pair.first.silent() == pair.second.silent() == []
    pair.store.answers = False
    rounds(pair, LOST_SECONDS + 2 * BEAT_SECONDS)
    assert pair.first.silent() == [1] and pair.second.silent() == [0]


def test_an_end_is_not_silence(pair: SimpleNamespace):
    """A process that is done, or has not begun, is not missed: the main process writes a report after the others."""
    rounds(pair, 3 * LOST_SECONDS, second=False)
    assert pair.first.silent() == []
    rounds(pair, 60)
    pair.second.exchange(DONE)
    rounds(pair, 3 * LOST_SECONDS, second=False)
    assert pair.first.silent() == []


def test_own_suspension_is_not_silence(pair: SimpleNamespace):
    """Processes that were all suspended for an hour do not miss each other when they go on."""
    rounds(pair, 60)
    for beats in (pair.first, pair.second):
        beats.wait(3600)
        assert beats.silent() == []
    rounds(pair, 60)
    assert pair.first.silent() == pair.second.silent() == []
