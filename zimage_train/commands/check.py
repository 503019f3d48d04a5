"""The `check` command: what a run would do, and what it would take (torch-free)."""

import re
from pathlib import Path

from zimage_train.dataset import captions
from zimage_train.dataset.buckets import crop_percent
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.errors import ConfigError, Problem
from zimage_train.lora import targets
from zimage_train.planning import forecast
from zimage_train.planning.preflight import RunSpec


def check_report(checked: RunSpec, gpu: str | None = None, price: float | None = None) -> list[str]:
    """What `check` prints: data, order, modules, memory, time, cost, notes and warnings.

    Raises:
        ConfigError: the card `gpu` is not known.
    """
    config = checked.config
    verdict = "no problems found" if forecast.fits(checked, gpu) else "does not fit the memory planned for, see below"
    lines = [f"{config.name}: {verdict}", "", *_table(checked)]
    plan = checked.order
    per_step = (
        max(entry.batch_size or config.train.batch_size for entry in config.data) * config.train.grad_accumulation
    )
    epochs = config.train.steps / plan.steps_per_epoch
    of_class = len(plan.items) - len(plan.concept.items)
    beside = (
        f"; beside them {of_class} of regularization, in {plan.effective_regularization_share:.0%} of the passes"
        if of_class
        else ""
    )
    lines += [
        "",
        f"{len(plan.concept.items)} samples an epoch, {plan.steps_per_epoch:.1f} steps an epoch, "
        f"{config.train.steps} steps of up to {per_step} samples = {epochs:.1f} epochs{beside}",
    ]
    if any(captions.has_tags(entry) for entry in config.data):
        lines.append(f"{len(plan.prompts(config.train.steps))} prompts to encode, as tags change in each epoch")
    if checked.weights is not None:
        weights = checked.weights
        groups = ", ".join(f"{name} {count}" for name, count in targets.count_by_group(weights.modules).items())
        lines.append(f"LoRA of rank {config.lora.rank} on {len(weights.modules)} modules ({groups})")
        if weights.paths.adapter is not None:
            lines.append(f"adapter fits {weights.adapter_modules}/{weights.adapter_modules} modules")
    lines += ["", *(line.text for line in forecast.forecast_lines(checked, gpu, price))]
    lines += [f"note: {note}" for note in checked.notes]
    lines += [f"warning: {warning}" for warning in checked.warnings]
    return lines


def parse_price(text: str) -> float:
    """The price of an hour: the number of `0.69` or `0.69/h`.

    Raises:
        ConfigError: it is written otherwise.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/h)?", text.strip())
    if match is None:
        hint = "give the price of an hour, such as 0.69/h"
        raise ConfigError(Problem("--price", f"is {text!r}", hint, "bad-argument"))
    return float(match[1])


def _table(checked: RunSpec) -> list[str]:
    by_image: dict[tuple[int, Path], list[TrainItem]] = {}
    for item in checked.items:
        if item.repeat == 0 and not item.flip:
            by_image.setdefault((item.entry, item.image.path), []).append(item)
    lines = [_row(items) for items in by_image.values()]
    total = sum(len(found) for found in checked.images)
    return [f"{total} images", *lines]


def _row(items: list[TrainItem]) -> str:
    image = items[0].image
    repeats, others = image.repeats, len(image.prompts) - 1
    sizes = ", ".join(
        f"{size.width}x{size.height} (scale {max(size.width / image.width, size.height / image.height):.2f}, "
        f"crop {crop_percent(image.width, image.height, size):.0f} %)"
        for size in (item.size for item in items)
    )
    times = f"  x{repeats}" if repeats > 1 else ""
    more = f" and {others} more" if others else ""
    mask = "  masked" if image.mask else ""
    size = f"{image.width}x{image.height}"
    return f"  {image.path.name}: {size} -> {sizes}{times}{mask}  {image.prompts[0]!r}{more}"
