"""Warnings of settings that work, but usually lead to a bad LoRA (torch-free).

The thresholds are what people report for this family of models (docs/recipes.md), not measurements of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage_train.config.optimizers import OPTIMIZERS
from zimage_train.config.schema import Config
from zimage_train.config.triggers import has_any_trigger
from zimage_train.config.variants import VARIANTS
from zimage_train.optim.schedules import base_lr
from zimage_train.planning.suggestions import SettingChange

HIGH_LR = 2e-4
MANY_STEPS = 10_000
"""Steps after which the distillation of Turbo suffers although the adapter is used."""
FEW_IMAGES = 10
STEPS_FOR_FEW_IMAGES = 2_200
"""Steps after which fewer than `FEW_IMAGES` images are usually memorised."""


@dataclass(frozen=True)
class ConfigWarning:
    """A warning, and changes of settings after which it is gone; none where people have to choose."""

    text: str
    changes: tuple[SettingChange, ...] = ()

    def __str__(self) -> str:
        return self.text

    def as_json(self) -> dict[str, Any]:
        """Return the warning as run.json has it."""
        return {"text": self.text, "changes": {change.key: change.value for change in self.changes}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ConfigWarning":
        """Return the warning that `as_json` has written."""
        return cls(values["text"], tuple(SettingChange(key, value) for key, value in values["changes"].items()))

    @classmethod
    def of(cls, text: str, **changes: float | str) -> "ConfigWarning":
        """Return the warning with changes of the settings `section__name`."""
        return cls(text, tuple(SettingChange(key.replace("__", "."), value) for key, value in changes.items()))


def config_warnings(config: Config, num_images: int, is_small: bool = False) -> list[ConfigWarning]:
    """Return warnings of a line each, with the setting, what is likely to happen, and what to do.

    `num_images` counts images of the concept. `is_small` is for a miniature model, which needs higher learning rates.
    """
    return [
        *_turbo_warnings(config),
        *([] if is_small else _lr_warnings(config)),
        *_scale_warnings(config),
        *_optimizer_warnings(config),
        *_length_warnings(config, num_images),
        *_preview_warnings(config),
    ]


def _turbo_warnings(config: Config) -> list[ConfigWarning]:
    # A method whose data Turbo draws itself does not undo the distillation.
    if config.model.variant != "turbo" or config.method.generates_data:
        return []
    model = config.model
    warnings: list[ConfigWarning] = []
    if model.adapter is None:
        warnings.append(
            ConfigWarning.of(
                "model.adapter is null: training Turbo directly undoes its distillation, and images at 8 steps "
                "blur; set model.adapter: v2 (or sample with more steps, or stack DistillPatch)",
                model__adapter="v2",
            )
        )
    elif model.adapter_strength < 1:
        warnings.append(
            ConfigWarning.of(
                f"model.adapter_strength is {model.adapter_strength:g}: the adapter takes only part of the damage to "
                "Turbo's 8 steps; set it to 1",
                model__adapter_strength=1.0,
            )
        )
    if model.adapter is not None and config.lora.start == "pissa":
        warnings.append(
            ConfigWarning.of(
                "lora.start: pissa changes Turbo more at the same learning rate than a start at zero (on the "
                "miniature, by 1.2 to 2.3 times); use a third of the optimizer.lr, or start: zero",
                lora__start="zero",
            )
        )
    if model.adapter is not None and not config.lora.is_additive:
        warnings.append(
            ConfigWarning.of(
                "lora.type: dora depends on the weights, and is used on others than it is trained on; on the miniature "
                "it changes Turbo 1.1 to 1.3 times as much as a LoRA at the same learning rate; lower optimizer.lr"
            )
        )
    if model.adapter is not None and config.train.steps > MANY_STEPS:
        warnings.append(
            ConfigWarning.of(
                f"train.steps is {config.train.steps}: beyond {MANY_STEPS:,} steps the distillation breaks down even "
                "with the adapter; stop earlier, or train deturbo or base",
                train__steps=MANY_STEPS,
            )
        )
    return warnings


def _lr_warnings(config: Config) -> list[ConfigWarning]:
    optimizer = config.optimizer
    if config.model.variant != "turbo" or OPTIMIZERS[optimizer.name].finds_lr or optimizer.lr < HIGH_LR:
        return []
    return [
        ConfigWarning.of(
            f"optimizer.lr is {optimizer.lr:g}: from {HIGH_LR:g} on, Turbo usually becomes noisy or breaks; "
            "use 1e-4, or 5e-5 to 8e-5 if images get noisy",
            optimizer__lr=1e-4,
        )
    ]


def _scale_warnings(config: Config) -> list[ConfigWarning]:
    lora = config.lora
    if not lora.rslora or lora.alpha is not None or lora.rank is None or lora.rank == 1:
        return []
    scale = lora.scale_at(lora.rank)
    return [
        ConfigWarning.of(
            f"lora.rslora without lora.alpha scales the change of each weight by {scale:.3g}, like a higher "
            f"optimizer.lr; set lora.alpha: {scale:.3g} for a scale of 1 at rank {lora.rank}, or lower the rate",
            lora__alpha=scale,
        )
    ]


def _optimizer_warnings(config: Config) -> list[ConfigWarning]:
    optimizer, warmup = config.optimizer, config.schedule.warmup_steps
    warnings: list[ConfigWarning] = []
    if base_lr(optimizer) != optimizer.lr:
        text = f"optimizer.lr {optimizer.lr:g} is raised to 1: {optimizer.name} finds the rate itself"
        warnings.append(ConfigWarning.of(text, optimizer__lr=1.0))
    if warmup >= config.train.steps:
        text = f"schedule.warmup_steps is {warmup} of {config.train.steps} steps: the rate is never reached"
        warnings.append(ConfigWarning.of(text, schedule__warmup_steps=config.train.steps // 20))
    return warnings


def _length_warnings(config: Config, num_images: int) -> list[ConfigWarning]:
    if num_images < FEW_IMAGES and config.train.steps > STEPS_FOR_FEW_IMAGES:
        return [
            ConfigWarning.of(
                f"train.steps is {config.train.steps} for {num_images} images: so few are memorised; use 1500 "
                f"to {STEPS_FOR_FEW_IMAGES} steps, or add images",
                train__steps=STEPS_FOR_FEW_IMAGES,
            )
        ]
    return []


def _preview_warnings(config: Config) -> list[ConfigWarning]:
    sample, variant = config.sample, VARIANTS[config.model.variant]
    warnings: list[ConfigWarning] = []
    if not sample.prompts:
        text = "sample.prompts is empty, so there are no previews; give 5 to 10 prompts, two without the trigger"
        return [ConfigWarning.of(text)]
    steps = variant.steps if sample.steps == "auto" else sample.steps
    guidance = variant.guidance if sample.guidance == "auto" else sample.guidance
    if config.model.variant == "turbo" and (steps != variant.steps or guidance != variant.guidance):
        # A LoRA that damages the distillation shows it at few steps without guidance, the way Turbo is used.
        warnings.append(
            ConfigWarning.of(
                f"previews use {steps} steps and guidance {guidance:g} (CFG {guidance + 1:g}), which hides damage to "
                "Turbo: it is made for 8 steps and guidance 0 (CFG 1); set both to auto",
                sample__steps="auto",
                sample__guidance="auto",
            )
        )
    triggers = config.triggers
    if triggers and all(has_any_trigger(preview.prompt, triggers) for preview in sample.prompts):
        warnings.append(
            ConfigWarning.of(
                "every prompt in sample.prompts has the trigger, so leaking into other images would not be seen; add a "
                "prompt without it"
            )
        )
    return warnings
