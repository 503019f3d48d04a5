"""From a checked config to a run that is ready: caches filled, model assembled, LoRA attached, checkpoint loaded."""

import importlib.metadata
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recompute

from zimage_train import __version__, checkpoint, distributed, encoding, memory, optim
from zimage_train.assemble import Frozen, assemble
from zimage_train.config.schema import Config
from zimage_train.data import cache as caching
from zimage_train.data.cache import Cache
from zimage_train.data.folder import fingerprint
from zimage_train.data.plan import Plan, make_plan
from zimage_train.distributed import World
from zimage_train.errors import ConfigError, Problem
from zimage_train.lora import adapter as adapters
from zimage_train.lora import attach, names
from zimage_train.lora.attach import Attached
from zimage_train.lora.metadata import describe
from zimage_train.model.digests import Digests as Digester
from zimage_train.model.shapes import TransformerShape
from zimage_train.preflight import Checked, Weights, system_memory_bytes
from zimage_train.report.console import Console
from zimage_train.sampling import recipe
from zimage_train.training import run_folder
from zimage_train.training.run import Digests, Inputs, Run
from zimage_train.training.run_folder import RunFolder
from zimage_train.training.stopping import StopRequest

LARGEST_ON_CPU = 1_000_000_000
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "prodigyopt")


@dataclass(frozen=True)
class Session:
    """What surrounds a run in this process."""

    weights: Weights
    world: World
    cache: Cache
    digests: Digests
    console: Console
    stop: StopRequest


def open_session(checked: Checked, world: World, console: Console, stop: StopRequest) -> Session:
    """Open the cache that the config names, or the user's, and digest every part of the model by content."""
    weights, folder = checked.weights, checked.config.cache.folder
    assert weights is not None  # without weights, `train` and `cache` have ended with an error
    cache = Cache(Path(folder) if folder else caching.default_folder())
    digester = Digester(cache.folder / "digests.json")
    source, extras, adapter = weights.sources.transformer, weights.sources.extras, weights.sources.adapter
    digests = Digests(
        model=digester.of_folder(source) if source.is_dir() else digester.of([source]),
        adapter=digester.of_content(adapter) if adapter else None,
        text_encoder=digester.of_folder(extras / "text_encoder") + digester.of_folder(extras / "tokenizer"),
        vae=digester.of_folder(extras / "vae"),
    )
    return Session(weights, world, cache, digests, console, stop)


def require_device(world: World, shape: TransformerShape, config: Config) -> None:
    """Refuse what the device cannot do, before anything is encoded.

    Raises:
        ConfigError: no GPU for a model that needs one, or one without bf16.
    """
    parameters = sum(memory.count(size) for size in shape.parameters.values())
    if world.device.type == "cpu" and parameters > LARGEST_ON_CPU:
        what = f"no GPU was found, and {parameters / 1e9:.1f} billion parameters would take weeks without one"
        raise ConfigError(Problem("device", what, "check the driver with nvidia-smi, and that torch is a CUDA build"))
    if world.device.type == "cuda" and config.model.dtype == "bf16" and not torch.cuda.is_bf16_supported(False):
        what = f"{torch.cuda.get_device_name()} has no bf16"
        raise ConfigError(Problem("model.dtype", what, "an RTX 30 series card or newer is needed"))


def fill_caches(checked: Checked, session: Session, plan: Plan) -> None:
    """Encode every picture and prompt that the run will use and the cache does not have."""

    def tick(what: str, done: int, total: int) -> None:
        session.stop.check()
        session.console.tick(what, done, total)

    if session.world.is_main:
        recipes = recipe.previews(checked.config)
        encoders = encoding.Encoders(
            extras=session.weights.sources.extras,
            device=session.world.device,
            dtype=checked.config.model.dtype,
            vae_digest=session.digests.vae,
            text_digest=session.digests.text_encoder,
        )
        prompts = sorted({*plan.prompts(), *recipe.prompts_of(recipes)})
        pictures, texts = encoding.fill(session.cache, encoders, plan.items, prompts, tick)
        session.console.say(f"cache {session.cache.folder}: latents {pictures}; prompts {texts}")
    distributed.wait()


def prepare(checked: Checked, folder: RunFolder, session: Session) -> Run:
    """Make everything that the loop needs; the run folder is locked by the caller.

    Raises:
        ZImageTrainError: of any kind; nothing was trained.
    """
    config, weights, world, console = checked.config, session.weights, session.world, session.console
    require_device(world, weights.shape, config)
    plan = make_plan(config, checked.items, world.processes)
    fill_caches(checked, session, plan)
    before = run_folder.read_facts(folder)
    checkpointing, why = _plan_memory(checked, session, before)
    console.say(f"gradient checkpointing {'on' if checkpointing else 'off'}: {why}")

    frozen = _assemble(config, session)
    attached = attach.attach(
        frozen.model, weights.modules, config.lora.rank, config.lora.alpha, config.lora.dropout, config.seed
    )
    if checkpointing:
        keep_rng = config.lora.dropout > 0
        frozen.model.enable_gradient_checkpointing(
            partial(recompute, use_reentrant=False, preserve_rng_state=keep_rng, determinism_check="none")
        )
    groups = names.count_by_group(attached.a)
    shown = ", ".join(f"{name} {count}" for name, count in groups.items())
    console.say(f"LoRA rank {config.lora.rank}: matched {len(attached.a)}/{len(weights.modules)} modules ({shown})")
    optimizer = optim.build(config.optimizer, attached.parameters())
    if optim.base_lr(config.optimizer) != config.optimizer.lr:
        console.warn(f"optimizer.lr {config.optimizer.lr:g} is raised to 1: prodigy finds the rate itself")
    start = _restore(folder, attached, optimizer, session)
    inputs = Inputs(session.cache, session.digests, config.model.dtype)
    recipes = recipe.previews(config)
    if world.is_main:
        run_folder.write_config(folder, config)
        run_folder.write_facts(
            folder,
            _facts(checked, session, frozen, plan, groups)
            | {"plan": {"checkpointing": checkpointing, "why": why}, "starts": [*before.get("starts", []), start]},
        )
    return Run(
        config=config,
        folder=folder,
        world=world,
        plan=plan,
        inputs=inputs,
        frozen=frozen,
        attached=attached,
        optimizer=optimizer,
        extras=weights.sources.extras,
        recipes=recipes,
        preview_embeds={prompt: inputs.embeds(prompt) for prompt in recipe.prompts_of(recipes)},
        export_metadata=describe(config, session.digests.adapter),
        warnings=checked.warnings,
        start=start,
        console=console,
        stop=session.stop,
    )


def _assemble(config: Config, session: Session) -> Frozen:
    weights, console = session.weights, session.console
    adapter = None
    if weights.sources.adapter is not None:
        adapter = adapters.load(weights.sources.adapter, config.model.adapter_strength, weights.shape)
    console.say(f"loading {weights.sources.transformer}")
    frozen = assemble(weights.sources.transformer, adapter, config.model.dtype, session.world.device)
    if adapter is not None:
        count = f"{frozen.adapter_matched}/{len(adapter.lora)}"
        console.say(f"training adapter {adapter.path.name}: matched {count} modules, strength {adapter.strength:g}")
    return frozen


def _plan_memory(checked: Checked, session: Session, before: dict[str, Any]) -> tuple[bool, str]:
    config, weights, world = checked.config, session.weights, session.world
    if config.memory.checkpointing == "auto" and "plan" in before:
        return before["plan"]["checkpointing"], "as chosen when the run began"
    is_gpu = world.device.type == "cuda"
    budget = config.memory.budget_gb
    if budget == "auto":
        total = torch.cuda.get_device_properties(world.device).total_memory if is_gpu else system_memory_bytes()
    else:
        total = int(budget * 1e9)
    sizes = {item.size for item in checked.items}
    return memory.choose_checkpointing(config, weights.shape, weights.modules, sizes, total, is_gpu)


def _restore(folder: RunFolder, attached: Attached, optimizer: Optimizer, session: Session) -> int:
    if not session.world.is_main:
        distributed.wait()  # the main process sets damaged checkpoints aside; the others look afterwards
    found = checkpoint.load_newest(folder.checkpoints, session.console.warn)
    if session.world.is_main:
        distributed.wait()
    if found is None:
        return 0
    attached.load_state(found.part("lora."), str(found.path))
    optim.load_state(optimizer, found.part("optim."), found.numbers["optimizer"], str(found.path))
    session.console.say(f"continuing after step {found.step}")
    return found.step


def fingerprint_of(checked: Checked, digests: Digests) -> dict[str, Any]:
    """What a run is made from, by content: a resumed run must find the same."""
    return {
        "model": digests.model,
        "adapter": digests.adapter,
        "text_encoder": digests.text_encoder,
        "vae": digests.vae,
        "data": fingerprint(checked.pictures),
    }


def _facts(checked: Checked, session: Session, frozen: Frozen, plan: Plan, groups: dict[str, int]) -> dict[str, Any]:
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
        "dataset": {
            "pictures": sum(map(len, checked.pictures)),
            "samples": len(plan.items),
            "steps_per_epoch": round(plan.steps_per_epoch, 2),
        },
        "fingerprint": fingerprint_of(checked, digests),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
