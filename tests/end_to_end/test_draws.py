"""A golden table of everything that is drawn at random, and of what is found on disk by a literal name.

A draw is a function of its key (`zimage_train.rng`), so a literal in a key, the order of its parts or what they are
must never change: a run that was begun before would go on with other noise, and nobody would notice. tests/golden/
draws.json fixes what each key gives: order, sigma, noise, captions, the start of a LoRA and so on, and the names under
which caches, checkpoints, LoRAs and previews are found again. `KEYS` says in which section each key's literal is held,
and a draw with another literal fails until it has a section too.

`python tests/end_to_end/test_draws.py` writes the file anew. A change in it breaks the continuing of
runs, so it is made on purpose or not at all, and stands in CHANGELOG.md.

Draws are torch's on the CPU, as in the product. Uniform draws are the same on every machine. Normal draws (torch.randn)
have the same bits with AVX2 and AVX512 but differ in the last of them where torch runs without either
(`torch.backends.cpu.get_cpu_capability()`), so there the first values are compared, to four places, and digests are
not. Sigmas go through functions whose last bits differ likewise, and have twelve places.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from zimage_train import mini, rng
from zimage_train.commands import timesteps
from zimage_train.commands.train import run_training
from zimage_train.config import schema
from zimage_train.config.load import validate_config
from zimage_train.config.lora import LoraSettings
from zimage_train.config.schema import Config
from zimage_train.dataset import tensor_cache
from zimage_train.dataset.buckets import Bucket
from zimage_train.dataset.masks import Mask
from zimage_train.dataset.sample_order import Sample, SampleOrder, TrainItem, make_items, make_sample_order
from zimage_train.dataset.scan import ImageRecord, dataset_fingerprint, scan_entry
from zimage_train.diffusion import request, sampler
from zimage_train.diffusion.frozen import load_frozen
from zimage_train.io.safetensors_format import read_header
from zimage_train.lora import adapter_config, arithmetic, blending, format_metadata, layers, metadata
from zimage_train.lora.file_hashes import HASH_KEYS
from zimage_train.optim import ema, optimizers
from zimage_train.report.metrics import RecordWriter, read_records
from zimage_train.training import batches, build, loop, preview_sets, run_dir, validation
from zimage_train.training.dry_run import _full_batches
from zimage_train.training.run_dir import RunDir
from zimage_train.training.self_distill import GeneratedData
from zimage_train.training.state import TrainState

from helpers import ROOT
from mini_config import mini_values
from miniature import world

GOLDEN = ROOT / "tests" / "golden" / "draws.json"
PACKAGE = ROOT / "zimage_train"
CPU = torch.device("cpu")

KEYS = {
    "order": "order",
    "batches": "order",
    "sigma": "sigma",
    "part": "sigma",
    "noise": "noise",
    "offset": "noise",
    "caption dropout": "captions",
    "caption": "captions",
    "tag dropout": "captions",
    "tag order": "captions",
    "validation": "validation",
    "own": "own images",
    "interval": "own images",
    "lora": "start of a LoRA",
    "dare": "merging",
    "projection": "merging",
    "dropout": "a run",
    "timesteps": "timesteps",
}
"""The literal in the key of a draw, and the section of the table that changes with it."""

Table = dict[str, Any]


def sha(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def uniform(tensor: Tensor) -> Table:
    """The digest and the first values of a draw that has the same bits everywhere."""
    return {
        "sha256": sha(tensor.numpy().tobytes())[:16],
        "first": [repr(value) for value in tensor.flatten()[:3].tolist()],
    }


def normal(tensor: Tensor) -> Table:
    """The digest and the first values of a normal draw."""
    first = [f"{value:.4f}" for value in tensor.flatten()[:4].tolist()]
    return {"normal sha256": sha(tensor.contiguous().numpy().tobytes())[:16], "first": first}


def places(value: Tensor | float) -> str:
    return f"{float(value):.12f}"


def fields(one: request.SamplingRequest) -> Table:
    """As an image and the key of a cache hold them."""
    return json.loads(one.to_json())


@contextlib.contextmanager
def recorded(name: str) -> Iterator[list[tuple[Any, Any]]]:
    """The arguments and the result of every call of torch's function `name` in the block."""
    calls: list[tuple[Any, Any]] = []
    original = getattr(torch, name)

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, original(*args, **kwargs)))
        return calls[-1][1]

    with mock.patch.object(torch, name, record):
        yield calls


def config(entries: list[Table], **sections: Any) -> Config:
    values = {"name": "a", "seed": 11, "data": entries, **sections}
    return Config.model_validate(values)


def images(
    tag: str, sizes: list[tuple[int, int]], repeats: int = 1, prompts: tuple[str, ...] = ()
) -> list[ImageRecord]:
    """Pictures that are there in name and digest only."""
    return [
        ImageRecord(
            Path(f"{tag}{index}"), sha(f"{tag}{index}"), *size, prompts or (f"prompt {tag}{index}",), repeats=repeats
        )
        for index, size in enumerate(sizes)
    ]


WIDE, SQUARE, TALL = (96, 64), (128, 128), (64, 96)
FLIPPED, SINGLE, TAGS, CLASS = (
    {"folder": "p", "resolution": [64, 96], "flip": True, "caption_dropout": 0.3},
    {"folder": "q", "resolution": [64], "batch_size": 1, "trigger": "zorb", "dropout_keeps_trigger": True},
    {"folder": "t", "resolution": [64], "trigger": "zorb", "shuffle_tags": True, "tag_dropout": 0.3, "keep_tags": 1},
    {"folder": "r", "resolution": [64], "regularization": True, "caption_dropout": 0.0},
)


def several(processes: int = 1, **train: Any) -> SampleOrder:
    """The plan of two entries of the concept, which share an image, and an entry of its class."""
    made = config(
        [FLIPPED, {**SINGLE, "caption_dropout": 0.5}, CLASS],
        train={"batch_size": 2, "grad_accumulation": 2, "regularization_share": 0.25, **train},
    )
    shared = images("shared", [SQUARE])
    found = [
        [*images("p", [WIDE, SQUARE, TALL]), *shared],
        [*images("q", [SQUARE, WIDE], repeats=2), *shared],
        images("r", [SQUARE, TALL, WIDE]),
    ]
    return make_sample_order(made, make_items(made, found), processes)


def named(item: TrainItem) -> str:
    """Entry, name, resolution, which repeat, and m if mirrored."""
    return f"{item.entry}:{item.image.path.name}@{item.resolution}#{item.repeat}{'m' if item.flip else ''}"


def shown(batch: tuple[Sample, ...]) -> str:
    return f"epoch {batch[0].epoch}: " + " ".join(named(sample.item) for sample in batch)


def first_samples(count: int) -> list[Sample]:
    plan = several()
    items = list(plan.concept.items)
    return [plan.sample(items[5 * index % len(items)], index) for index in range(count)]


# The draws


def keys(scratch: Path) -> Table:
    """What a key gives."""
    paths: dict[str, tuple[rng.KeyPart, ...]] = {
        "no path": (),
        "text, int, bool": ("order", 3, True),
        "float and None": (0.25, None),
        "ints": (1, 64),
    }
    return {
        name: {
            "number": rng.keyed_int(7, *path),
            "rand": repr(torch.rand((), generator=rng.keyed_generator(7, *path)).item()),
        }
        for name, path in paths.items()
    }


def order(scratch: Path) -> Table:
    """Several epochs of several entries, for a single process and for each of two."""
    table: Table = {}
    for processes, steps in ((1, 24), (2, 8)):
        plan = several(processes)
        for step in range(1, steps + 1):
            for process in range(processes):
                own = plan.step_batches(step)[process::processes]
                table[f"{processes} processes, step {step:02d}, process {process}"] = [shown(batch) for batch in own]
    alone = make_sample_order(one := config([FLIPPED]), make_items(one, [images("p", [WIDE, SQUARE, TALL])]))
    for step in range(1, 13):
        table[f"batch size 1, step {step:02d}"] = [shown(batch) for batch in alone.step_batches(step)]
    return table


def sigma(scratch: Path) -> Table:
    table: Table = {}
    settings = schema.TimestepSettings.model_fields
    samples = first_samples(4)
    for kind in get_args(settings["type"].annotation):
        for bias in get_args(settings["bias"].annotation):
            listed = {"sigmas": [0.9, 0.3, 0.6], "jitter": 0.1} if kind == "fixed" else {}
            made = config([FLIPPED, SINGLE, CLASS], timesteps={"type": kind, "bias": bias, **listed})
            table[f"{kind}, {bias}"] = [places(batches.sample_sigma(made, sample)) for sample in samples]
    cut = config([FLIPPED, SINGLE, CLASS], timesteps={"type": "uniform_shift", "min": 0.2, "max": 0.7})
    table["shift, cut to 0.2 .. 0.7"] = [places(batches.sample_sigma(cut, sample)) for sample in samples]
    linear = config([FLIPPED, SINGLE, CLASS], timesteps={"type": "linear"})
    for sample in first_samples(12):
        table[f"linear, epoch {sample.epoch}: {named(sample.item)}"] = places(batches.sample_sigma(linear, sample))
    for shift in (2.0, "flux", "qwen"):
        shifted = config([FLIPPED, SINGLE, CLASS], timesteps={"type": "sigmoid", "scale": 1.5, "shift": shift})
        table[f"sigmoid, shift {shift}"] = [places(batches.sample_sigma(shifted, sample)) for sample in samples]
    plan = dataclasses.replace(several(), stratified=True)
    for epoch in range(3):
        drawn = [plan.sample(item, epoch) for item in plan.items]
        parts = [one.part for one in drawn]
        table[f"stratified, epoch {epoch}, parts"] = [list(part) for part in parts if part is not None]
        table[f"stratified, epoch {epoch}"] = [places(batches.sample_sigma(linear, one)) for one in drawn[::4]]
    return table


def noise(scratch: Path) -> Table:
    made, shape = config([FLIPPED, SINGLE, CLASS]), torch.Size((16, 8, 12))
    table: Table = {}
    for sample in first_samples(6):
        table[f"epoch {sample.epoch}: {named(sample.item)}"] = normal(batches.sample_noise(made, sample, shape))
    samples = tuple(first_samples(2))
    latents, embeds = [torch.zeros(shape)] * 2, [torch.zeros(3, 4)] * 2
    batch = batches.make_batch(made, samples, latents, embeds, batches.BatchExtras())
    table["a batch"] = {"noise": normal(batch.noise), "sigma": [places(one) for one in batch.sigma]}
    offset = config([FLIPPED, SINGLE, CLASS], timesteps={"offset_noise": 0.1})
    table["with an offset"] = normal(batches.sample_noise(offset, samples[0], shape))
    whole = several().longest_sample(samples[0].item)
    table["the sample of a rehearsal"] = {
        "key": list(whole.key()),
        "noise": normal(batches.sample_noise(made, whole, shape)),
    }
    return table


def captions(scratch: Path) -> Table:
    """The prompts of eight epochs: dropped, drawn from several, with tags in other orders."""
    several_lines = ("one caption", "another caption", "a third caption")
    tags = ("a zorb, one, two, three, four, five", "six, seven, zorb, eight")
    entries = [
        {**SINGLE, "caption_dropout": 0.5},
        {**SINGLE, "caption_dropout": 0.0},
        {**TAGS, "caption_dropout": 0.25},
    ]
    found = [
        images("p", [SQUARE, WIDE]),
        images("q", [SQUARE], prompts=several_lines, repeats=2),
        images("t", [SQUARE, TALL], prompts=tags),
    ]
    made = config(entries)
    plan = make_sample_order(made, make_items(made, found))
    table = {named(item): [plan.sample(item, epoch).prompt for epoch in range(8)] for item in plan.items}
    mirrored = config([{**FLIPPED, "caption_dropout": 0.5}])
    other = make_sample_order(mirrored, make_items(mirrored, [images("f", [SQUARE])]))
    dropped = {
        f"dropped: {named(item)}": [int(not other.sample(item, epoch).prompt) for epoch in range(16)]
        for item in other.items
    }
    return table | dropped


def of_validation(scratch: Path) -> Table:
    made = config([FLIPPED])
    items = make_items(config([{"folder": "h", "resolution": [64]}]), [images("held", [SQUARE, WIDE])])
    found = validation.validation_sigmas(made)
    run = cast(TrainState, SimpleNamespace(held_out=items))
    table: Table = {
        "trained": [places(one) for one in found.trained],
        "turbo": [places(one) for one in found.turbo],
        "subject": validation.validation_subject(run),
    }
    shape = torch.Size((16, 8, 8))
    return table | {named(item): normal(validation._noise(made, item, shape)) for item in items}


def own_images(scratch: Path) -> Table:
    """What the model draws itself: its seed, its key in the cache, and the student's step of each sample."""
    text = scratch / "prompts.txt"
    text.write_text("a red circle\na blue zorb\n")
    entry = {"prompts": str(text), "resolution": [64], "caption_dropout": 0.0}
    drawn = config([entry], train={"method": "de_distill"}, model={"variant": "turbo"})
    imitating = config([entry], train={"method": "trajectory_imitation"}, lora={"init_from": "x.safetensors"})
    table: Table = {}
    for made in (drawn, imitating):
        items = make_items(made, [scan_entry(made.data[0], "data.0").images])
        own = GeneratedData(made, ("the model", "the text encoder"))
        plan = make_sample_order(made, items)
        for item in items:
            name = f"{made.train.method}, {item.image.prompts[0]}"
            table[name] = {"digest": item.image.digest, "recipe": fields(own.request(item)), "key": own.key(item)}
            if own.imitates:
                samples = tuple(plan.sample(item, epoch) for epoch in range(8))
                states = [torch.zeros(len(own.student_sigmas), 16, 8, 8)] * 8
                extras, embeds = batches.BatchExtras(), [torch.zeros(3, 4)] * 8
                batch = batches.make_imitation_batch(made, samples, states, embeds, extras)
                table[name]["interval"] = [f"{one:.6f}" for one in batch.sigma.tolist()]
    return table


def linears() -> nn.Module:
    """Linear layers under names of the real layers."""
    block = nn.ModuleDict({"to_q": nn.Linear(24, 16, bias=False), "to_k": nn.Linear(24, 16, bias=False)})
    w2 = nn.ModuleDict({"w2": nn.Linear(32, 24, bias=False)})
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attention": block, "feed_forward": w2})])})


MODULES = ["layers.0.attention.to_q", "layers.0.attention.to_k", "layers.0.feed_forward.w2"]


def start_of_a_lora(scratch: Path) -> Table:
    table: Table = {}
    for seed in (11, 12):
        attached = layers.attach_lora(linears(), LoraSettings(rank=4), MODULES, seed)
        table |= {f"seed {seed}, {module}": uniform(a.detach()) for module, a in attached.a.items()}
    return table


def merging(scratch: Path) -> Table:
    """Which values DARE drops, and the projection through which a large change is brought to a lower rank."""
    table: Table = {}
    for method in ("dare_linear", "dare_ties"):
        changes = [torch.ones(3, 8), torch.full((3, 8), 10.0)]
        for name in MODULES[:2]:
            blended = blending.blend_deltas(method, changes, [1.0, 1.0], 0.5, 42, name)
            table[f"{method}, {name}"] = [[round(value) for value in row] for row in blended.tolist()]
    with recorded("randn") as drawn:
        arithmetic.factorize(torch.eye(512, 520), 4, 1.0, MODULES[0])
    return table | {f"projection {index}": normal(result) for index, (_, result) in enumerate(drawn)}


def of_timesteps(scratch: Path) -> Table:
    found = timesteps.sample_sigmas(config([FLIPPED], timesteps={"type": "linear"}))
    return {"of": len(found), "first": [places(one) for one in found[:6]]}


def previews(scratch: Path) -> Table:
    """The recipes of previews, the noise that each begins with, and those by which the drift is measured."""
    prompts = [{"prompt": "a zorb"}, {"prompt": "a circle", "seed": 5}, {"prompt": "a square", "width": 96}]
    sample = {"every": 2, "width": 64, "height": 64, "compare_on": "base", "prompts": prompts}
    made = config([SINGLE], sample=sample)
    drawn = preview_sets.make_preview_sets(made, RunDir(scratch, "a"), {}, None)
    meter = build._drift_meter(made, drawn, cast(Any, SimpleNamespace(embeds=lambda prompt: torch.zeros(3, 4))))
    assert meter is not None
    model = load_frozen(mini.TURBO / "transformer", None, "fp32", CPU).model
    table: Table = {}
    for index, one in enumerate(request.preview_requests(made)):
        embeds = {one.prompt: torch.zeros(3, 4), one.negative: torch.zeros(3, 4)}
        _, latents = next(sampler.sample_trajectory(model, [one], embeds, [1.0, 0.0]))
        table[f"{index}"] = {"recipe": fields(one), "noise": normal(latents)}
    table |= {f"also {index}": fields(one) for index, one in enumerate(request.comparison_requests(made))}
    return table | {f"drift {index}": fields(one) for index, one in enumerate(meter._requests)}


def miniature(scratch: Path) -> Table:
    """The scenes of the miniature's world: three kinds, with two seeds each."""
    table: Table = {}
    for seed in (1, 2):
        for name, scene in (("world", world.world_scene), ("zorb", world.zorb_scene), ("etched", world.etched_scene)):
            table[f"{name} {seed}"] = list(dataclasses.astuple(scene(seed)))
    return table | {"clutter 1": sha(world.draw_clutter(1, 32, 32).tobytes())[:16]}


# Names on disk


def in_short(names: Any) -> list[str]:
    """Names with # for their numbers, each once."""
    return sorted({re.sub(r"\d+", "#", str(name)) for name in names})


def caches(scratch: Path) -> Table:
    image = images("p", [SQUARE])[0]
    latent = tensor_cache.latent_key(image, Bucket(64, 96), False, "the vae")
    store = tensor_cache.TensorCache(scratch / "cache")
    store.write(latent, torch.arange(3.0))
    (path,) = [one for one in store.folder.rglob("*") if one.is_file()]
    header = read_header(path)
    return {
        "latents": latent,
        "latents, mirrored": tensor_cache.latent_key(image, Bucket(64, 96), True, "the vae"),
        "prompt": tensor_cache.prompt_key("a prompt", "the encoder", "bf16"),
        "own": tensor_cache.generated_key("a recipe", "the model", "the encoder"),
        "path": path.relative_to(store.folder).as_posix(),
        "tensors": list(header.tensors),
        "metadata": header.metadata,
        "bytes": sha(path.read_bytes()),
    }


def fingerprints(scratch: Path) -> Table:
    """By what a run that goes on knows that its images and settings are the same."""
    image = images("p", [SQUARE], repeats=3)[0]
    masked = dataclasses.replace(image, mask=Mask(Path("m.png"), "the mask", is_alpha=False))
    made = config([SINGLE], schedule={"name": "cosine"})
    identity = run_dir.run_identity(made, {"model": "m", "data": dataset_fingerprint([[image]])}, 1)
    return {
        "pictures": dataset_fingerprint([[image, image], [masked]]),
        "inputs": identity["inputs"],
        "parts": sorted(identity),
        "settings of the schedule": sorted(name for name in identity["settings"] if name.startswith("schedule.")),
        "digest": run_dir.identity_digest({"settings": {"a": 1}, "inputs": {}}),
    }


def loras(scratch: Path) -> Table:
    """What LoRAs say about themselves; the keys of their tensors are in lora_keys.txt."""
    made = config([SINGLE], lora={"rank": 4}, model={"adapter": "a.safetensors"})
    said = metadata.training_metadata(made, "the adapter's digest")
    merged = metadata.edited_metadata("merge", [said, {**said, "ss_steps": "3"}], {"method": "sum"}, [4, 8])
    return {
        "metadata": said,
        "merged": dict(sorted(merged.items())),
        "about the file itself": list(metadata.STALE),
        "converted": format_metadata.write_format_metadata(
            format_metadata.FormatMetadata(True, {"layers.0.attention.qkv": [1, 2, 3]})
        ),
        "alpha": adapter_config.HEADER_KEY,
    }


def trained_state(scratch: Path) -> Table:
    """Names of what a checkpoint holds of the LoRA, its average and each kind of optimizer."""
    attached = layers.attach_lora(linears(), LoraSettings(rank=4), MODULES[:1], 11)
    table: Table = {
        "lora": list(attached.state()),
        "ema": list(ema.init_ema(0.9, attached.flat.whole, attached.name_views).state()),
    }
    for name in ("adamw", "adafactor", "automagic", "prodigy"):
        settings = schema.OptimizerSettings.model_validate({"name": name})
        optimizer = optimizers.build_optimizer(settings, optimizers.parameters_for(settings.name, attached.flat))
        attached.flat.grads.fill_(1.0)
        optimizer.step()
        tensors, numbers = optimizers.optimizer_state(optimizer, attached.flat)
        table[name] = {"tensors": sorted(tensors), "numbers": sorted(numbers), "kind": numbers["kind"]}
    return table


def a_run(scratch: Path) -> Table:
    """A tiny run on the miniature, to its end: what it draws and under which names it keeps what it has made."""
    changes: Table = {
        "train": {"steps": 2, "grad_accumulation": 2},
        "ema": {"decay": 0.9},
        "sample": {"every": 2, "width": 64, "height": 64, "prompts": ["a red zorb"], "steps": 1},
        "validation": {"folder": str(mini.IMAGES), "every": 2, "resolution": 64},
    }
    made, problems = validate_config(
        mini_values(scratch / "runs", scratch / "run_cache", **changes), lambda path: str(path)
    )
    assert made is not None, problems
    seen: list[TrainState] = []
    entered = loop.train

    def watched(run: TrainState, metrics: RecordWriter, events: RecordWriter) -> None:
        seen.append(run)
        entered(run, metrics, events)

    with mock.patch.object(loop, "train", watched), recorded("manual_seed") as seeds:
        run_training(made, fresh=False)
    second = dataclasses.replace(seen[0], world=dataclasses.replace(seen[0].world, rank=1))
    with recorded("manual_seed") as seeds_of_second:
        entered(second, RecordWriter(None, 0), RecordWriter(None, 0))
    root = scratch / "runs" / made.name
    records, events = read_records(root / "metrics.jsonl"), read_records(root / "events.jsonl")
    saved = read_header(root / "checkpoints" / "step-000002.safetensors")
    state = json.loads(saved.metadata["state"])
    exported = read_header(root / "lora" / "tiny.safetensors")
    with Image.open(root / "samples" / "000002-00.png") as image:
        texts = sorted(map(str, image.info))
    table: Table = {
        "seeds of dropout": [args[0] for args, _ in seeds],
        "seeds of dropout in process 1": [args[0] for args, _ in seeds_of_second],
        "files": in_short(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()),
        "caches": in_short(path.parent.parent.name for path in (scratch / "run_cache").rglob("*.safetensors")),
        "run.json": sorted(json.loads((root / "run.json").read_text())),
        "metrics.jsonl": sorted(records[0]),
        "events.jsonl": sorted({f"{one['event']}: {' '.join(sorted(one))}" for one in events}),
        "checkpoint, metadata": sorted(saved.metadata),
        "checkpoint, state": sorted(state),
        "checkpoint, format": state["format"],
        "checkpoint, identity": sorted(state["identity"]),
        "checkpoint, inputs": in_short(name.split("/")[0] for name in state["identity"]["inputs"]),
        "checkpoint, tensors": in_short(saved.tensors),
        # Their values depend on the last bits of the weights, and so on the machine.
        "LoRA, hashes": sorted(exported.metadata.keys() & set(HASH_KEYS)),
        "LoRA, metadata": {key: value for key, value in exported.metadata.items() if key not in HASH_KEYS},
        "LoRA, tensors": in_short(exported.tensors),
        "preview, texts": texts,
        "rehearsed": [" ".join(named(sample.item) for sample in batch) for batch in _full_batches(seen[0])],
    }
    for record in records:
        sigmas = [f"{value:.6f}" for value in record["sigma"]]
        table[f"step {record['step']}"] = {"samples": record["samples"], "sigma": sigmas}
    return table


SECTIONS: dict[str, Callable[[Path], Table]] = {
    "keys": keys,
    "order": order,
    "sigma": sigma,
    "noise": noise,
    "captions": captions,
    "validation": of_validation,
    "own images": own_images,
    "start of a LoRA": start_of_a_lora,
    "merging": merging,
    "timesteps": of_timesteps,
    "previews": previews,
    "miniature": miniature,
    "caches": caches,
    "fingerprints": fingerprints,
    "LoRAs": loras,
    "trained state": trained_state,
    "a run": a_run,
}


# The tests


def comparable(value: Any) -> Any:
    """`value` without what only AVX gives."""
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items() if key != "normal sha256"}
    return [comparable(one) for one in value] if isinstance(value, list) else value


def plain(table: Table) -> Table:
    """`table` as JSON gives it back."""
    return json.loads(json.dumps(table))


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_drawn_is_what_always_was(section: str, tmp_path: Path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[section]
    found = plain(SECTIONS[section](tmp_path))
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        golden, found = comparable(golden), comparable(found)
    assert found == golden


def test_table_has_its_sections():
    """The golden table has these sections, and is small enough to be read."""
    assert list(json.loads(GOLDEN.read_text(encoding="utf-8"))) == list(SECTIONS)
    assert GOLDEN.stat().st_size < 60_000


def literals(source: str) -> set[str]:
    """The literal parts of the keys of the draws in a module."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    keyed = [
        call
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("keyed_generator", "keyed_int", "uniform")
    ]
    parts = [part for call in keyed for part in call.args if isinstance(part, ast.Constant)]
    return {part.value for part in parts if isinstance(part.value, str)}


def test_literals_of_keys_have_a_section():
    """Every literal of a key is fixed by a section of the table."""
    found = set().union(*(literals(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")))
    assert found == set(KEYS)
    assert set(KEYS.values()) <= set(SECTIONS)


def written(sections: dict[str, Table]) -> str:
    """The golden file: an entry a line."""
    blocks = []
    for section, table in sections.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()]
        blocks.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    """Write the golden file."""
    made = {}
    for section, make in SECTIONS.items():
        with tempfile.TemporaryDirectory() as scratch:
            made[section] = make(Path(scratch))
    GOLDEN.write_text(written(made), encoding="utf-8")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
