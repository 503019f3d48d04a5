"""From a checked config to a run that is ready: caches filled, model assembled, LoRA attached, checkpoint loaded."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zimage_train import __version__
from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset import encoding, sample_order
from zimage_train.dataset.encoding import Shard
from zimage_train.dataset.sample_order import make_sample_order
from zimage_train.dataset.scan import dataset_fingerprint
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.diffusion import request
from zimage_train.diffusion.drift import DriftMeter
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.errors import ConfigError, Problem
from zimage_train.io.digests import DigestCache
from zimage_train.lora import layers, lora_file, targets, training_adapter
from zimage_train.lora.layers import LoraLayers
from zimage_train.lora.lora_file import Lora
from zimage_train.lora.metadata import training_metadata
from zimage_train.optim import ema, optimizers
from zimage_train.optim.ema import Ema
from zimage_train.planning import forecast
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.planner import MemoryPlan
from zimage_train.planning.preflight import ModelFiles, RunSpec
from zimage_train.report import preview_shift
from zimage_train.report.console import Console
from zimage_train.report.trackers import Trackers
from zimage_train.training import checkpoint, distributed, preview_sets, run_dir
from zimage_train.training.checkpoint import Checkpoint
from zimage_train.training.distributed import World
from zimage_train.training.fit import apply_recompute_plan
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.run_dir import RunDir
from zimage_train.training.self_distill import GeneratedData
from zimage_train.training.signals import StopRequest
from zimage_train.training.state import CachedDataset, ModelDigests, TrainState
from zimage_train.training.step_timer import SlowStepDetector

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "prodigyopt")
MAX_DRIFT_REQUESTS = 2
"""Previews that are also looked at for drift: each costs as much again, and once twice that."""


@dataclass(frozen=True)
class RunContext:
    """What surrounds a run in this process."""

    model_files: ModelFiles
    world: World
    cache: TensorCache
    digests: ModelDigests
    console: Console
    stop: StopRequest
    allow: tuple[str, ...]
    """Settings that this start may change although they shape the weights."""


def open_context(
    checked: RunSpec, world: World, console: Console, stop: StopRequest, allow: tuple[str, ...] = ()
) -> RunContext:
    """Open the cache that the config names, or the user's, and digest every part of the model by content."""
    weights = checked.weights
    assert weights is not None  # without weights, `train` and `cache` have ended with an error
    cache = TensorCache(cache_dir(checked.config))
    digester = DigestCache(cache.folder / "digests.json")
    source, extras, adapter = weights.paths.transformer, weights.paths.extras, weights.paths.adapter
    digests = ModelDigests(
        model=digester.of_folder(source) if source.is_dir() else digester.of_content(source),
        adapter=digester.of_content(adapter) if adapter else None,
        text_encoder=digester.of_folder(extras / "text_encoder") + digester.of_folder(extras / "tokenizer"),
        vae=digester.of_folder(extras / "vae"),
        init_from=digester.of_content(weights.paths.init_from) if weights.paths.init_from else None,
    )
    return RunContext(weights, world, cache, digests, console, stop, allow)


def find_checkpoint(
    folder: RunDir, config: Config, identity: Mapping[str, Any], session: RunContext
) -> Checkpoint | None:
    """The checkpoint that `config` continues from; None: the run begins at step 0.

    Raises:
        WeightsError: there were checkpoints, and none is left whole.
        ConfigError: the checkpoint belongs to another run, or to a later step than the run shall have.
    """
    if not session.world.is_main:
        distributed.barrier()  # the main process sets damaged checkpoints aside; the others look afterwards
    found = checkpoint.load_newest(folder.checkpoints, session.console.warning)
    if session.world.is_main:
        distributed.barrier()
    if found is None:
        run_dir.require_untouched(folder)
        return None
    for changed in run_dir.require_same(folder, found.numbers["identity"], identity, session.allow):
        session.console.warning(f"allowed: {changed}")
    if found.step > config.train.steps:
        what = f"is {config.train.steps}, and the run is at step {found.step} already"
        raise ConfigError(Problem("train.steps", what, "raise it"))
    return found


def fill_caches(checked: RunSpec, session: RunContext, plan: sample_order.SampleOrder) -> None:
    """Encode every image and prompt that the run will use and the cache does not have."""

    def tick(what: str, done: int, total: int) -> None:
        session.stop.check()
        session.console.progress(what, done, total)

    recipes = [*request.preview_requests(checked.config), *request.comparison_requests(checked.config)]
    encoders = encoding.Encoders(
        extras=session.model_files.paths.extras,
        device=session.world.device,
        dtype=checked.config.model.dtype,
        vae_digest=session.digests.vae,
        text_digest=session.digests.text_encoder,
        warn=session.console.warning,
    )
    held_out = {item.image.prompts[0] for item in checked.held_out}
    is_own = checked.config.method.generates_data
    empty = {""} if is_own or checked.config.guidance.contrastive is not None else set()
    prompts = sorted(
        {*plan.prompts(checked.config.train.steps), *request.prompts_to_encode(recipes), *held_out, *empty}
    )
    share = Shard(session.world.rank, session.world.world_size, distributed.barrier)
    items = [*([] if is_own else plan.items), *checked.held_out]
    images, texts = encoding.encode_missing(session.cache, encoders, items, prompts, tick, share)
    session.console.info(f"cache {session.cache.folder}: latents {images}; prompts {texts}")


def build_state(
    checked: RunSpec,
    fit: MemoryPlan,
    folder: RunDir,
    session: RunContext,
    identity: Mapping[str, Any],
    found: Checkpoint | None,
    trackers: Trackers,
) -> TrainState:
    """Make everything that the loop needs, as it was at `found`; the run folder is locked by the caller.

    Raises:
        ZImageTrainError: of any kind; nothing was trained.
    """
    config, weights, world, console = checked.config, session.model_files, session.world, session.console
    plan = make_sample_order(config, checked.items, world.world_size)
    fill_caches(checked, session, plan)
    fits = fit.facts() | {"words": forecast.describe_plan(fit)}
    console.info(f"memory plan: {fits['words']}")
    frozen = _assemble(config, session, fit.form)
    attached = _attach(config, frozen, weights, fit, console)
    inputs = _inputs(config, session, frozen, plan)
    groups = targets.count_by_group(attached.a)
    optimizer = optimizers.build_optimizer(config.optimizer, attached.parameters())
    start, decay = found.step if found else 0, config.ema.decay
    averages = ema.init_ema(decay, attached.state()) if decay is not None else None
    if found:
        _continue(found, attached, averages, optimizer)
        console.info(f"continuing after step {start}")
    drawn = preview_sets.make_preview_sets(config, folder, identity, weights.paths.second_model)
    if world.is_main:
        run_dir.write_config(folder, config)
        facts = {"plan": fits, "starts": [*run_dir.earlier_starts(folder), start]}
        run_dir.write_facts(folder, _facts(checked, session, frozen, plan, groups) | facts)
    return TrainState(
        config=config,
        folder=folder,
        identity=identity,
        world=world,
        order=plan,
        memory_plan=fit,
        dataset=inputs,
        frozen=frozen,
        lora=attached,
        ema=averages,
        optimizer=optimizer,
        held_out=checked.held_out,
        extras=weights.paths.extras,
        preview_sets=drawn,
        extra_loras=_extra_loras(config, weights, console),
        preview_embeds={
            prompt: inputs.embeds(prompt) for view in drawn for prompt in request.prompts_to_encode(view.requests)
        },
        drift_meter=_drift_meter(config, drawn, inputs),
        export_metadata=training_metadata(config, session.digests.adapter),
        warnings=checked.warnings,
        start_step=start,
        console=console,
        trackers=trackers,
        stop=session.stop,
        slow_steps=SlowStepDetector(),
    )


def _drift_meter(config: Config, drawn: list[PreviewSet], inputs: CachedDataset) -> DriftMeter | None:
    """Of Turbo's drift, on the first previews that have nothing to do with the concept, if any has not."""
    shown = next((view.requests for view in drawn if view.is_metered), None)
    if shown is None:
        return None
    neutral = [one for one in shown if not preview_shift.has_trigger(one.prompt, config.triggers)] or shown
    variant = VARIANTS["turbo"]
    recipes = [replace(one, steps=variant.steps, guidance=variant.guidance) for one in neutral[:MAX_DRIFT_REQUESTS]]
    return DriftMeter(recipes, {one.prompt: inputs.embeds(one.prompt) for one in recipes})


def _continue(found: Checkpoint, attached: LoraLayers, averages: Ema | None, optimizer: Optimizer) -> None:
    where = str(found.path)
    attached.load_state(found.part("lora."), where)
    if averages is not None:
        averages.load_state(found.part("ema."), where)
    optimizers.load_optimizer_state(optimizer, found.part("optim."), found.numbers["optimizer"], where)


def _assemble(config: Config, session: RunContext, form: WeightPlacement) -> FrozenTransformer:
    weights, console = session.model_files, session.console
    adapter = None
    if weights.paths.adapter is not None:
        adapter = training_adapter.load_adapter(weights.paths.adapter, config.model.adapter_strength, weights.shape)
    console.info(f"loading {weights.paths.transformer}")
    path, device = weights.paths.transformer, session.world.device
    frozen = load_frozen(path, adapter, config.model.dtype, device, form.kind, form.streamed)
    if adapter is not None:
        count = f"{frozen.adapter_matched}/{len(adapter.lora)}"
        console.info(f"training adapter {adapter.path.name}: matched {count} modules, strength {adapter.strength:g}")
    if frozen.offloader is not None and not frozen.offloader.is_pinned:
        console.warning("main memory could not be pinned, so streaming is slower than planned; lower memory.offload")
    if found := frozen.quantization.facts():
        arrived = (
            f"; {found['adapter_arrived']:.1%} of the adapter's change arrive" if "adapter_arrived" in found else ""
        )
        console.info(f"quantised to {form.kind}: weights are off by {found['weight_error']:.2%}{arrived}")
    return frozen


def _inputs(
    config: Config, session: RunContext, frozen: FrozenTransformer, plan: sample_order.SampleOrder
) -> CachedDataset:
    """What the loop reads; the model draws its own images with the LoRA as it begins, wherever the run goes on."""
    inputs = CachedDataset(session.cache, session.digests, config.model.dtype)
    if not config.method.generates_data:
        return inputs
    return replace(inputs, generated=_draw_own(config, session, frozen, plan, inputs))


def _draw_own(
    config: Config,
    session: RunContext,
    frozen: FrozenTransformer,
    plan: sample_order.SampleOrder,
    inputs: CachedDataset,
) -> GeneratedData:
    """Let the model draw what it is trained on, unless the cache has it."""
    digests, kind = session.digests, config.model.quantize
    made_by = (digests.model, digests.text_encoder, config.model.dtype, str(kind), str(digests.init_from))
    own = GeneratedData(config, made_by)
    items = {own.key(item): item for item in plan.items}

    def draw(key: str) -> Tensor:
        item = items[key]
        return own.generate(frozen.model, item, {text: inputs.embeds(text) for text in (item.image.prompts[0], "")})

    def tick(what: str, done: int, total: int) -> None:
        session.stop.check()
        session.console.progress(what, done, total)

    share = Shard(session.world.rank, session.world.world_size, distributed.barrier)
    sizes = {key: own.num_bytes(item) for key, item in items.items()}
    tally = encoding.fill_generated(session.cache, sizes, draw, tick, share)
    session.console.info(f"{config.train.method}: the model's own images: {tally.found} found, {tally.encoded} drawn")
    return own


def _extra_loras(config: Config, weights: ModelFiles, console: Console) -> list[tuple[Lora, float]]:
    read = [lora_file.read_lora(path) for path in weights.paths.extra_loras]
    for one, lora in zip(config.sample.extra_loras, read, strict=True):
        console.info(f"previews have {one.file} too: matched {len(lora)}/{len(lora)} modules, weight {one.weight:g}")
    return [(lora, one.weight) for one, lora in zip(config.sample.extra_loras, read, strict=True)]


def _attach(
    config: Config, frozen: FrozenTransformer, weights: ModelFiles, plan: MemoryPlan, console: Console
) -> LoraLayers:
    lora, modules = config.lora, weights.modules
    attached = layers.attach_lora(frozen.model, modules, lora.rank, lora.alpha, lora.dropout, config.seed)
    apply_recompute_plan(frozen.model, plan, lora.dropout)
    shown = ", ".join(f"{name} {count}" for name, count in targets.count_by_group(attached.a).items())
    console.info(f"LoRA rank {lora.rank}: matched {len(attached.a)}/{len(modules)} modules ({shown})")
    if weights.paths.init_from is not None:
        attached.initialize_from(lora_file.read_lora(weights.paths.init_from))
        console.info(f"it begins as {lora.init_from}")
    return attached


def run_fingerprint(checked: RunSpec, digests: ModelDigests) -> dict[str, Any]:
    """What a run is made from, by content: a resumed run must find the same."""
    return {
        "model": digests.model,
        "adapter": digests.adapter,
        "text_encoder": digests.text_encoder,
        "vae": digests.vae,
        **({"init_from": digests.init_from} if digests.init_from else {}),
        "data": dataset_fingerprint(checked.images),
    }


def _facts(
    checked: RunSpec,
    session: RunContext,
    frozen: FrozenTransformer,
    plan: sample_order.SampleOrder,
    groups: dict[str, int],
) -> dict[str, Any]:
    config, weights, digests, world = checked.config, session.model_files, session.digests, session.world
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
        "processes": world.world_size,
        "lora": {
            "rank": config.lora.rank,
            "matched": f"{sum(groups.values())}/{len(weights.modules)}",
            "groups": groups,
        },
        "adapter": adapter,
        "quantized": frozen.quantization.facts() or None,
        "dataset": {
            "pictures": sum(map(len, checked.images)),
            "samples": len(plan.concept.items),
            "regularisation": len(plan.items) - len(plan.concept.items),
            "steps_per_epoch": round(plan.steps_per_epoch, 2),
        },
        "fingerprint": run_fingerprint(checked, digests),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
