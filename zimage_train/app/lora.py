"""The `lora` commands: what a file holds, and whether everyone reads it as it is meant."""

from pathlib import Path

from zimage_train.config.schema import Model
from zimage_train.errors import Problem, WeightsError
from zimage_train.lora import anatomy, files, loaders
from zimage_train.lora.anatomy import Anatomy
from zimage_train.model import sources
from zimage_train.model.shapes import TransformerShape
from zimage_train.report import heatmap

READ_BY_ALL = {"F64", "F32", "F16", "BF16"}


def verify(path: Path, model: str | None) -> list[str]:
    """Prove that the LoRA at `path` fits the model, and that diffusers and ComfyUI load all of it and the same.

    Without a model it is held against the published 6 B ones.

    Raises:
        WeightsError: says who would load what.
    """
    found = anatomy.examine(path)
    lora = files.read(path)
    shape, name = TransformerShape(), "Z-Image (6 B)"
    if model is not None:
        located = sources.search(Model(path=model, adapter=None), sources.cached_only).transformer
        if located is None:
            sources.locate(Model(path=model, adapter=None), sources.cached_only)
        assert located is not None
        shape, name = sources.transformer_tensors(located)[0], model
    try:
        files.require_modules(path, lora, shape.linears)
    except WeightsError as error:
        todo = "is the LoRA of another size? give --model" if model is None else "is it the right model?"
        raise WeightsError(
            *(Problem(one.where, f"{one.what}; held against {name}", todo) for one in error.problems)
        ) from None
    other = sorted(set(found.dtypes) - READ_BY_ALL)
    if other:
        what = f"holds {', '.join(other)} tensors, with which diffusers cannot compute"
        raise WeightsError(Problem(str(path), what, "save it as bf16 or fp32"))
    precision = "fp32" if set(found.dtypes) == {"F32"} else "bf16"
    error = loaders.verify(path, lora, precision, shape.linears)
    count = f"{len(lora)}/{len(lora)}"
    still = [module for module, norm in found.energy.items() if norm == 0.0]
    lines = [
        *describe(path, found),
        f"fits {name}: {count} modules",
        f"diffusers loads {count}, ComfyUI loads {count}: the same change to {error:.1e}",
    ]
    if still:
        lines.append(f"warning: {len(still)} of {len(lora)} modules change nothing, such as {still[0]}")
    return lines


def inspect(path: Path, picture: Path | None) -> list[str]:
    """Describe the LoRA at `path`, with the norm of every module's change; also as a heat map in `picture`.

    Raises:
        WeightsError: it is none that this trainer reads.
        DiskError: the picture cannot be written.
    """
    found = anatomy.examine(path)
    rows, columns, values = anatomy.table(found.energy)
    total = sum(norm**2 for norm in found.energy.values())
    lines = [*describe(path, found), "", "norm of each change, and each block's share of the energy:"]
    lines.append(f"{'':20}" + "".join(f"{column:>9}" for column in columns) + f"{'share':>9}")
    for row, line in zip(rows, values, strict=True):
        share = sum(norm**2 for norm in line if norm is not None) / total if total > 0 else 0.0
        cells = "".join(f"{'-' if norm is None else format(norm, '.3g'):>9}" for norm in line)
        lines.append(f"{row:20}{cells}{share:>9.1%}")
    shares = [sum(line[i] ** 2 for line in values if line[i] is not None) for i in range(len(columns))]  # type: ignore
    lines.append(f"{'share':20}" + "".join(f"{share / total if total > 0 else 0.0:>9.1%}" for share in shares))
    lines += ["", "metadata:", *(f"  {key}: {value}" for key, value in sorted(found.metadata.items()))]
    if picture is not None:
        heatmap.save(picture, path.name, rows, columns, values, max(found.energy.values(), default=0.0))
        lines.append(f"heat map: {picture}")
    return lines


def describe(path: Path, found: Anatomy) -> list[str]:
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
