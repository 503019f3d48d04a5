"""`timesteps --measure`: fit a table of loss weights to the model and the images of a config."""

from zimage_train.commands.train import check_for_training
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, Location, Problem
from zimage_train.models.attention_choice import attention_by, resolve_attention
from zimage_train.planning import devices
from zimage_train.report.console import Console
from zimage_train.training import distributed, run_dir
from zimage_train.training.build import fill_caches, load_model
from zimage_train.training.context import open_context
from zimage_train.training.device_plan import plan_for_devices
from zimage_train.training.signals import stop_on_signals
from zimage_train.training.stage_clock import StageClock
from zimage_train.training.weight_table import measure_losses


def measure_weights(config: Config) -> list[str]:
    """Measure the loss of the model before training at each noise level; return the section of a config as lines.

    It writes into the cache alone.

    Raises:
        ZImageTrainError: anything a user can act on.
    """
    if config.method.generates_data:
        what = f"is {config.train.method}, whose images are drawn by train"
        raise ConfigError(Problem(Location(key="train.method"), what, "leave --measure out", "conflicting-settings"))
    world, console = distributed.init(), Console.progress_only()
    attention = resolve_attention(config.model.attention, world.device)
    spec, plan = plan_for_devices(check_for_training(config, world), world, run_dir.run_dir_of(config))
    explained = devices.explained_out_of_memory("use a card with more memory, or lower data.resolution")
    with stop_on_signals() as stop, console.live_progress(), explained, attention_by(attention):
        context = open_context(spec, world, console, stop, StageClock())
        fill_caches(context)
        frozen, _, dataset = load_model(context, plan)
        measured = measure_losses(context, frozen, dataset)
    losses = f"{min(measured.losses):.3f} to {max(measured.losses):.3f}"
    type_ = "linear" if config.timesteps.type == "weighted" else config.timesteps.type
    points = [f"    - [{sigma:g}, {weight:g}]" for sigma, weight in measured.weights()]
    return [
        f"# Fitted to the model and {measured.num_samples} samples of the images: the inverse of the loss, {losses},",
        f"# whose means have a standard error of {measured.error:.0%} or less. To be put into the config.",
        "timesteps:",
        f"  type: {type_}",
        "  weight:",
        *points,
    ]
