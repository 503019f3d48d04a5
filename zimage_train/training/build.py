"""Preparation of a checked run: fill the caches, load the model, attach the LoRA, load the checkpoint."""

import importlib.metadata
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zimage_train import __version__
from zimage_train.config.schema import Config
from zimage_train.config.triggers import has_any_trigger
from zimage_train.config.types import AttentionName
from zimage_train.config.variants import VARIANTS
from zimage_train.dataset import encoding
from zimage_train.dataset.encoding import Shard
from zimage_train.dataset.tensor_cache import CachedDataset
from zimage_train.diffusion import request
from zimage_train.diffusion.drift import DriftMeter
from zimage_train.diffusion.frozen import FrozenTransformer, load_frozen
from zimage_train.lora import adapters, headers, lora_file, targets, training_adapter
from zimage_train.lora.deltas import Deltas, row_norms
from zimage_train.lora.layers import AdapterLayers, LoraLayers
from zimage_train.lora.metadata import training_metadata
from zimage_train.models import transformer
from zimage_train.optim import ema, optimizers
from zimage_train.optim.ema import Ema
from zimage_train.planning import forecast
from zimage_train.planning.planner import MemoryPlan
from zimage_train.report.trackers import Trackers
from zimage_train.training import distributed, run_dir
from zimage_train.training.checkpoint import Checkpoint
from zimage_train.training.context import RunContext, run_fingerprint
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.self_distill import GeneratedData
from zimage_train.training.state import LastSave, TrainState
from zimage_train.training.step_runner import StepRunner, make_recorder
from zimage_train.training.step_timer import SlowStepDetector

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "prodigyopt",
    "pytorch-optimizer",
)
MAX_DRIFT_REQUESTS = 2
"""Number of previews for which drift is measured; measuring a preview takes about twice as long as drawing it."""


def fill_caches(context: RunContext) -> None:
    """Encode every image and prompt that the run uses and the cache does not have."""
    config, order, held_out = context.config, context.spec.order, context.spec.held_out
    encoders = encoding.Encoders(
        extras=context.model_files.paths.extras,
        device=context.world.device,
        dtype=config.model.dtype,
        vae_digest=context.digests.vae,
        text_digest=context.digests.text_encoder,
        warn=context.console.warning,
    )
    preview_requests = [*request.preview_requests(config), *request.comparison_requests(config)]
    prompts = {
        *order.prompts(config.train.steps),
        *request.prompts_to_encode(preview_requests),
        *(item.image.prompts[0] for item in held_out),
    }
    if config.method.generates_data or config.guidance.contrastive is not None:
        prompts.add("")  # the unconditional prediction, of the teacher or of contrastive guidance
    for prompt in order.prompts(config.train.steps):
        prompts.update(config.slider_prompts(prompt))
    # Generated latents need the transformer, so `_open_dataset` makes them once it is loaded.
    items = list(held_out) if config.method.generates_data else [*order.items, *order.negatives, *held_out]
    images, texts = encoding.encode_missing(
        context.cache, encoders, items, sorted(prompts), context.report_progress, _shard(context)
    )
    context.console.info(f"cache {context.cache.folder}: latents {images}; prompts {texts}")


def _shard(context: RunContext) -> Shard:
    return Shard(context.world.rank, context.world.world_size, distributed.barrier)


def build_state(
    context: RunContext,
    plan: MemoryPlan,
    checkpoint: Checkpoint | None,
    trackers: Trackers,
    attention: AttentionName,
    allow: Collection[str] = (),
) -> TrainState:
    """Return everything that the loop needs, in the state of `checkpoint`, or of step 0 without a checkpoint.

    The caches must be filled and the run folder locked. The main process writes config.yaml and run.json.

    Raises:
        ZImageTrainError: the model, a LoRA or the checkpoint cannot be loaded; nothing was trained.
    """
    config, world, console = context.config, context.world, context.console
    plan_text = forecast.describe_plan(plan)
    console.info(f"memory plan: {plan_text}")
    frozen, lora, dataset = load_model(context, plan)
    optimizer = _build_optimizer(context, lora)
    averages = None if config.ema.decay is None else ema.init_ema(config.ema.decay, lora.flat.whole, lora.name_views)
    start_step = 0
    if checkpoint is not None:
        start_step = checkpoint.step
        _load_checkpoint(checkpoint, lora, averages, optimizer)
        console.info(f"continuing after step {start_step}")
    if world.is_main:
        run_dir.write_config(context.folder, config)
        facts = _facts(context, frozen, targets.count_by_group(lora.modules))
        facts["lora"]["lr_factors"] = optimizers.count_lr_factors(optimizer)
        facts["plan"] = plan.facts() | {"words": plan_text}
        facts["starts"] = [*run_dir.earlier_starts(context.folder), start_step]
        run_dir.write_facts(context.folder, facts)
    preview_prompts: set[str] = set()
    for previews in context.preview_sets:
        preview_prompts.update(request.prompts_to_encode(previews.requests))
    return TrainState(
        config=config,
        folder=context.folder,
        identity=context.identity,
        world=world,
        order=context.spec.order,
        memory_plan=plan,
        dataset=dataset,
        frozen=frozen,
        lora=lora,
        run_step=StepRunner(config, frozen, lora, plan, make_recorder(config, frozen, world.device)),
        ema=averages,
        optimizer=optimizer,
        held_out=context.spec.held_out,
        vae_path=context.model_files.paths.extras.vae,
        preview_sets=context.preview_sets,
        extra_loras=[*((lora.lora, lora.strength) for lora in frozen.beside), *_read_extra_loras(context)],
        preview_embeds={prompt: dataset.embeds(prompt) for prompt in preview_prompts},
        drift_meter=_drift_meter(config, context.preview_sets, dataset),
        export_metadata=training_metadata(
            config, context.digests.adapter, _concept_prompts(context), context.digests.beside
        ),
        warnings=[str(warning) for warning in context.spec.warnings],
        start_step=start_step,
        last_save=LastSave(start_step, time.monotonic()),
        attention=attention,
        keeps_path=checkpoint is not None and "path" not in allow,
        console=console,
        trackers=trackers,
        stop=context.stop,
        slow_steps=SlowStepDetector(),
        clock=context.clock,
    )


def load_model(context: RunContext, plan: MemoryPlan) -> tuple[FrozenTransformer, AdapterLayers, CachedDataset]:
    """Return the model with its training adapter, the LoRA at its start, and the cached data of the run.

    Raises:
        ZImageTrainError: the model or a LoRA cannot be loaded.
    """
    frozen = _load_frozen(context, plan)
    lora = _attach_lora(context, frozen)
    return frozen, lora, _open_dataset(context, frozen)


def _build_optimizer(context: RunContext, lora: AdapterLayers) -> Optimizer:
    """Return the optimizer of the run; if learning rates differ, it updates each matrix for itself."""
    settings = context.config.optimizer
    factors = optimizers.lr_factors(
        lora.flat, targets.lr_factors_of(settings, context.model_files.modules), settings.lora_plus
    )
    if not factors:
        return optimizers.build_optimizer(settings, optimizers.parameters_for(settings.name, lora.flat))
    optimizer = optimizers.build_optimizer(settings, list(lora.flat.views.values()), factors)
    counts = optimizers.count_lr_factors(optimizer).items()
    listed = ", ".join(f"{factor:g} on {count} matrices" for factor, count in counts)
    context.console.info(f"factors of the learning rate: {listed}")
    return optimizer


def _concept_prompts(context: RunContext) -> list[str]:
    """Return the prompts of each image that shows the concept, once for each image."""
    images = {}
    for item in context.spec.order.items:
        if not context.config.data[item.entry].regularization:
            images[item.entry, item.image.path] = item.image.prompts
    return [prompt for prompts in images.values() for prompt in prompts]


def _load_frozen(context: RunContext, plan: MemoryPlan) -> FrozenTransformer:
    """Load the transformer with the training adapter merged, placed as `plan` says."""
    config, console = context.config, context.console
    paths, shape = context.model_files.paths, context.model_files.shape
    adapter = None
    if paths.adapter is not None:
        adapter = training_adapter.load_adapter(paths.adapter, config.model.adapter_strength, shape)
    console.info(f"loading {paths.transformer}")
    kind, streamed = plan.placement.quantization, plan.placement.streamed
    # Only the main process draws previews.
    spare_bytes = plan.spare_host_bytes if context.world.is_main else 0.0
    beside = [
        training_adapter.load_beside(path, lora.weight, shape)
        for path, lora in zip(paths.beside, config.train.beside, strict=True)
    ]
    frozen = load_frozen(
        paths.transformer, adapter, config.model.dtype, context.world.device, kind, streamed, spare_bytes, beside
    )
    if adapter is not None:
        count = f"{frozen.adapter_matched}/{len(adapter.lora)}"
        console.info(f"training adapter {adapter.path.name}: matched {count} modules, strength {adapter.strength:g}")
    for lora in beside:
        count = f"{len(lora.lora)}/{len(lora.lora)}"
        console.info(f"trained beside {lora.path.name}: matched {count} modules, weight {lora.strength:g}")
    if frozen.offloader is not None and not frozen.offloader.is_pinned:
        console.warning("main memory could not be pinned, so streaming is slower than planned; lower memory.offload")
    if errors := frozen.quantization.facts():
        kept = ""
        if "adapter_arrived" in errors:
            kept = f"; {errors['adapter_arrived']:.1%} of the adapter's change arrive"
        console.info(f"quantised to {kind}: weights are off by {errors['weight_error']:.2%}{kept}")
    return frozen


def _attach_lora(context: RunContext, frozen: FrozenTransformer) -> AdapterLayers:
    """Add the LoRA to the frozen model, starting from `lora.init_from` if it is set."""
    settings, modules, console = context.config.lora, context.model_files.modules, context.console
    norms = _norms(frozen, modules) if settings.needs_norms else None
    attached = adapters.attach_adapter(frozen.model, settings, modules, context.config.seed, norms)
    groups = ", ".join(f"{name} {count}" for name, count in targets.count_by_group(attached.modules).items())
    console.info(f"{settings.description}: matched {len(attached.modules)}/{len(modules)} modules ({groups})")
    if settings.ranks:
        counts = targets.count_ranks(settings, modules).items()
        console.info(f"ranks: {', '.join(f'{rank} on {count} modules' for rank, count in counts)}")
    if settings.start == "pissa":
        assert isinstance(attached, LoraLayers)
        attached = attached.subtract_weights(frozen.model, frozen.dense_weight)
        console.info("it begins as the principal part of each weight, which is subtracted (PiSSA)")
    init_from = context.model_files.paths.init_from
    if init_from is not None:
        attached.initialize_from(lora_file.read_deltas(init_from, headers.READ))
        console.info(f"it begins as {settings.init_from}")
    return attached


def _norms(frozen: FrozenTransformer, modules: list[str]) -> dict[str, Tensor]:
    """Return the norms of the rows of the weights in the file, without the training adapter, and not quantised."""
    weights = transformer.read_selected_weights(frozen.path, {f"{module}.weight" for module in modules})
    return {name.removesuffix(".weight"): row_norms(weight) for name, weight in weights}


def _open_dataset(context: RunContext, frozen: FrozenTransformer) -> CachedDataset:
    """Return the cached tensors of the run. For a method that generates its data, generate what is not cached yet."""
    config, digests = context.config, context.digests
    dataset = CachedDataset(context.cache, digests.vae, digests.text_encoder, config.model.dtype)
    if not config.method.generates_data:
        return dataset
    data = generated_data(context)
    items = {data.key(item): item for item in context.spec.order.items}

    def generate(key: str) -> Tensor:
        item = items[key]
        return data.generate(frozen.model, item, {text: dataset.embeds(text) for text in (item.image.prompts[0], "")})

    sizes = {key: data.num_bytes(item) for key, item in items.items()}
    with context.clock.stage("generating"):
        stats = encoding.fill_generated(context.cache, sizes, generate, context.report_progress, _shard(context))
    context.console.info(f"{config.train.method}: the model's own images: {stats.found} found, {stats.encoded} drawn")
    return replace(dataset, generated_key=data.key)


def generated_data(context: RunContext) -> GeneratedData:
    """Return the requests and cache keys of the data that the model generates for `context`."""
    digests, model = context.digests, context.config.model
    made_by = (digests.model, digests.text_encoder, model.dtype, str(model.quantize), str(digests.init_from))
    return GeneratedData(context.config, made_by)


def _load_checkpoint(checkpoint: Checkpoint, lora: AdapterLayers, averages: Ema | None, optimizer: Optimizer) -> None:
    where = str(checkpoint.path)
    lora.load_state(checkpoint.part("lora."), where)
    lora.load_fixed_state(checkpoint.part("fixed."))
    if averages is not None:
        averages.load_state(checkpoint.part("ema."), where)
    tensors, numbers = checkpoint.part("optim."), checkpoint.metadata["optimizer"]
    optimizers.load_optimizer_state(optimizer, lora.flat, tensors, numbers, where)


def _drift_meter(config: Config, preview_sets: list[PreviewSet], dataset: CachedDataset) -> DriftMeter | None:
    """Return a meter of the drift from Turbo, or None if no previews are drawn on Turbo.

    It uses the first previews without the trigger, or the first previews if all have it.
    """
    on_turbo = next((previews.requests for previews in preview_sets if previews.measures_drift), None)
    if on_turbo is None:
        return None
    # With the trigger, images are meant to change, so a change there would not tell drift from learning.
    without_trigger = [item for item in on_turbo if not has_any_trigger(item.prompt, config.triggers)]
    variant = VARIANTS["turbo"]
    requests = [
        replace(item, steps=variant.steps, guidance=variant.guidance)
        for item in (without_trigger or on_turbo)[:MAX_DRIFT_REQUESTS]
    ]
    return DriftMeter(requests, {item.prompt: dataset.embeds(item.prompt) for item in requests})


def _read_extra_loras(context: RunContext) -> list[tuple[Deltas, float]]:
    """Return the LoRAs of `sample.extra_loras` with their weights."""
    loras = []
    settings = context.config.sample.extra_loras
    for setting, path in zip(settings, context.model_files.paths.extra_loras, strict=True):
        lora = lora_file.read_deltas(path, headers.READ)
        count = f"{len(lora)}/{len(lora)}"
        context.console.info(f"previews have {setting.file} too: matched {count} modules, weight {setting.weight:g}")
        loras.append((lora, setting.weight))
    return loras


def _facts(context: RunContext, frozen: FrozenTransformer, groups: dict[str, int]) -> dict[str, Any]:
    """Return entries of run.json: versions, device, LoRA, adapter, data, warnings, inputs; `groups` counts modules."""
    config, world, order = context.config, context.world, context.spec.order
    adapter = None
    if frozen.adapter is not None:
        adapter = {
            "name": frozen.adapter.path.name,
            "matched": f"{frozen.adapter_matched}/{len(frozen.adapter.lora)}",
            "strength": frozen.adapter.strength,
            "sha256": context.digests.adapter,
        }
    beside: list[dict[str, Any]] = []
    for lora, digest in zip(frozen.beside, context.digests.beside, strict=True):
        count = f"{len(lora.lora)}/{len(lora.lora)}"
        beside.append({"name": lora.path.name, "matched": count, "weight": lora.strength, "sha256": digest})
    is_cuda = world.device.type == "cuda"
    return {
        "versions": {"zimage-train": __version__} | {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(world.device) if is_cuda else str(world.device),
        "processes": world.world_size,
        "lora": {
            "type": config.lora.type,
            "rank": config.lora.rank,
            "ranks": None if not config.lora.ranks else targets.count_ranks(config.lora, context.model_files.modules),
            "matched": f"{sum(groups.values())}/{len(context.model_files.modules)}",
            "groups": groups,
        },
        "adapter": adapter,
        "beside": beside,
        "quantized": frozen.quantization.facts() or None,
        "dataset": {
            "pictures": sum(map(len, context.spec.images)),
            "samples": len(order.concept.items),
            "regularisation": len(order.items) - len(order.concept.items),
            "steps_per_epoch": round(order.steps_per_epoch, 2),
        },
        "warnings": [warning.as_json() for warning in context.spec.warnings],
        "fingerprint": run_fingerprint(context.spec, context.digests),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
