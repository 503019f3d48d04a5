"""Which samples each step trains on: a pure function of (seed, step), so a resumed run needs nothing but its step.

An epoch holds every item once, grouped by size into micro-batches; a step takes `accumulate` micro-batches for each
process. The order of an epoch is by hashed keys, so neither the file system nor an added picture rearranges it.
Regularisation pictures have epochs of their own and get their share of the micro-batches.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from zimage_train.config.dataset import Data
from zimage_train.config.schema import Config, Preserve
from zimage_train.dataset import captions
from zimage_train.dataset.buckets import Bucket, bucket
from zimage_train.dataset.scan import Picture
from zimage_train.errors import DataError, Problem
from zimage_train.rng import Part, number

UINT63 = 2**63


@dataclass(frozen=True)
class Item:
    """One picture at one size: what an epoch holds once."""

    entry: int
    picture: Picture
    resolution: int
    size: Bucket
    repeat: int
    flip: bool = False

    def identity(self) -> tuple[Part, ...]:
        """What an item's randomness is keyed by: its content and its use, never its name or place."""
        return (self.picture.digest, self.resolution, self.repeat, self.flip)


@dataclass(frozen=True)
class Sample:
    """One item in one epoch, with the prompt it is trained with there."""

    item: Item
    epoch: int
    prompt: str
    held: str | None = None
    """The prompt for which the model is held to what it was."""

    def key(self) -> tuple[Part, ...]:
        """The path of this sample's noise and sigma."""
        return (self.epoch, *self.item.identity())


MicroBatch = tuple[Sample, ...]


def items_of(config: Config, pictures: list[list[Picture]]) -> list[Item]:
    """Every picture at each of its resolutions, as often as it is repeated, and mirrored too where asked.

    Resolutions that give the same size count once.

    Raises:
        DataError: a picture is too narrow for a resolution; all of them are listed.
    """
    items, problems = [], []
    for index, (entry, found) in enumerate(zip(config.data, pictures, strict=True)):
        for picture in found:
            sizes: dict[Bucket, int] = {}
            for side in sides(entry):
                try:
                    sizes.setdefault(bucket(picture.width, picture.height, side), int(side))
                except ValueError as error:
                    problems.append(Problem(str(picture.path), str(error), "crop it or remove it"))
            items += [
                Item(index, picture, resolution, size, repeat, flip)
                for size, resolution in sizes.items()
                for repeat in range(picture.repeats)
                for flip in ((False, True) if entry.flip else (False,))
            ]
    if problems:
        raise DataError(*problems)
    return items


def sides(entry: Data) -> list[float]:
    """The roots of the areas that pictures of `entry` are trained at, px."""
    return [math.sqrt(entry.max_pixels)] if entry.max_pixels is not None else [float(one) for one in entry.resolution]


@dataclass(frozen=True)
class Stream:
    """Items that are seen in one order, epoch after epoch."""

    items: tuple[Item, ...]
    plan: "Plan" = field(repr=False, compare=False)
    _epochs: dict[int, list[MicroBatch]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def micro_batches_per_epoch(self) -> int:
        """Forward passes that see every item once."""
        counts = Counter((item.size, self.plan.most_of(item)) for item in self.items)
        return sum(-(-count // most) for (_, most), count in counts.items())

    def micro_batch(self, index: int) -> MicroBatch:
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
        seed = self.plan.seed
        order = sorted(self.items, key=lambda item: (number(seed, "order", epoch, *item.identity()), item.entry))
        groups: dict[tuple[Bucket, int], list[Item]] = {}
        for item in order:
            groups.setdefault((item.size, self.plan.most_of(item)), []).append(item)
        batches = [
            tuple(self.plan.sample(item, epoch) for item in group[start : start + most])
            for (_, most), group in groups.items()
            for start in range(0, len(group), most)
        ]
        return sorted(batches, key=lambda batch: number(seed, "batches", *batch[0].key()))


@dataclass(frozen=True)
class Plan:
    """The order of a whole run."""

    seed: int
    items: tuple[Item, ...]
    entries: tuple[Data, ...]
    """What `Item.entry` counts."""
    preserve: Preserve
    batch_size: int
    accumulate: int
    processes: int
    regularisation_share: float
    """Of the micro-batches, where there are regularisation items."""

    @cached_property
    def own(self) -> Stream:
        """The items of the concept."""
        return Stream(tuple(item for item in self.items if not self.entries[item.entry].regularisation), self)

    @cached_property
    def regularisation(self) -> Stream | None:
        """The items of its class, if there are any."""
        items = tuple(item for item in self.items if self.entries[item.entry].regularisation)
        return Stream(items, self) if items else None

    def most_of(self, item: Item) -> int:
        """Samples in a micro-batch of such items."""
        return self.entries[item.entry].batch_size or self.batch_size

    @property
    def share(self) -> float:
        """Of the micro-batches, those of regularisation items."""
        return self.regularisation_share if self.regularisation else 0.0

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which each item of the concept is seen once."""
        return self.own.micro_batches_per_epoch / (self.accumulate * self.processes * (1.0 - self.share))

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step` (from 1) for all processes; process r of p takes `[r::p]`."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        count = self.accumulate * self.processes
        return [self._micro_batch(index) for index in range((step - 1) * count, step * count)]

    def _micro_batch(self, index: int) -> MicroBatch:
        before = math.floor(index * self.share)
        if self.regularisation is not None and math.floor((index + 1) * self.share) > before:
            return self.regularisation.micro_batch(before)
        return self.own.micro_batch(index - before)

    def sample(self, item: Item, epoch: int) -> Sample:
        """`item` as it is trained in `epoch`."""
        entry = self.entries[item.entry]
        is_dropped = number(self.seed, "caption dropout", epoch, *item.identity()) / UINT63 < entry.caption_dropout
        prompt = captions.dropped(entry) if is_dropped else self.prompt(item, epoch)
        return Sample(item, epoch, prompt, captions.held(prompt, entry, self.preserve))

    def prompt(self, item: Item, epoch: int) -> str:
        """What `item` is trained with in `epoch` unless its caption is dropped; the same at every resolution."""

        def share(name: str, *more: int) -> float:
            return number(self.seed, name, epoch, item.picture.digest, item.repeat, *more) / UINT63

        return captions.draw(item.picture.prompts, self.entries[item.entry], share)

    def whole(self, item: Item) -> Sample:
        """`item` with the longest of its prompts, no tag or caption dropped."""
        prompt = item.picture.longest
        return Sample(item, 0, prompt, captions.held(prompt, self.entries[item.entry], self.preserve))

    def prompts(self, steps: int) -> list[str]:
        """Every prompt that a run of so many steps can use."""
        found: set[tuple[str, int]] = set()
        for item in self.items:
            entry = self.entries[item.entry]
            if captions.has_tags(entry):
                found.add((item.picture.longest, item.entry))  # for the rehearsal
                found |= {(self.prompt(item, epoch), item.entry) for epoch in range(self._epochs(item, steps))}
            else:
                found |= {(prompt, item.entry) for prompt in item.picture.prompts}
            if entry.caption_dropout:
                found.add((captions.dropped(entry), item.entry))
        held = {captions.held(prompt, self.entries[entry], self.preserve) for prompt, entry in found}
        return sorted({prompt for prompt, _ in found} | {prompt for prompt in held if prompt is not None})

    def _epochs(self, item: Item, steps: int) -> int:
        """How many epochs of such items a run of so many steps begins."""
        is_own = not self.entries[item.entry].regularisation
        stream = self.own if is_own else self.regularisation
        assert stream is not None
        passes = steps * self.accumulate * self.processes * (1.0 - self.share if is_own else self.share)
        return math.ceil(passes + 1) // stream.micro_batches_per_epoch + 1


def make_plan(config: Config, items: list[Item], processes: int = 1) -> Plan:
    """The plan of a run: what is random in it follows from `config.seed` alone."""
    return Plan(
        seed=config.seed,
        items=tuple(items),
        entries=tuple(config.data),
        preserve=config.preserve,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        processes=processes,
        regularisation_share=config.train.regularisation_share,
    )


def with_steps(config: Config, items: list[Item], processes: int) -> Config:
    """`config` with `train.steps` in place of `train.epochs`."""
    if config.train.epochs is None or not items:
        return config
    steps = math.ceil(config.train.epochs * make_plan(config, items, processes).steps_per_epoch - 1e-9)
    train = config.train.model_copy(update={"steps": max(steps, 1), "epochs": None})
    return config.model_copy(update={"train": train})
