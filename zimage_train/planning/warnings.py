"""Settings that work but that people regret: what is likely to happen, and what to do instead."""

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.config.variants import VARIANTS
from zimage_train.optim.schedules import base_lr

HIGH_LR = 2e-4
MANY_STEPS = 10_000
FEW_IMAGES = 10
STEPS_FOR_FEW_IMAGES = 2_200


def config_warnings(config: Config, num_images: int, is_small: bool = False) -> list[str]:
    """One line each: the setting, the danger, the remedy; `is_small`: a miniature, which needs higher rates."""
    rate = [] if is_small else _rate(config)
    return [*_turbo(config), *rate, *_optimizer(config), *_length(config, num_images), *_previews(config)]


def _turbo(config: Config) -> list[str]:
    if config.model.variant != "turbo" or config.method.generates_data:
        return []
    model, found = config.model, []
    if model.adapter is None:
        found.append(
            "model.adapter is null: training Turbo directly undoes its distillation, and images at 8 steps "
            "blur; set model.adapter: v2 (or sample with more steps, or stack DistillPatch)"
        )
    elif model.adapter_strength < 1:
        found.append(
            f"model.adapter_strength is {model.adapter_strength:g}: the adapter takes only part of the damage to "
            "Turbo's 8 steps; set it to 1"
        )
    if model.adapter is not None and config.train.steps > MANY_STEPS:
        found.append(
            f"train.steps is {config.train.steps}: beyond {MANY_STEPS:,} steps the distillation breaks down even with "
            "the adapter; stop earlier, or train deturbo or base"
        )
    return found


def _rate(config: Config) -> list[str]:
    optimizer = config.optimizer
    if config.model.variant != "turbo" or OPTIMIZERS[optimizer.name].finds_lr or optimizer.lr < HIGH_LR:
        return []
    return [
        f"optimizer.lr is {optimizer.lr:g}: from {HIGH_LR:g} on, Turbo usually becomes noisy or breaks; "
        "use 1e-4, or 5e-5 to 8e-5 if images get noisy"
    ]


def _optimizer(config: Config) -> list[str]:
    optimizer, warmup, found = config.optimizer, config.schedule.warmup_steps, []
    if base_lr(optimizer) != optimizer.lr:
        found.append(f"optimizer.lr {optimizer.lr:g} is raised to 1: {optimizer.name} finds the rate itself")
    if warmup >= config.train.steps:
        found.append(f"schedule.warmup_steps is {warmup} of {config.train.steps} steps: the rate is never reached")
    return found


def _length(config: Config, num_images: int) -> list[str]:
    if num_images < FEW_IMAGES and config.train.steps > STEPS_FOR_FEW_IMAGES:
        return [
            f"train.steps is {config.train.steps} for {num_images} images: so few are learned by heart; use 1500 "
            f"to {STEPS_FOR_FEW_IMAGES} steps, or add images"
        ]
    return []


def _previews(config: Config) -> list[str]:
    sample, variant, found = config.sample, VARIANTS[config.model.variant], []
    if not sample.prompts:
        return ["sample.prompts is empty, so there are no previews; give 5 to 10 prompts, two without the trigger"]
    steps = variant.steps if sample.steps == "auto" else sample.steps
    guidance = variant.guidance if sample.guidance == "auto" else sample.guidance
    if config.model.variant == "turbo" and (steps != variant.steps or guidance != variant.guidance):
        found.append(
            f"previews use {steps} steps and guidance {guidance:g} (CFG {guidance + 1:g}), which hides damage to "
            "Turbo: it is made for 8 steps and guidance 0 (CFG 1); set both to auto"
        )
    triggers = config.triggers
    if triggers and all(any(trigger in prompt.prompt for trigger in triggers) for prompt in sample.prompts):
        found.append(
            "every prompt in sample.prompts has the trigger, so leaking into other images would not be seen; add a "
            "prompt without it"
        )
    return found
