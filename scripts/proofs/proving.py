"""Makes the runs of a row, and compares them."""

from dataclasses import dataclass, field
from typing import Any

from zimage_train.config.schema import Config

from proofs.rows import Row
from proofs.trials import LEFT_OUT, Trials


@dataclass
class Proof:
    """The result of the runs of a row."""

    without: Any = None
    with_it: Any = None
    failures: list[str] = field(default_factory=list)
    """Differences from the row, in words."""


def prove(row: Row, trials: Trials) -> Proof:
    """Make the runs of a row, and return their result."""
    proof = Proof()
    without = trials.run(row.without)
    if row.refused:
        proof.without, reason = row.number.read(without), trials.refusal(row.with_it)
        proof.failures += [] if row.refused in reason else [f"expected a refusal with {row.refused!r}: {reason!r}"]
        return proof
    with_it = trials.run(row.with_it)
    proof.without, proof.with_it = row.number.read(without), row.number.read(with_it)
    if not row.expected.holds(proof.without, proof.with_it):
        proof.failures.append(f"expected {row.expected.text}: {proof.without!r} without, {proof.with_it!r} with it")
    if row.expected.as_with is not None:
        third = row.number.read(trials.run({**row.given, **row.expected.as_with}))
        if third != proof.with_it:
            proof.failures.append(f"expected {row.expected.text}, {third!r}: {proof.with_it!r}")
    is_same = without.numbers == with_it.numbers
    if is_same != (row.lora == "same"):
        proof.failures.append(f"the LoRA is {'the same' if is_same else 'another'}")
    proof.failures += _neutral_failures(row, trials)
    return proof


def _neutral_failures(row: Row, trials: Trials) -> list[str]:
    """Return the errors of the neutral value."""
    if row.neutral is not None:
        same = trials.run(row.with_neutral).numbers == trials.run(row.without).numbers
        return [] if same else ["the LoRA with the neutral value is another"]
    # Equal configs are equal runs.
    default = default_of(trials.config(row.without | {row.key: LEFT_OUT}), row.key)
    given = trials.config({**row.without, row.key: LEFT_OUT})
    explicit = trials.config({**row.without, row.key: default})
    return [] if explicit == given else ["the default, written out, is not what is taken if it is left out"]


def default_of(config: Config, key: str) -> Any:
    """Return the value that a config has at a key."""
    value: Any = config.model_dump()
    for name in key.split("."):
        value = dict(enumerate(value)) if isinstance(value, list) else value
        value = value.get(int(name) if name.isdigit() else name, {})
    return value
