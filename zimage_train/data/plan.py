"""Which samples each step trains on: a pure function of (seed, step), so a resumed run needs nothing but its step.

An epoch holds every item once, grouped by size into micro-batches; a step takes `accumulate` micro-batches for each
process. The order of an epoch is by hashed keys, so neither the file system nor an added picture rearranges it.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from zimage_train.config.schema import Config
from zimage_train.data.buckets import Bucket, bucket
from zimage_train.data.folder import Picture
from zimage_train.errors import DataError, Problem
from zimage_train.seeding import Part, number

UINT63 = 2**63


@dataclass(frozen=True)
class Item:
    """One picture at one size: what an epoch holds once."""

    entry: int
    picture: Picture
    resolution: int
    size: Bucket
    repeat: int

    def identity(self) -> tuple[Part, ...]:
        """What an item's randomness is keyed by: its content and its use, never its name or place."""
        return (self.picture.digest, self.resolution, self.repeat, False)


@dataclass(frozen=True)
class Sample:
    """One item in one epoch, with the prompt it is trained with there."""

    item: Item
    epoch: int
    prompt: str

    def key(self) -> tuple[Part, ...]:
        """The path of this sample's noise and sigma."""
        return (self.epoch, *self.item.identity())


MicroBatch = tuple[Sample, ...]


def items_of(config: Config, pictures: list[list[Picture]]) -> list[Item]:
    """Every picture at each of its resolutions, `repeats` times; resolutions that give the same size count once.

    Raises:
        DataError: a picture is too narrow for a resolution; all of them are listed.
    """
    items, problems = [], []
    for index, (entry, found) in enumerate(zip(config.data, pictures, strict=True)):
        for picture in found:
            sizes: dict[Bucket, int] = {}
            for resolution in entry.resolution:
                try:
                    sizes.setdefault(bucket(picture.width, picture.height, resolution), resolution)
                except ValueError as error:
                    problems.append(Problem(str(picture.path), str(error), "crop it or remove it"))
            items += [
                Item(index, picture, resolution, size, repeat)
                for size, resolution in sizes.items()
                for repeat in range(entry.repeats)
            ]
    if problems:
        raise DataError(*problems)
    return items


@dataclass(frozen=True)
class Plan:
    """The order of a whole run."""

    seed: int
    items: tuple[Item, ...]
    dropout: tuple[float, ...]
    """Caption dropout of each data entry."""
    batch_size: int
    accumulate: int
    processes: int
    _epochs: dict[int, list[MicroBatch]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def micro_batches_per_epoch(self) -> int:
        """Forward passes that see every item once."""
        return sum(-(-count // self.batch_size) for count in Counter(item.size for item in self.items).values())

    @property
    def steps_per_epoch(self) -> float:
        return self.micro_batches_per_epoch / (self.accumulate * self.processes)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step` (from 1) for all processes; process r of p takes `[r::p]`."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        count = self.accumulate * self.processes
        return [self._micro_batch(index) for index in range((step - 1) * count, step * count)]

    def prompts(self) -> list[str]:
        """Every prompt that any step of any length of run can use."""
        prompts = {item.picture.prompt for item in self.items}
        return sorted(prompts | ({""} if any(self.dropout) else set()))

    def _micro_batch(self, index: int) -> MicroBatch:
        epoch, position = divmod(index, self.micro_batches_per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[MicroBatch]:
        """The last few epochs are kept; safe when the loop and its prefetching thread ask at the same time."""
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._order(epoch)
            for older in list(self._epochs)[:-2]:
                self._epochs.pop(older, None)
            self._epochs[epoch] = batches
        return batches

    def _order(self, epoch: int) -> list[MicroBatch]:
        order = sorted(self.items, key=lambda item: (number(self.seed, "order", epoch, *item.identity()), item.entry))
        groups: dict[Bucket, list[Item]] = {}
        for item in order:
            groups.setdefault(item.size, []).append(item)
        batches = [
            tuple(self._sample(item, epoch) for item in group[start : start + self.batch_size])
            for group in groups.values()
            for start in range(0, len(group), self.batch_size)
        ]
        return sorted(batches, key=lambda batch: number(self.seed, "batches", *batch[0].key()))

    def _sample(self, item: Item, epoch: int) -> Sample:
        draw = number(self.seed, "caption dropout", epoch, *item.identity()) / UINT63
        dropped = draw < self.dropout[item.entry]
        return Sample(item, epoch, "" if dropped else item.picture.prompt)


def make_plan(config: Config, items: list[Item], processes: int = 1) -> Plan:
    """The plan of a run: what is random in it follows from `config.seed` alone."""
    return Plan(
        seed=config.seed,
        items=tuple(items),
        dropout=tuple(entry.caption_dropout for entry in config.data),
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        processes=processes,
    )
