"""The commands `lora verify`, `lora inspect` and `lora diff`, which read LoRA files and print what they hold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from zimage_train import mini
from zimage_train.errors import Argument, ConfigError, Location, Problem, WeightsError
from zimage_train.io.dtypes import COMPUTE_DTYPES
from zimage_train.lora import headers, inspect, lora_file, scale_rules, targets
from zimage_train.lora.deltas import Deltas
from zimage_train.lora.inspect import LoraSummary
from zimage_train.models import locate
from zimage_train.models.arch import TransformerShape
from zimage_train.report import heatmap


def verify_file(path: Path, model: str | None) -> list[str]:
    """Verify that the LoRA at `path` fits the model, and that diffusers and ComfyUI load the same deltas from it.

    Args:
        model: the model that it must fit; None takes the published 6 B models, or the miniature if it fits that.

    Raises:
        WeightsError: it does not fit, or a loader would leave out a module or load another delta.
    """
    import diffusers  # here, since diffusers takes seconds to import, and the other commands do without

    from zimage_train.lora import verify

    summary = inspect.summarize_lora(path)
    lora = lora_file.read_deltas(path, headers.READ)
    shape, name = _reference_model(lora, model)
    try:
        lora_file.require_modules(path, lora, shape.linears)
    except WeightsError as error:
        hint = "is the LoRA of another size? give --model" if model is None else "is it the right model?"
        problems: list[Problem] = []
        for problem in error.problems:
            problems.append(replace(problem, message=f"{problem.message}; compared with {name}", hint=hint))
        raise WeightsError(*problems) from None
    unsupported = sorted(set(summary.dtypes) - COMPUTE_DTYPES)
    if unsupported:
        message = f"holds {', '.join(unsupported)} tensors, with which diffusers cannot compute"
        raise WeightsError(Problem(str(path), message, "save it as bf16 or fp32", "unsupported-dtype"))
    precision = "fp32" if set(summary.dtypes) == {"F32"} else "bf16"
    error = verify.verify_export(path, lora, precision, shape)
    count = f"{len(lora)}/{len(lora)}"
    program, loads = f"diffusers {diffusers.__version__}", f"ComfyUI loads {count}"
    loads = f"{program} loads {count}, {loads}" if verify.diffusers_reads(lora) else f"{loads}, {program} not this kind"
    lines = [
        *describe_lora(path, summary),
        f"fits {name}: {count} modules",
        f"{loads}: the same change to {error:.1e}",
    ]
    unchanged = [module for module, norm in summary.norms.items() if norm == 0.0]
    if unchanged:
        lines.append(f"warning: {len(unchanged)} of {len(lora)} modules change nothing, such as {unchanged[0]}")
    return lines


def _reference_model(deltas: Deltas, model: str | None) -> tuple[TransformerShape, str]:
    """Return the shape and the name of the model that `deltas` must fit."""
    if model is not None:
        located = locate.transformer_at(model, Location(argument=Argument("--model")), locate.cached_only)
        return locate.transformer_tensors(located)[0], model
    miniature = locate.transformer_tensors(mini.TURBO / "transformer")[0]
    fits_miniature = all(headers.fits(delta.shape, miniature.linears.get(module)) for module, delta in deltas.items())
    return (miniature, "the miniature") if fits_miniature else (TransformerShape(), "Z-Image (6 B)")


def inspect_file(path: Path, image: Path | None) -> list[str]:
    """Describe the LoRA at `path`, with the norm of every module's delta; `image` also gets them as a heat map.

    Raises:
        ConfigError: `image` is not a PNG.
        WeightsError: the file is not a LoRA that this trainer reads.
        DiskError: the image cannot be written.
    """
    require_image(image)
    summary = inspect.summarize_lora(path)
    blocks, columns, rows = targets.modules_table(summary.norms)
    # Deltas of different modules are orthogonal, so their squared norms add up, and shares of them sum to 1.
    total = sum(norm**2 for norm in summary.norms.values())
    lines = [*describe_lora(path, summary), "", "norm of each change, and each block's share of the squared norm:"]
    lines.append(f"{'':20}" + "".join(f"{column:>9}" for column in columns) + f"{'share':>9}")
    for block, row in zip(blocks, rows, strict=True):
        cells = "".join(f"{'-' if norm is None else format(norm, '.3g'):>9}" for norm in row)
        lines.append(f"{block:20}{cells}{_share(row, total):>9.1%}")
    column_shares = (_share([row[index] for row in rows], total) for index in range(len(columns)))
    lines.append(f"{'share':20}" + "".join(f"{share:>9.1%}" for share in column_shares))
    lines += ["", "metadata:" if summary.metadata else "metadata: none"]
    lines += [f"  {key}: {value}" for key, value in sorted(summary.metadata.items())]
    if image is not None:
        heatmap.save_heatmap(image, path.name, blocks, columns, rows, max(summary.norms.values(), default=0.0))
        lines.append(f"heat map: {image}")
    return lines


def _share(norms: Sequence[float | None], total: float) -> float:
    """Return the share that these norms have of `total`, the sum of all squared norms."""
    if total <= 0:
        return 0.0
    return sum(norm**2 for norm in norms if norm is not None) / total


def diff_files(path: Path, other_path: Path, image: Path | None) -> list[str]:
    """Compare the deltas of two LoRAs: distance, norms and cosines; `image` also gets the cosines as a heat map.

    Raises:
        ConfigError: `image` is not a PNG.
        WeightsError: a file is not a LoRA that this trainer reads.
        DiskError: the image cannot be written.
    """
    require_image(image)
    first, second = (lora_file.read_deltas(file) for file in (path, other_path))
    first_norms = {module: delta.norm() for module, delta in first.items()}
    second_norms = {module: delta.norm() for module, delta in second.items()}
    in_both = [module for module in first if module in second]
    shared: list[str] = []
    different_shape: list[str] = []
    for module in in_both:
        has_same_shape = first[module].shape == second[module].shape
        (shared if has_same_shape else different_shape).append(module)
    lines = [
        f"{path}: {len(first)} modules, norm {_root_sum_of_squares(first_norms.values()):.4g}",
        f"{other_path}: {len(second)} modules, norm {_root_sum_of_squares(second_norms.values()):.4g}",
    ]
    if only_first := sorted(first.keys() - second.keys()):
        lines.append(f"only in {path}: {len(only_first)} modules, such as {only_first[0]}")
    if only_second := sorted(second.keys() - first.keys()):
        lines.append(f"only in {other_path}: {len(only_second)} modules, such as {only_second[0]}")
    if different_shape:
        lines.append(f"of different shape: {len(different_shape)} modules, such as {min(different_shape)}")
    if not shared:
        return [*lines, "they have no module in common"]

    inner_products = {module: first[module].inner(second[module]) for module in shared}
    cosines: dict[str, float] = {}
    for module, product in inner_products.items():
        if first_norms[module] > 0 and second_norms[module] > 0:
            cosines[module] = product / (first_norms[module] * second_norms[module])
    # In all shared modules together; those of a single file count in neither norm.
    distance = _root_sum_of_squares(first[module].distance(second[module]) for module in shared)
    first_norm = _root_sum_of_squares(first_norms[module] for module in shared)
    second_norm = _root_sum_of_squares(second_norms[module] for module in shared)
    norm_product = first_norm * second_norm
    cosine = math.fsum(inner_products.values()) / norm_product if norm_product > 0 else 0.0
    relative_distance = distance / first_norm if first_norm > 0 else math.inf
    norm_ratio = second_norm / first_norm if first_norm > 0 else math.inf
    lines += [
        f"in the {len(shared)} modules of both: |A - B| / |A| = {relative_distance:.3g}, "
        f"|B| / |A| = {norm_ratio:.3g}, cosine {cosine:.3f}",
        "",
        "cosine of each module's change (1: the same direction, 0: unrelated, -1: opposite):",
        *scale_rules.format_table(cosines),
    ]
    if image is not None:
        blocks, columns, rows = targets.modules_table(cosines)
        heatmap.save_heatmap(image, f"cosine, {path.name} and {other_path.name}", blocks, columns, rows, 1.0)
        lines.append(f"heat map: {image}")
    return lines


def require_image(path: Path | None) -> None:
    """Require that an image to write has the ending of a PNG, so that no LoRA is overwritten by mistake.

    Raises:
        ConfigError: it has another ending.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(
            Problem(f"--plot {path}", "does not end in .png", "give the name of an image", "bad-argument")
        )


def _root_sum_of_squares(values: Iterable[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values))


def describe_lora(path: Path, summary: LoraSummary) -> list[str]:
    """Return lines with layout, dtypes, modules, ranks and scales of the file."""
    groups = ", ".join(f"{name} {count}" for name, count in summary.groups.items())
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in summary.ranks.most_common())
    scales = ", ".join(f"{scale:g} ({count} modules)" for scale, count in summary.scales.most_common(5))
    return [
        f"{path}: {summary.layout}, {', '.join(summary.dtypes)}",
        f"modules  {sum(summary.groups.values())} ({groups})",
        f"rank     {ranks}",
        f"alpha / rank  {scales}, {summary.scales_from}",
        f"read by  {', '.join(summary.readers) or 'no program that was tried'}",
    ]
