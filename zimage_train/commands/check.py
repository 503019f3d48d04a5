"""The `check` command: show what a run would do, and the memory and time that it needs (torch-free)."""

import re
from pathlib import Path

from zimage_train.dataset import captions
from zimage_train.dataset.buckets import crop_percent
from zimage_train.dataset.sample_order import TrainItem
from zimage_train.errors import ConfigError, Problem
from zimage_train.lora import targets
from zimage_train.planning import forecast
from zimage_train.planning.preflight import RunSpec


def check_report(spec: RunSpec, gpu: str | None = None, price: float | None = None) -> list[str]:
    """Return the lines that `check` prints: images, epochs, modules, memory, time, cost, notes and warnings.

    Args:
        gpu: the GPU to plan for; None for this machine's.
        price: price of the GPU per hour; None to show no cost.

    Raises:
        ConfigError: the GPU is not known.
    """
    config = spec.config
    verdict = "no problems found" if forecast.fits(spec, gpu) else "does not fit the memory planned for, see below"
    lines = [f"{config.name}: {verdict}", "", *_image_lines(spec), "", *_epoch_lines(spec)]
    if spec.model_files is not None:
        files = spec.model_files
        groups = ", ".join(f"{name} {count}" for name, count in targets.count_by_group(files.modules).items())
        independent = "does not depend" if config.lora.is_additive else "depends"
        change = "" if config.lora.type == "lora" else f"; its change {independent} on the weights"
        lines.append(f"{config.lora.description} on {len(files.modules)} modules ({groups}){change}")
        if files.paths.adapter is not None:
            # An adapter that does not fit in every module has been refused.
            lines.append(f"adapter fits {files.adapter_modules}/{files.adapter_modules} modules")
    lines += ["", *(line.text for line in forecast.forecast_lines(spec, gpu, price))]
    lines += [f"note: {note}" for note in spec.notes]
    lines += [f"warning: {warning}" for warning in spec.warnings]
    return lines


def _epoch_lines(spec: RunSpec) -> list[str]:
    """Return the number of samples, steps and epochs, and that of prompts if tags are drawn anew in each epoch."""
    config = spec.config
    order = spec.order
    largest_batch = max(entry.batch_size or config.train.batch_size for entry in config.data)
    epochs = config.train.steps / order.steps_per_epoch
    text = (
        f"{len(order.concept.items)} samples an epoch, {order.steps_per_epoch:.1f} steps an epoch, "
        f"{config.train.steps} steps of up to {largest_batch * config.train.grad_accumulation} samples "
        f"= {epochs:.1f} epochs"
    )
    if num_regularization := len(order.items) - len(order.concept.items):
        share = order.effective_regularization_share
        text += f"; plus {num_regularization} regularization samples, in {share:.0%} of the passes"
    lines = [text]
    if any(captions.has_tags(entry) for entry in config.data):
        lines.append(f"{len(order.prompts(config.train.steps))} prompts to encode, as tags change in each epoch")
    return lines


def parse_price(text: str) -> float:
    """Return the price per hour in `0.69/h` or `0.69`.

    Raises:
        ConfigError: it is written differently.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/h)?", text.strip())
    if match is None:
        hint = "give the price per hour, such as 0.69/h"
        raise ConfigError(Problem("--price", f"is {text!r}", hint, "bad-argument"))
    return float(match[1])


def _image_lines(spec: RunSpec) -> list[str]:
    """Return the number of images, and a line for each."""
    items_by_image: dict[tuple[int, Path], list[TrainItem]] = {}
    for item in spec.items:
        if item.repeat == 0 and not item.flip:
            items_by_image.setdefault((item.entry, item.image.path), []).append(item)
    total = sum(len(images) for images in spec.images)
    return [f"{total} images", *(_image_line(items) for items in items_by_image.values())]


def _image_line(items: list[TrainItem]) -> str:
    """Return the line of one image: its size, the sizes it is trained at (each an item of `items`), and its prompt."""
    image = items[0].image
    sizes = []
    for size in (item.size for item in items):
        scale = max(size.width / image.width, size.height / image.height)
        crop = crop_percent(image.width, image.height, size)
        sizes.append(f"{size.width}x{size.height} (scale {scale:.2f}, crop {crop:.0f} %)")
    line = f"  {image.path.name}: {image.width}x{image.height} -> {', '.join(sizes)}"
    if image.repeats > 1:
        line += f"  x{image.repeats}"
    if image.mask:
        line += "  masked"
    line += f"  {image.prompts[0]!r}"
    if len(image.prompts) > 1:
        line += f" and {len(image.prompts) - 1} more"
    return line
