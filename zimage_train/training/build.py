"""From a checked config to a run that is ready: caches filled, model assembled, LoRA attached, checkpoint loaded."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zimage_train import __version__
from zimage_train.config import methods
from zimage_train.config.load import cache_folder
from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset import cache_builder as filling
from zimage_train.dataset import encode as encoding
from zimage_train.dataset import sample_order as ordering
from zimage_train.dataset.cache_builder import Share
from zimage_train.dataset.sample_order import make_plan
from zimage_train.dataset.scan import fingerprint
from zimage_train.dataset.tensor_cache import Cache
from zimage_train.diffusion import request as recipe
from zimage_train.diffusion.drift import Meter
from zimage_train.diffusion.frozen import Frozen, assemble
from zimage_train.errors import ConfigError, Problem
from zimage_train.io.digests import Digests as Digester
from zimage_train.lora import layers as attach
from zimage_train.lora import lora_file as lora_files
from zimage_train.lora import targets as names
from zimage_train.lora import training_adapter as adapters
from zimage_train.lora.layers import Attached
from zimage_train.lora.lora_file import Lora
from zimage_train.lora.metadata import describe
from zimage_train.optim import ema
from zimage_train.optim import optimizers as optim
from zimage_train.optim.ema import Ema
from zimage_train.planning import forecast
from zimage_train.planning.memory import Form
from zimage_train.planning.planner import Plan
from zimage_train.planning.preflight import Checked, Weights
from zimage_train.report import preview_shift as change
from zimage_train.report.console import Console
from zimage_train.report.trackers import Trackers
from zimage_train.training import checkpoint, distributed
from zimage_train.training import preview_sets as views
from zimage_train.training import run_dir as run_folder
from zimage_train.training.checkpoint import Checkpoint
from zimage_train.training.distributed import World
from zimage_train.training.fit import recompute_as_planned
from zimage_train.training.preview_sets import View
from zimage_train.training.run_dir import RunFolder
from zimage_train.training.self_distill import Own
from zimage_train.training.signals import StopRequest
from zimage_train.training.state import Digests, Inputs, Run
from zimage_train.training.step_timer import Pace

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "prodigyopt")
METERED = 2
"""Previews that are also looked at for drift: each costs as much again, and once twice that."""


@dataclass(frozen=True)
class Session:
    """What surrounds a run in this process."""

    weights: Weights
    world: World
    cache: Cache
    digests: Digests
    console: Console
    stop: StopRequest
    allow: tuple[str, ...]
    """Settings that this start may change although they shape the weights."""


def open_session(
    checked: Checked, world: World, console: Console, stop: StopRequest, allow: tuple[str, ...] = ()
) -> Session:
    """Open the cache that the config names, or the user's, and digest every part of the model by content."""
    weights = checked.weights
    assert weights is not None  # without weights, `train` and `cache` have ended with an error
    cache = Cache(cache_folder(checked.config))
    digester = Digester(cache.folder / "digests.json")
    source, extras, adapter = weights.sources.transformer, weights.sources.extras, weights.sources.adapter
    digests = Digests(
        model=digester.of_folder(source) if source.is_dir() else digester.of_content(source),
        adapter=digester.of_content(adapter) if adapter else None,
        text_encoder=digester.of_folder(extras / "text_encoder") + digester.of_folder(extras / "tokenizer"),
        vae=digester.of_folder(extras / "vae"),
        init_from=digester.of_content(weights.sources.init_from) if weights.sources.init_from else None,
    )
    return Session(weights, world, cache, digests, console, stop, allow)


def find_checkpoint(
    folder: RunFolder, config: Config, identity: Mapping[str, Any], session: Session
) -> Checkpoint | None:
    """The checkpoint that `config` continues from; None: the run begins at step 0.

    Raises:
        WeightsError: there were checkpoints, and none is left whole.
        ConfigError: the checkpoint belongs to another run, or to a later step than the run shall have.
    """
    if not session.world.is_main:
        distributed.wait()  # the main process sets damaged checkpoints aside; the others look afterwards
    found = checkpoint.load_newest(folder.checkpoints, session.console.warn)
    if session.world.is_main:
        distributed.wait()
    if found is None:
        run_folder.require_untouched(folder)
        return None
    for changed in run_folder.require_same(folder, found.numbers["identity"], identity, session.allow):
        session.console.warn(f"allowed: {changed}")
    if found.step > config.train.steps:
        what = f"is {config.train.steps}, and the run is at step {found.step} already"
        raise ConfigError(Problem("train.steps", what, "raise it"))
    return found


def fill_caches(checked: Checked, session: Session, plan: ordering.Plan) -> None:
    """Encode every picture and prompt that the run will use and the cache does not have."""

    def tick(what: str, done: int, total: int) -> None:
        session.stop.check()
        session.console.tick(what, done, total)

    recipes = [*recipe.previews(checked.config), *recipe.also(checked.config)]
    encoders = encoding.Encoders(
        extras=session.weights.sources.extras,
        device=session.world.device,
        dtype=checked.config.model.dtype,
        vae_digest=session.digests.vae,
        text_digest=session.digests.text_encoder,
        warn=session.console.warn,
    )
    held_out = {item.picture.prompts[0] for item in checked.held_out}
    is_own = methods.learns_from_itself(checked.config.train.method)
    empty = {""} if is_own or checked.config.guidance.contrastive is not None else set()
    prompts = sorted({*plan.prompts(checked.config.train.steps), *recipe.prompts_of(recipes), *held_out, *empty})
    share = Share(session.world.process, session.world.processes)
    items = [*([] if is_own else plan.items), *checked.held_out]
    pictures, texts = encoding.fill(session.cache, encoders, items, prompts, tick, share)
    session.console.say(f"cache {session.cache.folder}: latents {pictures}; prompts {texts}")
    distributed.wait()


def prepare(
    checked: Checked,
    fit: Plan,
    folder: RunFolder,
    session: Session,
    identity: Mapping[str, Any],
    found: Checkpoint | None,
    trackers: Trackers,
) -> Run:
    """Make everything that the loop needs, as it was at `found`; the run folder is locked by the caller.

    Raises:
        ZImageTrainError: of any kind; nothing was trained.
    """
    config, weights, world, console = checked.config, session.weights, session.world, session.console
    plan = make_plan(config, checked.items, world.processes)
    fill_caches(checked, session, plan)
    fits = fit.facts() | {"words": forecast.plan_in_words(fit)}
    console.say(f"memory plan: {fits['words']}")
    frozen = _assemble(config, session, fit.form)
    attached = _attach(config, frozen, weights, fit, console)
    inputs = _inputs(config, session, frozen, plan)
    groups = names.count_by_group(attached.a)
    optimizer = optim.build(config.optimizer, attached.parameters())
    start, decay = found.step if found else 0, config.ema.decay
    averages = ema.begin(decay, attached.state()) if decay is not None else None
    if found:
        _continue(found, attached, averages, optimizer)
        console.say(f"continuing after step {start}")
    drawn = views.of(config, folder, identity, weights.sources.also)
    if world.is_main:
        run_folder.write_config(folder, config)
        facts = {"plan": fits, "starts": [*run_folder.earlier_starts(folder), start]}
        run_folder.write_facts(folder, _facts(checked, session, frozen, plan, groups) | facts)
    return Run(
        config=config,
        folder=folder,
        identity=identity,
        world=world,
        plan=plan,
        memory=fit,
        inputs=inputs,
        frozen=frozen,
        attached=attached,
        ema=averages,
        optimizer=optimizer,
        held_out=checked.held_out,
        extras=weights.sources.extras,
        views=drawn,
        extra_loras=_extra_loras(config, weights, console),
        preview_embeds={prompt: inputs.embeds(prompt) for view in drawn for prompt in recipe.prompts_of(view.recipes)},
        meter=_meter(config, drawn, inputs),
        export_metadata=describe(config, session.digests.adapter),
        warnings=checked.warnings,
        start=start,
        console=console,
        trackers=trackers,
        stop=session.stop,
        pace=Pace(),
    )


def _meter(config: Config, drawn: list[View], inputs: Inputs) -> Meter | None:
    """Of Turbo's drift, on the first previews that have nothing to do with the concept, if any has not."""
    shown = next((view.recipes for view in drawn if view.is_metered), None)
    if shown is None:
        return None
    neutral = [one for one in shown if not change.has_one(one.prompt, config.triggers)] or shown
    variant = VARIANTS["turbo"]
    recipes = [replace(one, steps=variant.steps, guidance=variant.guidance) for one in neutral[:METERED]]
    return Meter(recipes, {one.prompt: inputs.embeds(one.prompt) for one in recipes})


def _continue(found: Checkpoint, attached: Attached, averages: Ema | None, optimizer: Optimizer) -> None:
    where = str(found.path)
    attached.load_state(found.part("lora."), where)
    if averages is not None:
        averages.load_state(found.part("ema."), where)
    optim.load_state(optimizer, found.part("optim."), found.numbers["optimizer"], where)


def _assemble(config: Config, session: Session, form: Form) -> Frozen:
    weights, console = session.weights, session.console
    adapter = None
    if weights.sources.adapter is not None:
        adapter = adapters.load(weights.sources.adapter, config.model.adapter_strength, weights.shape)
    console.say(f"loading {weights.sources.transformer}")
    path, device = weights.sources.transformer, session.world.device
    frozen = assemble(path, adapter, config.model.dtype, device, form.kind, form.streamed)
    if adapter is not None:
        count = f"{frozen.adapter_matched}/{len(adapter.lora)}"
        console.say(f"training adapter {adapter.path.name}: matched {count} modules, strength {adapter.strength:g}")
    if frozen.ring is not None and not frozen.ring.is_pinned:
        console.warn("main memory could not be pinned, so streaming is slower than planned; lower memory.offload")
    if found := frozen.rounding.facts():
        arrived = (
            f"; {found['adapter_arrived']:.1%} of the adapter's change arrive" if "adapter_arrived" in found else ""
        )
        console.say(f"quantised to {form.kind}: weights are off by {found['weight_error']:.2%}{arrived}")
    return frozen


def _inputs(config: Config, session: Session, frozen: Frozen, plan: ordering.Plan) -> Inputs:
    """What the loop reads; the model draws its own pictures with the LoRA as it begins, wherever the run goes on."""
    inputs = Inputs(session.cache, session.digests, config.model.dtype)
    if not methods.learns_from_itself(config.train.method):
        return inputs
    return replace(inputs, own=_draw_own(config, session, frozen, plan, inputs))


def _draw_own(config: Config, session: Session, frozen: Frozen, plan: ordering.Plan, inputs: Inputs) -> Own:
    """Let the model draw what it is trained on, unless the cache has it."""
    digests, kind = session.digests, config.model.quantize
    made_by = (digests.model, digests.text_encoder, config.model.dtype, str(kind), str(digests.init_from))
    own = Own(config, made_by)
    items = {own.key(item): item for item in plan.items}

    def draw(key: str) -> Tensor:
        item = items[key]
        return own.draw(frozen.model, item, {text: inputs.embeds(text) for text in (item.picture.prompts[0], "")})

    def tick(what: str, done: int, total: int) -> None:
        session.stop.check()
        session.console.tick(what.replace("encoding", "drawing"), done, total)

    share = Share(session.world.process, session.world.processes)
    sizes = {key: own.num_bytes(item) for key, item in items.items()}
    tally = filling.fill_own(session.cache, sizes, draw, tick, share)
    session.console.say(f"{config.train.method}: the model's own pictures: {tally.found} found, {tally.encoded} drawn")
    distributed.wait()
    return own


def _extra_loras(config: Config, weights: Weights, console: Console) -> list[tuple[Lora, float]]:
    read = [lora_files.read(path) for path in weights.sources.extra_loras]
    for one, lora in zip(config.sample.extra_loras, read, strict=True):
        console.say(f"previews have {one.file} too: matched {len(lora)}/{len(lora)} modules, weight {one.weight:g}")
    return [(lora, one.weight) for one, lora in zip(config.sample.extra_loras, read, strict=True)]


def _attach(config: Config, frozen: Frozen, weights: Weights, plan: Plan, console: Console) -> Attached:
    lora, modules = config.lora, weights.modules
    attached = attach.attach(frozen.model, modules, lora.rank, lora.alpha, lora.dropout, config.seed)
    recompute_as_planned(frozen.model, plan, lora.dropout)
    shown = ", ".join(f"{name} {count}" for name, count in names.count_by_group(attached.a).items())
    console.say(f"LoRA rank {lora.rank}: matched {len(attached.a)}/{len(modules)} modules ({shown})")
    if weights.sources.init_from is not None:
        attached.begin_with(lora_files.read(weights.sources.init_from))
        console.say(f"it begins as {lora.init_from}")
    return attached


def fingerprint_of(checked: Checked, digests: Digests) -> dict[str, Any]:
    """What a run is made from, by content: a resumed run must find the same."""
    return {
        "model": digests.model,
        "adapter": digests.adapter,
        "text_encoder": digests.text_encoder,
        "vae": digests.vae,
        **({"init_from": digests.init_from} if digests.init_from else {}),
        "data": fingerprint(checked.pictures),
    }


def _facts(
    checked: Checked, session: Session, frozen: Frozen, plan: ordering.Plan, groups: dict[str, int]
) -> dict[str, Any]:
    config, weights, digests, world = checked.config, session.weights, session.digests, session.world
    adapter = frozen.adapter and {
        "name": frozen.adapter.path.name,
        "matched": f"{frozen.adapter_matched}/{len(frozen.adapter.lora)}",
        "strength": frozen.adapter.strength,
        "sha256": digests.adapter,
    }
    is_cuda = world.device.type == "cuda"
    return {
        "versions": {"zimage-train": __version__} | {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(world.device) if is_cuda else str(world.device),
        "processes": world.processes,
        "lora": {
            "rank": config.lora.rank,
            "matched": f"{sum(groups.values())}/{len(weights.modules)}",
            "groups": groups,
        },
        "adapter": adapter,
        "quantized": frozen.rounding.facts() or None,
        "dataset": {
            "pictures": sum(map(len, checked.pictures)),
            "samples": len(plan.own.items),
            "regularisation": len(plan.items) - len(plan.own.items),
            "steps_per_epoch": round(plan.steps_per_epoch, 2),
        },
        "fingerprint": fingerprint_of(checked, digests),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
