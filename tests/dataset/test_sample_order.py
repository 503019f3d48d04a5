"""The plan of a run is a function of (seed, step): nothing is dropped or doubled, however the work is divided."""

import hashlib
import itertools
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_train.config.schema import Config, PreserveSettings
from zimage_train.dataset.sample_order import (
    Sample,
    SampleOrder,
    TrainItem,
    make_items,
    make_sample_order,
    resolve_epochs,
)
from zimage_train.dataset.scan import ImageRecord
from zimage_train.errors import DataError
from zimage_train.rng import keyed_generator, keyed_int

quick = settings(deadline=None, derandomize=True, max_examples=60)
SIZES = [(128, 128), (96, 64), (64, 96), (200, 100)]


def images(count: int, sizes: list[tuple[int, int]] = SIZES, tag: str = "") -> list[ImageRecord]:
    """`count` different images of mixed sizes; the name says nothing about the content."""
    return [
        ImageRecord(
            Path(f"{tag}{index:03d}.png"),
            hashlib.sha256(f"{tag}{index}".encode()).hexdigest(),
            *sizes[index % len(sizes)],
            (f"prompt {tag}{index}",),
        )
        for index in range(count)
    ]


def config(
    seed: int = 0, batch_size: int = 1, grad_accumulation: int = 1, entries: list[dict[str, Any]] | None = None
) -> Config:
    return Config.model_validate(
        {
            "name": "a",
            "seed": seed,
            "data": [{"folder": "x", "resolution": [64]} | entry for entry in entries or [{}]],
            "train": {"batch_size": batch_size, "grad_accumulation": grad_accumulation},
        }
    )


def plan_of(
    count: int = 12, processes: int = 1, found: list[list[ImageRecord]] | None = None, **settings: Any
) -> SampleOrder:
    made = config(**settings)
    return make_sample_order(made, make_items(made, found or [images(count)]), processes)


def first_batches(plan: SampleOrder, count: int) -> list[tuple[Sample, ...]]:
    """The first `count` micro-batches, step by step."""
    steps = itertools.count(1)
    return list(itertools.islice(itertools.chain.from_iterable(map(plan.step_batches, steps)), count))


def samples_of(batches: list[tuple[Sample, ...]]) -> list[Sample]:
    return [sample for batch in batches for sample in batch]


counts = st.integers(1, 40)
batch_sizes = st.integers(1, 6)
few = st.integers(1, 4)


# Epochs


@quick
@given(counts, batch_sizes, few, few, st.integers(0, 2**63 - 1))
def test_each_epoch_has_every_item_once(count: int, batch_size: int, grad_accumulation: int, processes: int, seed: int):
    plan = plan_of(count, processes, seed=seed, batch_size=batch_size, grad_accumulation=grad_accumulation)
    per_epoch = plan.concept.micro_batches_per_epoch
    batches = first_batches(plan, 3 * per_epoch)
    for epoch in range(3):
        samples = samples_of(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert {sample.epoch for sample in samples} == {epoch}
        assert Counter(sample.item for sample in samples) == Counter(plan.items)
    assert plan.steps_per_epoch == per_epoch / (grad_accumulation * processes)


@quick
@given(counts, batch_sizes, st.integers(0, 99))
def test_micro_batches_are_full(count: int, batch_size: int, seed: int):
    """Micro-batches have images of equal size, and are as full as possible."""
    plan = plan_of(count, seed=seed, batch_size=batch_size)
    batches = first_batches(plan, plan.concept.micro_batches_per_epoch)
    by_size: dict[Any, list[int]] = {}
    for batch in batches:
        (size,) = {sample.item.size for sample in batch}
        by_size.setdefault(size, []).append(len(batch))
    for size, lengths in by_size.items():
        total = sum(item.size == size for item in plan.items)
        assert sorted(lengths, reverse=True) == [batch_size] * (total // batch_size) + [total % batch_size] * (
            total % batch_size > 0
        )


def test_a_step_runs_on_into_the_next_epoch():
    plan = plan_of(5, grad_accumulation=3)
    epochs = [[sample.epoch for sample in samples_of(plan.step_batches(step))] for step in range(1, 6)]
    assert epochs == [[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 2, 2], [2, 2, 2]]


def test_order_defaults_to_one_process():
    """A sample order is for a single process by default."""
    plan = make_sample_order(config(grad_accumulation=2), make_items(config(), [images(4)]))
    assert (plan.world_size, len(plan.step_batches(1)), plan.steps_per_epoch) == (1, 2, 2.0)


def test_one_step_may_hold_several_epochs():
    plan = plan_of(2, grad_accumulation=7)
    assert [sample.epoch for sample in samples_of(plan.step_batches(1) + plan.step_batches(2))] == [
        n // 2 for n in range(14)
    ]


def test_order_depends_on_epoch_and_seed():
    """The order differs between epochs and between seeds."""

    def order(seed: int, epoch: int) -> list[TrainItem]:
        plan = plan_of(30, seed=seed)
        return [
            sample.item for sample in samples_of([plan.step_batches(30 * epoch + step)[0] for step in range(1, 31)])
        ]

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert order(0, 0) == orders[0]
    first = Counter(order(seed, 0)[0].image.path for seed in range(60))
    assert max(first.values()) < 12, "the first place is shared out"


def test_sizes_are_mixed_through_the_epoch():
    plan = plan_of(40, batch_size=2)
    sizes = [batch[0].item.size for batch in first_batches(plan, plan.concept.micro_batches_per_epoch)]
    changes = sum(one != other for one, other in itertools.pairwise(sizes))
    assert changes > len(set(sizes)) + 2


# A function of the step


@settings(quick, max_examples=30)
@given(counts, batch_sizes, few, st.lists(st.integers(1, 25), min_size=1, max_size=6))
def test_any_step_alone_is_the_same(count: int, batch_size: int, grad_accumulation: int, steps: list[int]):
    """Any step computed alone equals that step of the whole run."""
    settings = {"batch_size": batch_size, "grad_accumulation": grad_accumulation}
    whole = [plan_of(count, **settings).step_batches(step) for step in range(1, 26)]
    shared = plan_of(count, **settings)
    assert [shared.step_batches(step) for step in steps] == [whole[step - 1] for step in steps]
    assert plan_of(count, **settings).step_batches(steps[-1]) == whole[steps[-1] - 1]
    sequence = [plan_of(count, **settings).step_batches(step) for step in range(1, 4)]
    assert sequence == whole[:3]


@quick
@given(counts, batch_sizes, st.integers(1, 3), st.integers(2, 4))
def test_processes_divide_the_same_work(count: int, batch_size: int, grad_accumulation: int, processes: int):
    """Processes and accumulation divide the same work."""
    several = plan_of(count, processes, batch_size=batch_size, grad_accumulation=grad_accumulation)
    alone = plan_of(count, 1, batch_size=batch_size, grad_accumulation=grad_accumulation * processes)
    for step in range(1, 6):
        assert several.step_batches(step) == alone.step_batches(step)
        shares = [several.step_batches(step)[rank::processes] for rank in range(processes)]
        assert all(len(share) == grad_accumulation for share in shares)
        shared = samples_of([batch for share in shares for batch in share])
        assert Counter(shared) == Counter(samples_of(alone.step_batches(step)))


def test_there_is_no_step_before_the_first():
    for step in (0, -1):
        with pytest.raises(ValueError, match="steps count from 1"):
            plan_of().step_batches(step)


def test_order_of_items_changes_nothing():
    """The order in which items were found changes nothing."""
    items = make_items(config(), [images(20)])
    shuffled = random.Random(3).sample(items, len(items))
    assert shuffled != items
    plans = [make_sample_order(config(batch_size=3), one) for one in (items, shuffled)]
    assert [plans[0].step_batches(step) for step in range(1, 30)] == [
        plans[1].step_batches(step) for step in range(1, 30)
    ]


def test_renamed_image_keeps_its_noise():
    """A renamed image keeps its place and its noise."""
    before = [images(10)]
    after = [[ImageRecord(Path("new") / one.path, one.digest, one.width, one.height, one.prompts) for one in before[0]]]
    plans = [plan_of(found=found, batch_size=2) for found in (before, after)]
    keys = [[sample.key() for sample in samples_of(first_batches(plan, 20))] for plan in plans]
    assert keys[0] == keys[1]


def test_added_image_moves_no_other():
    """An additional image does not rearrange the others."""

    def order(found: list[ImageRecord]) -> list[str]:
        plan = plan_of(found=[found])
        return [sample.item.image.digest for sample in samples_of(first_batches(plan, len(found)))]

    others = images(20)
    more = images(1, tag="new")
    with_it = order(others[:7] + more + others[7:])
    assert [one for one in with_it if one != more[0].digest] == order(others)


def test_two_threads_may_ask_at_once():
    expected = [plan_of(3, grad_accumulation=2).step_batches(step) for step in range(1, 400)]
    plan, wrong = plan_of(3, grad_accumulation=2), []

    def ask(offset: int) -> None:
        try:
            for step in range(1 + offset, 400):
                if plan.step_batches(step) != expected[step - 1]:
                    wrong.append(step)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in (0, 1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(plan.concept._epochs) <= 6, "epochs that are over are forgotten"


# Randomness by key


@quick
@given(counts, st.lists(batch_sizes, min_size=2, max_size=2, unique=True), few, few)
def test_batch_size_changes_no_key(count: int, sizes: list[int], grad_accumulation: int, processes: int):
    """The batch size changes no sample's key and no prompt."""
    found = []
    for batch_size in sizes:
        plan = plan_of(
            count,
            processes,
            batch_size=batch_size,
            grad_accumulation=grad_accumulation,
            entries=[{"caption_dropout": 0.4}],
        )
        samples = samples_of(first_batches(plan, 2 * plan.concept.micro_batches_per_epoch))
        found.append({sample.key(): (sample.item, sample.prompt) for sample in samples})
        assert len(found[-1]) == 2 * count, "no two samples share their noise"
    assert found[0] == found[1]


def test_sample_keys_are_unique():
    """Every sample of a run has its own key."""
    entries = [{"resolution": [64, 96, 128], "repeats": 3}, {"resolution": [64]}]
    plan = plan_of(found=[images(5), images(4, tag="b")], entries=entries)
    samples = samples_of(first_batches(plan, 3 * plan.concept.micro_batches_per_epoch))
    assert len({sample.key() for sample in samples}) == len(samples) == 3 * len(plan.items)


def test_noise_of_a_sample_is_independent():
    """A sample's noise does not depend on other images or settings."""
    lonely = plan_of(found=[images(1)])
    crowd = plan_of(found=[images(8)], batch_size=4, grad_accumulation=2, entries=[{"caption_dropout": 0.9}])
    (key,) = [sample.key() for sample in samples_of(lonely.step_batches(1))]
    epoch = samples_of(first_batches(crowd, crowd.concept.micro_batches_per_epoch))
    assert key in {sample.key() for sample in epoch}


# Items


def test_resolutions_of_equal_size():
    """Resolutions that give the same size count once."""
    entry = [{"resolution": [512, 768, 64, 96]}]
    items = make_items(config(entries=entry), [images(3, sizes=[(100, 100), (64, 64), (80, 80)])])
    sizes = [[item.size.width for item in items if item.image.path.name == f"{n:03d}.png"] for n in range(3)]
    assert sizes == [[96, 64], [64], [80, 64]]
    assert [item.resolution for item in items][:3] == [512, 64, 512]


def test_equal_sizes_may_repeat():
    """With `repeat_equal_sizes` each resolution counts, with noise of its own; one that is listed twice counts once."""
    entry = [{"resolution": [512, 768, 64, 512], "repeat_equal_sizes": True}]
    items = make_items(config(entries=entry), [images(2, sizes=[(100, 100), (64, 64)])])
    found = [(item.image.path.name, item.size.width, item.resolution) for item in items]
    assert found == [
        ("000.png", 96, 512), ("000.png", 96, 768), ("000.png", 64, 64),
        ("001.png", 64, 512), ("001.png", 64, 768), ("001.png", 64, 64),
    ]  # fmt: skip
    assert len({item.identity() for item in items}) == 6
    order = make_sample_order(config(entries=entry), items)
    assert order.concept.micro_batches_per_epoch == 6


def test_repeats_are_items_of_their_own():
    thrice = [replace(image, repeats=3) for image in images(2)]
    items = make_items(config(entries=[{}, {}]), [thrice, images(1, tag="b")])
    assert [(item.entry, item.repeat) for item in items] == [(0, 0), (0, 1), (0, 2)] * 2 + [(1, 0)]
    assert len({item.identity() for item in items}) == 7


def test_narrow_images_are_all_listed():
    """Images that are too narrow are all listed."""
    strips = images(3, sizes=[(5000, 64), (128, 128), (64, 5000)])
    with pytest.raises(DataError) as caught:
        make_items(config(), [strips])
    assert [problem.location for problem in caught.value.problems] == ["000.png", "002.png"]
    assert "too narrow for resolution 64; crop it or remove it" in str(caught.value)
    with pytest.raises(DataError) as caught:
        make_items(config(entries=[{"resolution": [64, 128]}]), [strips])
    assert len(caught.value.problems) == 4, "each at both resolutions"


def test_entries_need_their_images():
    with pytest.raises(ValueError, match="shorter"):
        make_items(config(entries=[{}, {}]), [images(1)])


# Caption dropout


def test_caption_dropout_rate():
    """Captions are dropped at the given rate."""
    share = 0.3
    plan = plan_of(100, seed=1, entries=[{"caption_dropout": share}])
    samples = samples_of(first_batches(plan, 40 * 100))
    dropped = sum(sample.prompt == "" for sample in samples)
    deviation = (4000 * share * (1 - share)) ** 0.5
    assert abs(dropped - 4000 * share) < 4 * deviation
    by_image = Counter(sample.item.image.path for sample in samples if sample.prompt == "")
    assert len(by_image) == 100 and max(by_image.values()) <= 25, "each image now and then"
    kept = {(sample.item.image.prompts[0], sample.prompt) for sample in samples if sample.prompt}
    assert all(own == used for own, used in kept)


@pytest.mark.parametrize(("share", "prompts"), [(0.0, {f"prompt {n}" for n in range(6)}), (1.0, {""})])
def test_none_and_all_captions_are_dropped(share: float, prompts: set[str]):
    plan = plan_of(6, entries=[{"caption_dropout": share}])
    assert {sample.prompt for sample in samples_of(first_batches(plan, 300))} == prompts


def test_each_entry_has_its_own_dropout():
    entries = [{"caption_dropout": 1.0}, {"caption_dropout": 0.0}]
    plan = plan_of(found=[images(4), images(4, tag="b")], entries=entries)
    for sample in samples_of(first_batches(plan, 40)):
        assert (sample.prompt == "") == (sample.item.entry == 0)


@quick
@given(counts, st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.0, 0.2]), st.integers(0, 9))
def test_prompts_are_known_beforehand(count: int, share: float, other: float, seed: int):
    """With caption dropout, every prompt of the run is known before it starts."""
    entries = [{"caption_dropout": share}, {"caption_dropout": other}]
    plan = plan_of(found=[images(count), images(2, tag="b")], seed=seed, entries=entries)
    used = {sample.prompt for sample in samples_of(first_batches(plan, 3 * plan.concept.micro_batches_per_epoch))}
    own = {item.image.prompts[0] for item in plan.items}
    assert used <= set(plan.prompts(100)) == own | ({""} if share or other else set())
    assert plan.prompts(100) == sorted(set(plan.prompts(100)))


# Keys


def test_numbers_are_the_same_for_ever():
    assert keyed_int(42, "noise", 3, "abc", 512, 0, False) == 5414125045526241929
    assert keyed_int(0) != keyed_int(1)


def test_keys_do_not_collide():
    """Keys do not collide, and values of different types give different keys."""
    paths = [(epoch, str(image), 512, repeat) for epoch in range(50) for image in range(200) for repeat in range(10)]
    numbers = {keyed_int(7, *path) for path in paths}
    assert len(numbers) == len(paths) == 100_000
    assert all(0 <= one < 2**63 for one in numbers)
    assert (
        len({keyed_int(0, *path) for path in [(1,), ("1",), (1.0,), (True,), (None,), (1, ""), ("1", ""), ("", 1)]})
        == 8
    )
    low = sum(one < 2**62 for one in numbers)
    assert abs(low - 50_000) < 4 * 158


def test_generators_are_independent():
    """Generators start afresh, and leave the global generator alone."""
    torch = pytest.importorskip("torch")
    before = torch.random.get_rng_state()
    one = torch.randn(8, generator=keyed_generator(1, "noise", 2))
    assert torch.equal(one, torch.randn(8, generator=keyed_generator(1, "noise", 2)))
    assert not torch.equal(one, torch.randn(8, generator=keyed_generator(1, "noise", 3)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert keyed_generator(1).device.type == "cpu"


# Mirrored images, sizes of their own, batches of their own


def test_mirrored_images_are_samples():
    """Mirrored images are samples of their own, with noise of their own."""
    plain, flipped = (make_items(config(entries=[entry]), [images(3)]) for entry in ({}, {"flip": True}))
    assert [item for item in flipped if not item.flip] == plain and len(flipped) == 6
    assert len({item.identity() for item in flipped}) == 6


def test_max_pixels():
    """`max_pixels` is the resolution of that area."""
    sizes = [(640, 480), (96, 64), (200, 100)]
    for side in (64, 96, 512):
        by_side = make_items(config(entries=[{"resolution": [side]}]), [images(3, sizes)])
        entry = {"folder": "x", "max_pixels": side * side}
        made = Config.model_validate({"name": "a", "data": [entry]})
        assert make_items(made, [images(3, sizes)]) == by_side
    odd = Config.model_validate({"name": "a", "data": [{"folder": "x", "max_pixels": 300_000}]})
    (item,) = make_items(odd, [images(1, [(3000, 2000)])])
    assert 250_000 < item.size.width * item.size.height <= 300_000


def test_batch_size_of_a_folder():
    """A folder may have its own batch size."""
    entries = [{"batch_size": 1}, {}]
    plan = plan_of(found=[images(6), images(6, tag="b")], entries=entries, batch_size=3)
    batches = first_batches(plan, plan.concept.micro_batches_per_epoch)
    assert all(len({sample.item.entry for sample in batch}) == 1 for batch in batches)
    assert {len(batch) for batch in batches if batch[0].item.entry == 0} == {1}
    assert max(len(batch) for batch in batches if batch[0].item.entry == 1) > 1
    assert Counter(sample.item for sample in samples_of(batches)) == Counter(plan.items)


# Regularization

CLASS = {"regularization": True}


@quick
@given(counts, st.integers(1, 9), st.integers(1, 9), few, few)
def test_regularization_share(count: int, others: int, tenths: int, grad_accumulation: int, processes: int):
    """Regularization gets its share, however many images it has."""
    made = config(entries=[{}, CLASS], grad_accumulation=grad_accumulation)
    made = made.model_copy(update={"train": made.train.model_copy(update={"regularization_share": tenths / 10})})
    plan = make_sample_order(made, make_items(made, [images(count), images(others, tag="b")]), processes)
    batches = first_batches(plan, 200)
    of_class = [batch for batch in batches if batch[0].item.entry == 1]
    assert abs(len(of_class) - 20 * tenths) <= 1
    for stream, found in ((plan.concept, 0), (plan.regularization, 1)):
        own = [batch for batch in batches if batch[0].item.entry == found]
        assert own == [stream.micro_batch(index) for index in range(len(own))], "each goes through its own epochs"
    share = len(batches) - len(of_class)
    assert plan.steps_per_epoch == pytest.approx(
        plan.concept.micro_batches_per_epoch / (grad_accumulation * processes * (1 - tenths / 10))
    )
    assert share > 0


def test_regularization_share_unused():
    """Without regularization its share changes nothing."""
    plans = []
    for share in (0.1, 0.9):
        made = config()
        made = made.model_copy(update={"train": made.train.model_copy(update={"regularization_share": share})})
        plans.append(make_sample_order(made, make_items(made, [images(5)])))
    assert [plans[0].step_batches(n) for n in range(1, 20)] == [plans[1].step_batches(n) for n in range(1, 20)]


# Epochs as a length


@pytest.mark.parametrize(
    ("epochs", "grad_accumulation", "processes", "steps"),
    [(1, 1, 1, 12), (2.5, 1, 1, 30), (1, 5, 1, 3), (1, 1, 4, 3), (0.01, 1, 1, 1), (1e-12, 1, 1, 1)],
)
def test_epochs_become_steps(epochs: float, grad_accumulation: int, processes: int, steps: int):
    made = config(grad_accumulation=grad_accumulation)
    train = made.train.model_copy(update={"epochs": float(epochs)})
    made = made.model_copy(update={"train": train})
    order = make_sample_order(made, make_items(made, [images(12)]), processes)
    found = resolve_epochs(made, order)
    assert (found.train.steps, found.train.epochs) == (steps, None)
    assert resolve_epochs(config(), order) == config()


# Prompts that are drawn


@quick
@given(
    counts,
    st.integers(1, 40),
    few,
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([None, "trigger", "blank"]),
    st.integers(0, 5),
)
def test_drawn_prompts_are_known_beforehand(
    count: int, steps: int, grad_accumulation: int, shuffle: bool, tag_dropout: float, kind: str | None, others: int
):
    """With shuffled tags and preservation, every prompt of the run is known before it starts."""
    tagged = [replace(one, prompts=(f"zorb, a, b, c, {one.path.stem}", "zorb, d")) for one in images(count)]
    own = {"trigger": "zorb", "shuffle_tags": shuffle, "tag_dropout": tag_dropout, "caption_dropout": 0.2}
    entries = [own | {"dropout_keeps_trigger": True}, CLASS | {"shuffle_tags": shuffle}]
    made = config(entries=entries[: 1 + (others > 0)], grad_accumulation=grad_accumulation)
    made = made.model_copy(update={"preserve": PreserveSettings(kind=kind, class_word="shape")})
    found = [tagged, images(others, tag="b")][: 1 + (others > 0)]
    plan = make_sample_order(made, make_items(made, found))
    samples = samples_of(list(itertools.chain.from_iterable(map(plan.step_batches, range(1, steps + 1)))))
    used = {text for sample in samples for text in (sample.prompt, sample.preserve_prompt) if text is not None}
    assert used <= set(plan.prompts(steps))
    assert (kind is None) == all(sample.preserve_prompt is None for sample in samples)


def test_prompt_of_an_image_in_an_epoch():
    """In an epoch an image has the same prompt at every resolution."""
    tagged = [replace(one, prompts=("a, b, c, d, e",)) for one in images(4)]
    plan = plan_of(found=[tagged], entries=[{"resolution": [32, 64], "shuffle_tags": True, "caption_dropout": 0.0}])
    samples = samples_of(first_batches(plan, 6 * plan.concept.micro_batches_per_epoch))
    by_image: dict[Any, set[str]] = {}
    for sample in samples:
        by_image.setdefault((sample.epoch, sample.item.image.path), set()).add(sample.prompt)
    assert all(len(prompts) == 1 for prompts in by_image.values())
    assert len({prompt for prompts in by_image.values() for prompt in prompts}) > 6


@pytest.mark.parametrize("share", [0.3, 0.4, 0.55, 0.8, 0.9])
def test_rounding_adds_no_step(share: float):
    made = config(entries=[{}, CLASS])
    train = made.train.model_copy(update={"epochs": 1.0, "regularization_share": share})
    made = made.model_copy(update={"train": train})
    found = resolve_epochs(made, make_sample_order(made, make_items(made, [images(12), images(2, tag="b")])))
    assert found.train.steps == -(-12 * 100 // (100 - round(share * 100)))


def test_parts_of_a_stratified_epoch():
    """With stratified sigmas, each item of an epoch has a part of its own, however the work is divided."""
    entries = [{"flip": True}, {"regularization": True}]
    found = [images(7, tag="p"), images(5, tag="r")]
    plain = plan_of(found=found, entries=entries)
    plan = replace(plain, stratified=True)
    for stream, count in ((plan.concept, 14), (plan.regularization, 5)):
        assert stream is not None
        for epoch in (0, 1, 2):
            parts = [plan.sample(item, epoch).part for item in stream.items]
            assert sorted(part for part in parts if part is not None) == [(index, count) for index in range(count)]
    assert {sample.part for sample in samples_of(first_batches(plain, 19))} == {None}
    wide = replace(plan_of(found=found, entries=entries, batch_size=3, processes=2), stratified=True)
    keyed = {sample.key(): sample.part for sample in samples_of(first_batches(plan, 19))}
    again = {sample.key(): sample.part for sample in samples_of(first_batches(wide, 12))}
    common = keyed.keys() & again.keys()
    assert len(common) > 8 and all(keyed[key] == again[key] for key in common)


def test_parts_differ_by_seed():
    """Which part an item has follows from the seed and its content, not from its place in the folder."""
    found = images(9)
    plans = [
        replace(plan_of(found=[one], seed=seed), stratified=True)
        for one, seed in ((found, 0), (found[::-1], 0), (found, 1))
    ]
    parts = [{item.image.digest: plan.sample(item, 0).part for item in plan.items} for plan in plans]
    assert parts[0] == parts[1] != parts[2]


def test_parts_of_an_image_in_two_entries():
    """The uses of an image in two entries have parts next to each other, in the order of the entries."""
    found = images(9)
    plan = replace(plan_of(found=[found, found], entries=[{}, {}]), stratified=True)
    for order in (plan, replace(plan, items=plan.items[::-1])):
        parts = {(item.image.digest, item.entry): order.sample(item, 0).part for item in order.items}
        for image in found:
            first, second = parts[image.digest, 0], parts[image.digest, 1]
            assert first is not None and second == (first[0] + 1, 18)


# What other parts ask of the order


def test_negatives_have_size_and_flip():
    """The other image of a pair is used in the size of the first and mirrored as it is; other images have none."""
    other = replace(images(1, tag="n")[0], width=500)
    first, second = images(2, sizes=[(128, 64)])
    plan = plan_of(found=[[replace(first, negative=other), second]], entries=[{"flip": True}])
    paired = [item for item in plan.items if item.image.digest == first.digest]
    assert plan.negatives == [replace(item, image=other) for item in paired]
    assert [item.flip for item in plan.negatives] == [False, True]
    assert {item.negative for item in plan.items if item not in paired} == {None}


def test_longest_sample():
    """The longest sample has the longest prompt as it is, and that of epoch 0."""
    image = replace(images(1)[0], prompts=("a", "zorb, b, c", "zorb"))
    made = config(entries=[{"trigger": "zorb", "caption_dropout": 1.0, "shuffle_tags": True}])
    made = made.model_copy(update={"preserve": PreserveSettings(kind="trigger", class_word="shape")})
    plan = make_sample_order(made, make_items(made, [[image]]))
    assert plan.longest_sample(plan.items[0]) == Sample(plan.items[0], 0, "zorb, b, c", "shape, b, c")


def test_three_epochs_are_kept(monkeypatch):
    """The three epochs that were asked for last are sorted once each; older epochs are not kept."""
    made, stream = [], plan_of(4).concept
    make_epoch = type(stream)._make_epoch

    def counted(self, epoch: int):
        made.append(epoch)
        return make_epoch(self, epoch)

    monkeypatch.setattr(type(stream), "_make_epoch", counted)
    for epoch in (0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 0):
        stream.micro_batch(4 * epoch)
    assert made == [0, 1, 2, 3, 0]


def test_added_image_fills_a_batch():
    """A micro-batch that an additional image makes fuller keeps its place."""

    def firsts(plan: SampleOrder) -> list[str]:
        batches = first_batches(plan, plan.concept.micro_batches_per_epoch)
        return [batch[0].item.image.digest for batch in batches]

    square, filled = [(64, 64)], 0
    before = firsts(plan_of(found=[images(5, sizes=square)], batch_size=4))
    for number in range(30):
        added = images(1, sizes=square, tag=f"new{number}-")
        after = firsts(plan_of(found=[images(5, sizes=square) + added], batch_size=4))
        if set(after) == set(before):
            filled += 1
            assert after == before
    assert filled > 2


@quick
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 9), st.integers(1, 12), few, few)
def test_prompts_are_those_of_the_epochs(
    count: int, others: int, tenths: int, steps: int, grad_accumulation: int, processes: int
):
    """With shuffled tags, the prompts of the epochs that a run begins are known, and no others."""
    tags = ", ".join("abcdefghijklmnop")
    entries = [{"shuffle_tags": True}, CLASS | {"shuffle_tags": True}]
    found = [
        [replace(image, prompts=(f"{image.digest}, {tags}",)) for image in images(number, tag=tag)]
        for number, tag in ((count, "a"), (others, "b"))
    ]
    made = config(entries=entries, grad_accumulation=grad_accumulation)
    made = made.model_copy(update={"train": made.train.model_copy(update={"regularization_share": tenths / 10})})
    plan = make_sample_order(made, make_items(made, found), processes)
    samples = samples_of(list(itertools.chain.from_iterable(map(plan.step_batches, range(1, steps + 1)))))
    prompts = plan.prompts(steps)
    for item in plan.items:
        begun = len({sample.epoch for sample in samples if sample.item.entry == item.entry})
        known = sum(item.image.digest in prompt for prompt in prompts) - 1  # the longest is there for the dry run
        assert known == begun
