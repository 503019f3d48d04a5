"""The `lora` commands: what a file holds, and whether everyone reads it as it is meant."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from zimage_train import mini
from zimage_train.errors import Argument, ConfigError, Location, Problem, WeightsError
from zimage_train.lora import arithmetic, inspect, lora_file, scale_rules, targets, verify
from zimage_train.lora.inspect import LoraSummary
from zimage_train.lora.lora_file import Lora
from zimage_train.models import locate
from zimage_train.models.arch import TransformerShape
from zimage_train.report import heatmap

READ_BY_ALL = {"F64", "F32", "F16", "BF16"}


def verify_file(path: Path, model: str | None) -> list[str]:
    """Prove that the LoRA at `path` fits the model, and that diffusers and ComfyUI load all of it and the same.

    Without a model it is held against the published 6 B ones, or the miniature if it is one of that.

    Raises:
        WeightsError: says who would load what.
    """
    found = inspect.summarize_lora(path)
    lora = lora_file.read_lora(path)
    shape, name = _held_against(lora, model)
    try:
        lora_file.require_modules(path, lora, shape.linears)
    except WeightsError as error:
        todo = "is the LoRA of another size? give --model" if model is None else "is it the right model?"
        raise WeightsError(
            *(replace(one, message=f"{one.message}; held against {name}", hint=todo) for one in error.problems)
        ) from None
    other = sorted(set(found.dtypes) - READ_BY_ALL)
    if other:
        what = f"holds {', '.join(other)} tensors, with which diffusers cannot compute"
        raise WeightsError(Problem(str(path), what, "save it as bf16 or fp32"))
    precision = "fp32" if set(found.dtypes) == {"F32"} else "bf16"
    error = verify.verify_export(path, lora, precision, shape.linears)
    count = f"{len(lora)}/{len(lora)}"
    still = [module for module, norm in found.norms.items() if norm == 0.0]
    lines = [
        *describe_lora(path, found),
        f"fits {name}: {count} modules",
        f"diffusers loads {count}, ComfyUI loads {count}: the same change to {error:.1e}",
    ]
    if still:
        lines.append(f"warning: {len(still)} of {len(lora)} modules change nothing, such as {still[0]}")
    return lines


def _held_against(lora: Lora, model: str | None) -> tuple[TransformerShape, str]:
    """The shape of `model` and its name; without one the 6 B models', unless the miniature's fits."""
    if model is not None:
        located = locate.transformer_at(model, Location(argument=Argument("--model")), locate.cached_only)
        return locate.transformer_tensors(located)[0], model
    miniature = locate.transformer_tensors(mini.TURBO / "transformer")[0]
    sizes = {module: (one.b.shape[0], one.a.shape[1]) for module, one in lora.items()}
    fits = all(miniature.linears.get(module) == size for module, size in sizes.items())
    return (miniature, "the miniature") if fits else (TransformerShape(), "Z-Image (6 B)")


def inspect_file(path: Path, image: Path | None) -> list[str]:
    """Describe the LoRA at `path`, with the norm of every module's change; also as a heat map in `image`.

    Raises:
        WeightsError: it is none that this trainer reads.
        DiskError: the image cannot be written.
    """
    require_image(image)
    found = inspect.summarize_lora(path)
    rows, columns, values = targets.modules_table(found.norms)
    total = sum(norm**2 for norm in found.norms.values())
    lines = [*describe_lora(path, found), "", "norm of each change, and each block's share of the energy:"]
    lines.append(f"{'':20}" + "".join(f"{column:>9}" for column in columns) + f"{'share':>9}")
    for row, line in zip(rows, values, strict=True):
        share = sum(norm**2 for norm in line if norm is not None) / total if total > 0 else 0.0
        cells = "".join(f"{'-' if norm is None else format(norm, '.3g'):>9}" for norm in line)
        lines.append(f"{row:20}{cells}{share:>9.1%}")
    shares = [sum(line[i] ** 2 for line in values if line[i] is not None) for i in range(len(columns))]  # type: ignore
    lines.append(f"{'share':20}" + "".join(f"{share / total if total > 0 else 0.0:>9.1%}" for share in shares))
    lines += ["", "metadata:" if found.metadata else "metadata: none", *_metadata(found)]
    if image is not None:
        heatmap.save_heatmap(image, path.name, rows, columns, values, max(found.norms.values(), default=0.0))
        lines.append(f"heat map: {image}")
    return lines


def diff_files(one: Path, other: Path, image: Path | None) -> list[str]:
    """Compare what two LoRAs change: how far apart, and whether in the same direction; also as a heat map.

    Raises:
        WeightsError: one is no LoRA that this trainer reads.
        DiskError: the image cannot be written.
    """
    require_image(image)
    first, second = lora_file.read_lora(one), lora_file.read_lora(other)
    both = [module for module in first if module in second]
    shared = [
        module for module in both if arithmetic.delta_shape(first[module]) == arithmetic.delta_shape(second[module])
    ]
    products = {module: inspect.delta_inner_product(first[module], second[module]) for module in shared}
    norms = [{module: inspect.delta_norm(factors) for module, factors in lora.items()} for lora in (first, second)]
    lines = [
        f"{path}: {len(norm)} modules, norm {_total(norm):.4g}" for path, norm in zip((one, other), norms, strict=True)
    ]
    for path, mine, theirs in ((one, first, second), (other, second, first)):
        if alone := sorted(mine.keys() - theirs.keys()):
            lines.append(f"only in {path}: {len(alone)} modules, such as {alone[0]}")
    if misfits := sorted(set(both) - set(shared)):
        lines.append(f"of different shape: {len(misfits)} modules, such as {misfits[0]}")
    if not shared:
        return [*lines, "they have no module in common"]
    cosines = {m: products[m] / (norms[0][m] * norms[1][m]) for m in shared if norms[0][m] > 0 and norms[1][m] > 0}
    apart = math.sqrt(math.fsum(verify.delta_distance(first[m], second[m]) ** 2 for m in shared))
    whole = [_total({m: norm[m] for m in shared}) for norm in norms]
    cosine = math.fsum(products.values()) / (whole[0] * whole[1]) if whole[0] * whole[1] > 0 else 0.0
    lines += [
        f"in the {len(shared)} modules of both: |A - B| / |A| = {apart / whole[0] if whole[0] > 0 else math.inf:.3g}, "
        f"|B| / |A| = {whole[1] / whole[0] if whole[0] > 0 else math.inf:.3g}, cosine {cosine:.3f}",
        "",
        "cosine of each module's change (1: the same direction, 0: unrelated, -1: opposite):",
        *scale_rules.format_table(cosines),
    ]
    if image is not None:
        rows, columns, values = targets.modules_table(cosines)
        heatmap.save_heatmap(image, f"cosine, {one.name} and {other.name}", rows, columns, values, 1.0)
        lines.append(f"heat map: {image}")
    return lines


def _metadata(found: LoraSummary) -> list[str]:
    return [f"  {key}: {value}" for key, value in sorted(found.metadata.items())]


def require_image(path: Path | None) -> None:
    """Refuse to write an image over something else.

    Raises:
        ConfigError: its name is not that of a PNG.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(Problem(f"--picture {path}", "does not end in .png", "give the name of an image"))


def _total(norms: Mapping[str, float]) -> float:
    return math.sqrt(math.fsum(norm**2 for norm in norms.values()))


def describe_lora(path: Path, found: LoraSummary) -> list[str]:
    """What the file is, in a few lines."""
    groups = ", ".join(f"{name} {count}" for name, count in found.groups.items())
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in found.ranks.most_common())
    scales = ", ".join(f"{scale:g} ({count} modules)" for scale, count in found.scales.most_common(5))
    return [
        f"{path}: {found.layout}, {', '.join(found.dtypes)}",
        f"modules  {sum(found.groups.values())} ({groups})",
        f"rank     {ranks}",
        f"alpha / rank  {scales}",
    ]
