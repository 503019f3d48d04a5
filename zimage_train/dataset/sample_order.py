"""The order of samples: a pure function of (seed, step), so that a resumed run needs nothing but its step.

An epoch holds every item once, in micro-batches of a single image size. A step takes `grad_accumulation` micro-batches
for each process. Regularization images have epochs of their own.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from zimage_train.config.dataset import DataEntry
from zimage_train.config.schema import Config, PreserveSettings
from zimage_train.dataset import captions
from zimage_train.dataset.buckets import Bucket, nearest_bucket
from zimage_train.dataset.scan import ImageRecord
from zimage_train.errors import DataError, Problem
from zimage_train.rng import KeyPart, keyed_int

UINT63 = 2**63
"""Number of values of `keyed_int`, by which it is divided for a number in [0, 1)."""


@dataclass(frozen=True)
class TrainItem:
    """A use of an image at a size. An epoch holds each item once."""

    entry: int
    """Index of the data entry."""
    image: ImageRecord
    resolution: int
    """Side of the square of equal area, px, from which `size` is chosen."""
    size: Bucket
    repeat: int
    """Which of the repeats of the image, from 0."""
    flip: bool
    """Whether the image is mirrored."""

    def identity(self) -> tuple[KeyPart, ...]:
        """Return the key of this item's random numbers."""
        # Only the content of the image and its use. If the key had a path or an index, moving a folder, renaming a file
        # or adding an image would change the random numbers of images that are still the same.
        return (self.image.digest, self.resolution, self.repeat, self.flip)

    @property
    def negative(self) -> "TrainItem | None":
        """The other image of a pair, in the same size and mirrored alike; None without pairs."""
        return None if self.image.negative is None else replace(self, image=self.image.negative)


@dataclass(frozen=True)
class Sample:
    """An item in an epoch, with the prompt that it has in this epoch."""

    item: TrainItem
    epoch: int
    prompt: str
    preserve_prompt: str | None = None
    """The prompt of the preservation loss, or None if that is off."""
    part: tuple[int, int] | None = None
    """With `timesteps.stratified`: which part of the density sigma is drawn from in epoch 0, and of how many."""

    def key(self) -> tuple[KeyPart, ...]:
        """Return the key of this sample's noise and sigma."""
        return (self.epoch, *self.item.identity())


def make_items(config: Config, images: list[list[ImageRecord]]) -> list[TrainItem]:
    """Return an item for each combination of image, size and repeat, and for its mirror image if the entry has `flip`.

    Args:
        config: each entry of its `data` says how its images are used.
        images: the images of each entry.

    Raises:
        DataError: images are too narrow for a resolution; all of them are listed.
    """
    items: list[TrainItem] = []
    problems: list[Problem] = []
    for index, (entry, records) in enumerate(zip(config.data, images, strict=True)):
        flips = (False, True) if entry.flip else (False,)
        for image in records:
            for size, resolution in _sizes_of(image, entry, problems):
                for repeat, flip in itertools.product(range(image.repeats), flips):
                    items.append(TrainItem(index, image, resolution, size, repeat, flip))
    if problems:
        raise DataError(*problems)
    return items


def _sizes_of(image: ImageRecord, entry: DataEntry, problems: list[Problem]) -> list[tuple[Bucket, int]]:
    """Return (size, resolution) for `image`, and add resolutions for which it is too narrow to `problems`."""
    sizes: list[tuple[Bucket, int]] = []
    for side in dict.fromkeys(target_sides(entry)):  # a resolution that is listed twice counts once
        try:
            size = nearest_bucket(image.width, image.height, side)
        except ValueError as error:
            problems.append(Problem(str(image.path), str(error), "crop it or remove it", "too-narrow"))
            continue
        # A small image, which is never upscaled, has one size at several resolutions, and is one item then.
        if entry.repeat_equal_sizes or size not in dict(sizes):
            sizes.append((size, int(side)))
    return sizes


def target_sides(entry: DataEntry) -> list[float]:
    """Return the square roots of the areas at which images of `entry` are trained, px."""
    if entry.max_pixels is not None:
        return [math.sqrt(entry.max_pixels)]
    return [float(resolution) for resolution in entry.resolution]


class EpochStream:
    """The micro-batches of some items, epoch after epoch, numbered from 0 without end."""

    def __init__(self, items: tuple[TrainItem, ...], order: "SampleOrder") -> None:
        self.items = items
        self.order = order
        self._epochs: dict[int, list[tuple[Sample, ...]]] = {}

    @cached_property
    def micro_batches_per_epoch(self) -> int:
        """The number of micro-batches that hold every item once."""
        counts = Counter((item.size, self.order.batch_size_of(item)) for item in self.items)
        return sum(math.ceil(count / batch_size) for (_, batch_size), count in counts.items())

    @cached_property
    def parts(self) -> dict[tuple[KeyPart, ...], int]:
        """The place of each item, by entry and identity, in an order of their own, which all epochs have in common."""
        seed = self.order.seed
        keys = [(item.entry, *item.identity()) for item in self.items]
        keys.sort(key=lambda key: (keyed_int(seed, "part", *key[1:]), key[0]))
        return {key: index for index, key in enumerate(keys)}

    def micro_batch(self, index: int) -> tuple[Sample, ...]:
        """Return the micro-batch number `index`."""
        epoch, position = divmod(index, self.micro_batches_per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[tuple[Sample, ...]]:
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._make_epoch(epoch)
            # Sorting an epoch takes a hash of each item, too slow to repeat for each micro-batch. Three are kept,
            # since a step may lie in two of them and the thread that prefetches may be in a third already. If that
            # thread and the loop are here at once, both make the same list, and popping a key twice does no harm.
            for older in list(self._epochs)[:-2]:
                self._epochs.pop(older, None)
            self._epochs[epoch] = batches
        return batches

    def _make_epoch(self, epoch: int) -> list[tuple[Sample, ...]]:
        """Return the micro-batches of `epoch` in their order."""
        seed = self.order.seed

        # Sorted by a hash of each item instead of shuffled: a shuffle depends on the number of items and on the order
        # in which the file system lists them. By hashes, an added image takes a place of its own and the others keep
        # their order. An image that is in two entries has one hash, so the entry decides.
        def item_key(item: TrainItem) -> tuple[int, int]:
            return keyed_int(seed, "order", epoch, *item.identity()), item.entry

        groups: dict[tuple[Bucket, int], list[TrainItem]] = {}
        for item in sorted(self.items, key=item_key):
            groups.setdefault((item.size, self.order.batch_size_of(item)), []).append(item)
        batches: list[tuple[Sample, ...]] = []
        for (_, batch_size), group in groups.items():
            for start in range(0, len(group), batch_size):
                batches.append(tuple(self.order.sample(item, epoch) for item in group[start : start + batch_size]))
        # The micro-batches are still grouped by size, so they are sorted too, by a hash of their first sample. An item
        # is in a single micro-batch of an epoch, so the hashes differ, and they do not depend on how full a batch is.
        return sorted(batches, key=lambda batch: keyed_int(seed, "batches", *batch[0].key()))


@dataclass(frozen=True)
class SampleOrder:
    """The samples of each step of a run."""

    seed: int
    items: tuple[TrainItem, ...]
    entries: tuple[DataEntry, ...]
    """The data entries, by `TrainItem.entry`."""
    preserve: PreserveSettings
    batch_size: int
    """Samples in a micro-batch, unless their entry has another number."""
    grad_accumulation: int
    world_size: int
    """Number of processes."""
    regularization_share: float
    """Fraction of the micro-batches that hold regularization items, if there are any."""
    stratified: bool
    """Whether the sigmas of an epoch are drawn from equal parts of their density."""

    # Regularization images have epochs of their own. In a common epoch the share of each kind would follow from the
    # number of its images: 10 photos beside 1000 class images would be 1% of the samples.

    @cached_property
    def concept(self) -> EpochStream:
        """The items of the concept."""
        return EpochStream(tuple(item for item in self.items if not self.entries[item.entry].regularization), self)

    @cached_property
    def regularization(self) -> EpochStream | None:
        """The regularization items, or None if there are none."""
        items = tuple(item for item in self.items if self.entries[item.entry].regularization)
        return EpochStream(items, self) if items else None

    def batch_size_of(self, item: TrainItem) -> int:
        """Return the number of samples in a full micro-batch of items such as `item`."""
        return self.entries[item.entry].batch_size or self.batch_size

    @property
    def negatives(self) -> list[TrainItem]:
        """The other images of pairs."""
        return [item.negative for item in self.items if item.negative is not None]

    @property
    def effective_regularization_share(self) -> float:
        """The fraction of the micro-batches that hold regularization items; 0 if there are none."""
        return self.regularization_share if self.regularization else 0.0

    @property
    def steps_per_epoch(self) -> float:
        """The number of steps in which each item of the concept is seen once."""
        concept_share = 1.0 - self.effective_regularization_share
        return self.concept.micro_batches_per_epoch / (self.grad_accumulation * self.world_size * concept_share)

    def step_batches(self, step: int) -> list[tuple[Sample, ...]]:
        """Return the micro-batches of `step` (from 1) for all processes; process r of p takes `[r::p]`.

        A step depends on the product of `grad_accumulation` and the number of processes alone: two processes that
        accumulate 2 train on the samples of one process that accumulates 4.
        """
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        # Processes take strides and not blocks of this list, so that they are in the same part of the order at any
        # time: the first micro-batches of all processes are the first of the step.
        count = self.grad_accumulation * self.world_size
        return [self._micro_batch(index) for index in range((step - 1) * count, step * count)]

    def _micro_batch(self, index: int) -> tuple[Sample, ...]:
        # With a share f, floor(index * f) micro-batches before this one were of regularization, evenly spread; this one
        # is where the floor goes up. So the place in both streams follows from `index`, without a counter to save.
        share = self.effective_regularization_share
        num_before = math.floor(index * share)
        if self.regularization is not None and math.floor((index + 1) * share) > num_before:
            return self.regularization.micro_batch(num_before)
        return self.concept.micro_batch(index - num_before)

    def sample(self, item: TrainItem, epoch: int) -> Sample:
        """Return `item` as it is trained in `epoch`."""
        entry = self.entries[item.entry]
        draw = keyed_int(self.seed, "caption dropout", epoch, *item.identity()) / UINT63
        prompt = captions.dropout_prompt(entry) if draw < entry.caption_dropout else self.prompt(item, epoch)
        return Sample(item, epoch, prompt, captions.preserve_prompt(prompt, entry, self.preserve), self._part(item))

    def _part(self, item: TrainItem) -> tuple[int, int] | None:
        if not self.stratified:
            return None
        parts = self._stream_of(item).parts
        return parts[(item.entry, *item.identity())], len(parts)

    def _stream_of(self, item: TrainItem) -> EpochStream:
        stream = self.regularization if self.entries[item.entry].regularization else self.concept
        assert stream is not None
        return stream

    def prompt(self, item: TrainItem, epoch: int) -> str:
        """Return the prompt of `item` in `epoch` unless its caption is dropped."""

        # The resolution is not in the key: an image has the same prompt at all of them, so fewer prompts are encoded.
        def uniform(name: str, *key: int) -> float:
            return keyed_int(self.seed, name, epoch, item.image.digest, item.repeat, *key) / UINT63

        return captions.sample_prompt(item.image.prompts, self.entries[item.entry], uniform)

    def longest_sample(self, item: TrainItem) -> Sample:
        """Return `item` with the longest of its prompts, no tag or caption dropped."""
        prompt = item.image.longest_prompt
        return Sample(item, 0, prompt, captions.preserve_prompt(prompt, self.entries[item.entry], self.preserve))

    def prompts(self, steps: int) -> list[str]:
        """Return every prompt that a run of `steps` steps can use, sorted."""
        used: set[tuple[str, int]] = set()  # (prompt, index of its entry)
        for item in self.items:
            entry = self.entries[item.entry]
            if captions.has_tags(entry):
                used.add((item.image.longest_prompt, item.entry))  # for the dry run; see `longest_sample`
                for epoch in range(self._num_epochs(item, steps)):
                    used.add((self.prompt(item, epoch), item.entry))
            else:
                used.update((prompt, item.entry) for prompt in item.image.prompts)
            if entry.caption_dropout:
                used.add((captions.dropout_prompt(entry), item.entry))
        prompts: set[str] = set()
        for prompt, entry_index in used:
            prompts.add(prompt)
            preserve_prompt = captions.preserve_prompt(prompt, self.entries[entry_index], self.preserve)
            if preserve_prompt is not None:
                prompts.add(preserve_prompt)
        return sorted(prompts)

    def _num_epochs(self, item: TrainItem, steps: int) -> int:
        """Return the number of epochs of the stream of `item` that a run of `steps` steps begins."""
        count = steps * self.grad_accumulation * self.world_size
        of_stream = math.floor(count * self.effective_regularization_share)  # as `_micro_batch` counts them
        stream = self._stream_of(item)
        if stream is self.concept:
            of_stream = count - of_stream
        return math.ceil(of_stream / stream.micro_batches_per_epoch)


def make_sample_order(config: Config, items: list[TrainItem], processes: int = 1) -> SampleOrder:
    """Return the order of `items` in a run of `processes` processes; its randomness depends on `config.seed` alone."""
    return SampleOrder(
        seed=config.seed,
        items=tuple(items),
        entries=tuple(config.data),
        preserve=config.preserve,
        batch_size=config.train.batch_size,
        grad_accumulation=config.train.grad_accumulation,
        world_size=processes,
        regularization_share=config.train.regularization_share,
        stratified=config.timesteps.stratified,
    )


def resolve_epochs(config: Config, order: SampleOrder) -> Config:
    """Return `config` with `train.steps` in place of `train.epochs`."""
    if config.train.epochs is None or not order.items:
        return config
    # 2 epochs of 4.5 steps are 9 steps; the margin keeps a product such as 9.0000000001 from becoming 10.
    steps = math.ceil(config.train.epochs * order.steps_per_epoch - 1e-9)
    train = config.train.model_copy(update={"steps": max(steps, 1), "epochs": None})
    return config.model_copy(update={"train": train})
