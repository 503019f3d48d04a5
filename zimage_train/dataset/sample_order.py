"""Which samples each step trains on: a pure function of (seed, step), so a resumed run needs nothing but its step.

An epoch holds every item once, grouped by size into micro-batches; a step takes `accumulate` micro-batches for each
process. The order of an epoch is by hashed keys, so neither the file system nor an added image rearranges it.
Regularization images have epochs of their own and get their share of the micro-batches.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from zimage_train.config.dataset import DataEntry
from zimage_train.config.schema import Config, PreserveSettings
from zimage_train.dataset import captions
from zimage_train.dataset.buckets import Bucket, nearest_bucket
from zimage_train.dataset.scan import ImageRecord
from zimage_train.errors import DataError, Problem
from zimage_train.rng import KeyPart, keyed_int

UINT63 = 2**63


@dataclass(frozen=True)
class TrainItem:
    """One image at one size: what an epoch holds once."""

    entry: int
    image: ImageRecord
    resolution: int
    size: Bucket
    repeat: int
    flip: bool = False

    def identity(self) -> tuple[KeyPart, ...]:
        """What an item's randomness is keyed by: its content and its use, never its name or place."""
        return (self.image.digest, self.resolution, self.repeat, self.flip)


@dataclass(frozen=True)
class Sample:
    """One item in one epoch, with the prompt it is trained with there."""

    item: TrainItem
    epoch: int
    prompt: str
    preserve_prompt: str | None = None
    """The prompt for which the model is held to what it was."""

    def key(self) -> tuple[KeyPart, ...]:
        """The path of this sample's noise and sigma."""
        return (self.epoch, *self.item.identity())


MicroBatch = tuple[Sample, ...]


def make_items(config: Config, images: list[list[ImageRecord]]) -> list[TrainItem]:
    """Every image at each of its resolutions, as often as it is repeated, and mirrored too where asked.

    Resolutions that give the same size count once.

    Raises:
        DataError: an image is too narrow for a resolution; all of them are listed.
    """
    items, problems = [], []
    for index, (entry, found) in enumerate(zip(config.data, images, strict=True)):
        for image in found:
            sizes: dict[Bucket, int] = {}
            for side in target_sides(entry):
                try:
                    sizes.setdefault(nearest_bucket(image.width, image.height, side), int(side))
                except ValueError as error:
                    problems.append(Problem(str(image.path), str(error), "crop it or remove it"))
            items += [
                TrainItem(index, image, resolution, size, repeat, flip)
                for size, resolution in sizes.items()
                for repeat in range(image.repeats)
                for flip in ((False, True) if entry.flip else (False,))
            ]
    if problems:
        raise DataError(*problems)
    return items


def target_sides(entry: DataEntry) -> list[float]:
    """The roots of the areas that images of `entry` are trained at, px."""
    return [math.sqrt(entry.max_pixels)] if entry.max_pixels is not None else [float(one) for one in entry.resolution]


@dataclass(frozen=True)
class EpochStream:
    """Items that are seen in one order, epoch after epoch."""

    items: tuple[TrainItem, ...]
    order: "SampleOrder" = field(repr=False, compare=False)
    _epochs: dict[int, list[MicroBatch]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def micro_batches_per_epoch(self) -> int:
        """Forward passes that see every item once."""
        counts = Counter((item.size, self.order.batch_size_of(item)) for item in self.items)
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
        seed = self.order.seed
        order = sorted(self.items, key=lambda item: (keyed_int(seed, "order", epoch, *item.identity()), item.entry))
        groups: dict[tuple[Bucket, int], list[TrainItem]] = {}
        for item in order:
            groups.setdefault((item.size, self.order.batch_size_of(item)), []).append(item)
        batches = [
            tuple(self.order.sample(item, epoch) for item in group[start : start + most])
            for (_, most), group in groups.items()
            for start in range(0, len(group), most)
        ]
        return sorted(batches, key=lambda batch: keyed_int(seed, "batches", *batch[0].key()))


@dataclass(frozen=True)
class SampleOrder:
    """The order of a whole run."""

    seed: int
    items: tuple[TrainItem, ...]
    entries: tuple[DataEntry, ...]
    """What `Item.entry` counts."""
    preserve: PreserveSettings
    batch_size: int
    grad_accumulation: int
    world_size: int
    regularization_share: float
    """Of the micro-batches, where there are regularization items."""

    @cached_property
    def concept(self) -> EpochStream:
        """The items of the concept."""
        return EpochStream(tuple(item for item in self.items if not self.entries[item.entry].regularization), self)

    @cached_property
    def regularization(self) -> EpochStream | None:
        """The items of its class, if there are any."""
        items = tuple(item for item in self.items if self.entries[item.entry].regularization)
        return EpochStream(items, self) if items else None

    def batch_size_of(self, item: TrainItem) -> int:
        """Samples in a micro-batch of such items."""
        return self.entries[item.entry].batch_size or self.batch_size

    @property
    def effective_regularization_share(self) -> float:
        """Of the micro-batches, those of regularization items."""
        return self.regularization_share if self.regularization else 0.0

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which each item of the concept is seen once."""
        return self.concept.micro_batches_per_epoch / (
            self.grad_accumulation * self.world_size * (1.0 - self.effective_regularization_share)
        )

    def step_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step` (from 1) for all processes; process r of p takes `[r::p]`."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        count = self.grad_accumulation * self.world_size
        return [self._micro_batch(index) for index in range((step - 1) * count, step * count)]

    def _micro_batch(self, index: int) -> MicroBatch:
        before = math.floor(index * self.effective_regularization_share)
        if self.regularization is not None and math.floor((index + 1) * self.effective_regularization_share) > before:
            return self.regularization.micro_batch(before)
        return self.concept.micro_batch(index - before)

    def sample(self, item: TrainItem, epoch: int) -> Sample:
        """`item` as it is trained in `epoch`."""
        entry = self.entries[item.entry]
        is_dropped = keyed_int(self.seed, "caption dropout", epoch, *item.identity()) / UINT63 < entry.caption_dropout
        prompt = captions.dropout_prompt(entry) if is_dropped else self.prompt(item, epoch)
        return Sample(item, epoch, prompt, captions.preserve_prompt(prompt, entry, self.preserve))

    def prompt(self, item: TrainItem, epoch: int) -> str:
        """What `item` is trained with in `epoch` unless its caption is dropped; the same at every resolution."""

        def share(name: str, *more: int) -> float:
            return keyed_int(self.seed, name, epoch, item.image.digest, item.repeat, *more) / UINT63

        return captions.sample_prompt(item.image.prompts, self.entries[item.entry], share)

    def longest_sample(self, item: TrainItem) -> Sample:
        """`item` with the longest of its prompts, no tag or caption dropped."""
        prompt = item.image.longest_prompt
        return Sample(item, 0, prompt, captions.preserve_prompt(prompt, self.entries[item.entry], self.preserve))

    def prompts(self, steps: int) -> list[str]:
        """Every prompt that a run of so many steps can use."""
        found: set[tuple[str, int]] = set()
        for item in self.items:
            entry = self.entries[item.entry]
            if captions.has_tags(entry):
                found.add((item.image.longest_prompt, item.entry))  # for the rehearsal
                found |= {(self.prompt(item, epoch), item.entry) for epoch in range(self._epochs(item, steps))}
            else:
                found |= {(prompt, item.entry) for prompt in item.image.prompts}
            if entry.caption_dropout:
                found.add((captions.dropout_prompt(entry), item.entry))
        held = {captions.preserve_prompt(prompt, self.entries[entry], self.preserve) for prompt, entry in found}
        return sorted({prompt for prompt, _ in found} | {prompt for prompt in held if prompt is not None})

    def _epochs(self, item: TrainItem, steps: int) -> int:
        """How many epochs of such items a run of so many steps begins."""
        is_own = not self.entries[item.entry].regularization
        stream = self.concept if is_own else self.regularization
        assert stream is not None
        passes = (
            steps
            * self.grad_accumulation
            * self.world_size
            * (1.0 - self.effective_regularization_share if is_own else self.effective_regularization_share)
        )
        return math.ceil(passes + 1) // stream.micro_batches_per_epoch + 1


def make_sample_order(config: Config, items: list[TrainItem], processes: int = 1) -> SampleOrder:
    """The plan of a run: what is random in it follows from `config.seed` alone."""
    return SampleOrder(
        seed=config.seed,
        items=tuple(items),
        entries=tuple(config.data),
        preserve=config.preserve,
        batch_size=config.train.batch_size,
        grad_accumulation=config.train.grad_accumulation,
        world_size=processes,
        regularization_share=config.train.regularization_share,
    )


def resolve_epochs(config: Config, order: SampleOrder) -> Config:
    """Return `config` with `train.steps` in place of `train.epochs`."""
    if config.train.epochs is None or not order.items:
        return config
    # 2 epochs of 4.5 steps are 9 steps; the margin keeps a product such as 9.0000000001 from becoming 10.
    steps = math.ceil(config.train.epochs * order.steps_per_epoch - 1e-9)
    train = config.train.model_copy(update={"steps": max(steps, 1), "epochs": None})
    return config.model_copy(update={"train": train})
