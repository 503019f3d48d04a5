"""The context of a run before its model is loaded: folder, cache, digests of the inputs, identity, last checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zimage_train import __version__
from zimage_train.config.load import cache_dir
from zimage_train.config.schema import Config
from zimage_train.dataset.scan import dataset_fingerprint
from zimage_train.dataset.tensor_cache import TensorCache
from zimage_train.errors import ConfigError, Location, Problem
from zimage_train.io.digests import DigestCache
from zimage_train.models.components import ModelPaths
from zimage_train.planning.model_files import ModelFiles
from zimage_train.planning.preflight import RunSpec
from zimage_train.report.console import Console
from zimage_train.training import checkpoint, device_plan, distributed, preview_sets, run_dir
from zimage_train.training.checkpoint import Checkpoint
from zimage_train.training.distributed import World
from zimage_train.training.preview_sets import PreviewSet
from zimage_train.training.run_dir import RunDir
from zimage_train.training.signals import StopRequest
from zimage_train.training.stage_clock import StageClock


@dataclass(frozen=True)
class ModelDigests:
    """Digests of the content of the model's parts."""

    model: str
    adapter: str | None
    text_encoder: str
    vae: str
    init_from: str | None = None
    """The LoRA that the training starts from."""
    beside: tuple[str, ...] = ()
    """The LoRAs of `train.beside`."""


@dataclass(frozen=True)
class RunContext:
    """A checked run in this process, with its inputs digested and its cache opened."""

    spec: RunSpec
    model_files: ModelFiles
    folder: RunDir
    cache: TensorCache
    digests: ModelDigests
    identity: Mapping[str, Any]
    """The settings and inputs that shape the weights; see `run_dir.run_identity`."""
    preview_sets: list[PreviewSet]
    world: World
    console: Console
    stop: StopRequest
    clock: StageClock

    @property
    def config(self) -> Config:
        return self.spec.config

    def report_progress(self, what: str, done: int, total: int) -> None:
        """Show progress, unless a signal asked to stop.

        Raises:
            Stopped: a signal came.
        """
        self.stop.check()
        self.console.progress(what, done, total)


def open_context(spec: RunSpec, world: World, console: Console, stop: StopRequest, clock: StageClock) -> RunContext:
    """Open the cache, and digest the inputs of the run."""
    model_files = spec.model_files
    assert model_files is not None  # without weights, `train` and `cache` have ended with an error
    folder, cache = run_dir.run_dir_of(spec.config), TensorCache(cache_dir(spec.config))
    digests = digest_model(model_files.paths, DigestCache(cache.folder / "digests.json"))
    identity = run_dir.run_identity(spec.config, run_fingerprint(spec, digests), world.world_size)
    return RunContext(
        spec=spec,
        model_files=model_files,
        folder=folder,
        cache=cache,
        digests=digests,
        identity=identity,
        preview_sets=preview_sets.make_preview_sets(spec.config, folder, identity, model_files.paths.second_model),
        world=world,
        console=console,
        stop=stop,
        clock=clock,
    )


def digest_model(paths: ModelPaths, digester: DigestCache) -> ModelDigests:
    """Return the digests of the files at `paths`."""
    extras = paths.extras

    def digest_of(path: Path) -> str:
        return digester.of_folder(path) if path.is_dir() else digester.of_content(path)

    return ModelDigests(
        model=digest_of(paths.transformer),
        adapter=digester.of_content(paths.adapter) if paths.adapter else None,
        text_encoder=digest_of(extras.text_encoder) + digest_of(extras.tokenizer),
        vae=digest_of(extras.vae),
        init_from=digester.of_content(paths.init_from) if paths.init_from else None,
        beside=tuple(digester.of_content(path) for path in paths.beside),
    )


def run_fingerprint(spec: RunSpec, digests: ModelDigests) -> dict[str, Any]:
    """Return the digests of all inputs of a run; a resumed run must have the same."""
    fingerprint: dict[str, Any] = {
        "model": digests.model,
        "adapter": digests.adapter,
        "text_encoder": digests.text_encoder,
        "vae": digests.vae,
    }
    if digests.init_from is not None:
        fingerprint["init_from"] = digests.init_from
    for index, digest in enumerate(digests.beside):
        fingerprint[f"train.beside.{index}"] = digest
    return fingerprint | {"data": dataset_fingerprint(spec.images)}


def shared_facts(context: RunContext, start_step: int) -> dict[str, str]:
    """Return the facts that must be equal in all processes of a run, by name: versions, inputs and step."""
    return {
        "the version of zimage-train": __version__,
        "the version of torch": torch.__version__,
        "the digest of settings and inputs": run_dir.identity_digest(context.identity),
        "train.steps": str(context.config.train.steps),
        "the step to continue from": str(start_step),
    }


def find_checkpoint(context: RunContext, path: str, allow: tuple[str, ...] = ()) -> Checkpoint | None:
    """Return the checkpoint that the run continues from, or None if it begins at step 0.

    `path` is what computes the blocks here (`device_plan.block_path`). `allow` names settings that may differ from
    those of the checkpoint although they shape the weights.

    Raises:
        WeightsError: there were checkpoints, and none can be read.
        ConfigError: the checkpoint belongs to another run, its blocks were computed by something else, or it is later
            than the last step.
    """
    folder, console = context.folder, context.console
    # The main process renames damaged checkpoints, so the others wait for it before they list the folder.
    if not context.world.is_main:
        distributed.barrier()
    newest = checkpoint.load_newest(folder.checkpoints, console.warning)
    if context.world.is_main:
        distributed.barrier()
    if newest is None:
        run_dir.require_untouched(folder)
        return None
    for change in run_dir.require_same(folder, newest.metadata["identity"], context.identity, allow):
        console.warning(f"allowed: {change}")
    path_before = newest.metadata.get("path", path)
    if path_before != path and "path" not in allow:
        raise ConfigError(device_plan.other_path(path_before, f"this machine computes them by {path}"))
    last = context.config.train.steps
    if newest.step > last:
        what = f"is {last}, and the run is at step {newest.step} already"
        raise ConfigError(Problem(Location(key="train.steps"), what, "raise it", "already-past"))
    return newest
