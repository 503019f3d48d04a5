"""The commands `zimage-train lora ...`, which inspect LoRA files and make new files from them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zimage_train.errors import ConfigError, Problem
from zimage_train.models import locate
from zimage_train.report.printing import print_lines

if TYPE_CHECKING:
    from zimage_train.commands.lora_edit import OutputFile

lora_commands = typer.Typer(
    help="Inspect LoRA files, and make new files from them.", no_args_is_help=True, rich_markup_mode=None
)


def _lora_in(path: Path) -> Path:
    return locate.lora_in(path)


LORA_HELP = "A LoRA (.safetensors), or peft's folder of one."
LoraPath = Annotated[Path, typer.Argument(metavar="FILE", help=LORA_HELP, show_default=False, callback=_lora_in)]
OutputPath = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="The .safetensors to write.", show_default=False)
]
MaybeOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="The .safetensors to write.", show_default=False)
]
Dtype = Annotated[str, typer.Option("--dtype", help="bf16 or fp32; auto is bf16 if that is exact, otherwise fp32.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
Scale = Annotated[
    list[str] | None,
    typer.Option(
        "--scale",
        metavar="WHAT=FACTOR",
        help="layers.0-9=0.5, attention.to_{q,k,v}=0.8, adaln=0, layers=bell, likeness=1.2. Repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the factor of every module without writing a file.")]
Image = Annotated[Path | None, typer.Option("--plot", help="Also write a heat map to this PNG.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        min=0.0,
        max=1.0,
        help="For --rank auto: fraction of the squared change to keep. Default: 0.99.",
        show_default=False,
    ),
]
RankText = Annotated[
    str, typer.Option("--rank", metavar="N|auto", help="auto: for each module the lowest that keeps --energy.")
]
DEFAULT_ENERGY = 0.99
MAX_RANK = 4096


@lora_commands.command()
def verify(
    file: LoraPath,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or file of the model that it must fit. Default: the 6 B model."),
    ] = None,
) -> None:
    """Verify that diffusers and ComfyUI load every module of a LoRA, with the same change."""
    from zimage_train.commands import lora

    print_lines(lora.verify_file(file, model))


@lora_commands.command()
def inspect(file: LoraPath, image: Image = None) -> None:
    """Show layout, ranks, alphas, modules, how much each module changes, and metadata."""
    from zimage_train.commands import lora

    print_lines(lora.inspect_file(file, image))


@lora_commands.command()
def diff(
    file: LoraPath,
    other: Annotated[
        Path,
        typer.Argument(metavar="OTHER", help="The LoRA to compare with.", show_default=False, callback=_lora_in),
    ],
    image: Image = None,
) -> None:
    """Compare the changes of two LoRAs: their distance, and whether they have the same direction."""
    from zimage_train.commands import lora

    print_lines(lora.diff_files(file, other, image))


@lora_commands.command()
def weight(
    file: LoraPath,
    scale: Scale = None,
    dry_run: DryRun = False,
    output: MaybeOutput = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Scale a LoRA by layer and component; a factor of 0 leaves the module out.

    Rules that name layers, components, or both form three lists. In each list the last rule that names a module counts,
    and the three factors multiply. Curves over layers: linear_in (0 to 1), linear_out (1 to 0), bell, also 0.8*bell.
    Named sets of components follow community opinion (blog.hinablue.me): prompt_adherence, composition, likeness,
    clothing, background, colour_light.
    """
    if not scale:
        raise ConfigError(
            Problem("--scale", "is missing", "write for example --scale layers.0-9=0.5", "missing-argument")
        )
    from zimage_train.commands import lora_edit

    print_lines(lora_edit.weight_command(file, scale, _output(output, dtype, force, dry_run)))


@lora_commands.command()
def merge(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE=RATIO", help="LoRAs, each with its ratio.", show_default=False)
    ],
    scale: Scale = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="N|auto",
            help="Default: the sum of the ranks, as the exact sum needs.",
            show_default=False,
        ),
    ] = None,
    energy: Energy = None,
    method: Annotated[str, typer.Option("--method", help="sum, ties, dare_ties or dare_linear.")] = "sum",
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            min=0.0,
            max=1.0,
            help="Fraction of values that ties and dare keep. Default: 0.5.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**62, help="Random seed of dare. Default: 42.", show_default=False),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide the ratios by the sum of their absolute values.")
    ] = False,
    dry_run: DryRun = False,
    output: MaybeOutput = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Merge LoRAs: the sum of their changes, each times its ratio.

    The sum is exact for any ranks, alphas, layouts and modules. It is linear in the ratios, which may be negative.
    --scale works as in weight, for all files or a single file: 2:adaln=0 applies to the second.
    """
    from zimage_train.commands import lora_args, lora_merge

    ratios = [lora_args.parse_weighted_lora(text, "merge", is_weight_needed=True) for text in files]
    rank_number = None if rank is None else _parse_rank(rank)
    kept_energy = _require_energy_used(rank or "", energy)
    merge_method = lora_merge.parse_merge_method(
        method, density, seed, rank_number, kept_energy if rank == "auto" else None
    )
    output_file = _output(output, dtype, force, dry_run)
    print_lines(lora_merge.merge_files(ratios, scale or [], merge_method, normalize, output_file))


@lora_commands.command()
def stack(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE[=WEIGHT]", help="LoRAs that are used at once, each with its weight."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object, with each module.")] = False,
) -> None:
    """Measure how LoRAs that are used at once overlap, what their sum leaves of each, and what to do about it.

    survives: the coefficient of a LoRA in the sum, 100% if the others leave it as it is. shared writes and reads: the
    part of its change that lies where the others write and read too; by chance: as much as unrelated LoRAs would share.
    """
    from zimage_train.commands import lora_args, lora_stack

    inputs = [lora_args.parse_weighted_lora(text, "stack") for text in files]
    report = lora_stack.measure_stack(inputs)
    print_lines(lora_stack.format_json(report) if as_json else lora_stack.format_report(report))


@lora_commands.command()
def resize(
    file: LoraPath,
    rank: RankText,
    output: OutputPath,
    energy: Energy = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Reduce the rank of a LoRA by the best approximation of each change, and report how much of it is kept."""
    from zimage_train.commands import lora_edit

    output_file = lora_edit.OutputFile(output, dtype, force)
    kept_energy = _require_energy_used(rank, energy)
    print_lines(lora_edit.resize_command(file, _parse_rank(rank), kept_energy, output_file))


@lora_commands.command()
def ema(
    saves: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_FILE", help="A run folder, or LoRAs that a run saved.")
    ],
    output: OutputPath,
    decay: Annotated[
        float | None,
        typer.Option(
            "--decay", min=0.0, max=0.999999, help="Decay per step, as ema.decay. Default: 0.999.", show_default=False
        ),
    ] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option(
            "--sigma-rel", min=0.001, max=0.28, help="Instead of --decay: width of a power law (EDM2), 0.05 to 0.25."
        ),
    ] = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Average the LoRAs that a run saved, as if it had kept an EMA of that length."""
    if decay is not None and sigma_rel is not None:
        raise ConfigError(
            Problem("--sigma-rel", "is given beside --decay", "give either of them", "conflicting-arguments")
        )
    from zimage_train.commands import lora_edit

    if decay is None and sigma_rel is None:
        decay = 0.999
    output_file = lora_edit.OutputFile(output, dtype, force)
    print_lines(lora_edit.ema_command(lora_edit.find_saves(saves), decay, sigma_rel, output_file))


@lora_commands.command()
def convert(
    file: LoraPath,
    to: Annotated[
        str, typer.Option("--to", help="comfyui, diffusers, peft, kohya, diffsynth or musubi.", show_default=False)
    ],
    output: OutputPath,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32; auto keeps the dtype of every tensor.")] = "auto",
    force: Force = False,
) -> None:
    """Convert a LoRA to another layout without loss: converting back gives the same file.

    --to peft writes a folder, with adapter_config.json beside the LoRA.

    Reads any prefix (diffusion_model, transformer, base_model.model, lora_unet, lycoris, none), lora_A/B, down/up,
    .default and fused q, k, v. DoRA, LoKr, LoHa and OFT can be written to layouts that support them.
    """
    from zimage_train.commands.lora_convert import convert_command
    from zimage_train.commands.lora_edit import OutputFile

    print_lines(convert_command(file, to, OutputFile(output, dtype, force)))


@lora_commands.command()
def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A folder, .safetensors, hub id or variant.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint that TUNED was trained from.")],
    output: OutputPath,
    rank: RankText = "32",
    energy: Energy = None,
    dtype: Dtype = "bf16",
    force: Force = False,
) -> None:
    """Extract a LoRA from the difference of two checkpoints, and report how much of the difference it keeps."""
    from zimage_train.commands import lora_bake, lora_edit

    output_file = lora_edit.OutputFile(output, dtype, force)
    kept_energy = _require_energy_used(rank, energy)
    print_lines(lora_bake.extract_command(tuned, base, _parse_rank(rank), kept_energy, output_file))


@lora_commands.command()
def bake(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="turbo, deturbo, base, a hub id, a folder or a file.")],
    lora: Annotated[list[str], typer.Option("--lora", metavar="FILE[=WEIGHT]", help="Repeatable.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="comfyui (a file) or diffusers (a folder).", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The file or folder to write.", show_default=False)
    ],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16 or fp32. Default: the dtype of each weight.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Write a model with LoRAs added to its weights, and report the rounding error."""
    from zimage_train.commands import lora_args, lora_bake

    loras = [lora_args.parse_weighted_lora(text) for text in lora]
    print_lines(lora_bake.bake_command(model, loras, to, dtype, output, force))


def _output(path: Path | None, dtype: str, force: bool, dry_run: bool) -> "OutputFile | None":
    """Return the file to write, or None for a dry run."""
    from zimage_train.commands.lora_edit import OutputFile

    if dry_run and path is not None:
        raise ConfigError(Problem("--dry-run", "is given beside -o", "leave out either", "conflicting-arguments"))
    if path is None and not dry_run:
        raise ConfigError(
            Problem("-o", "is missing", "give the file to write, or --dry-run to write none", "missing-argument")
        )
    return None if path is None else OutputFile(path, dtype, force)


def _require_energy_used(rank: str, energy: float | None) -> float:
    """Return the energy to keep, and require that it was only given if it has an effect."""
    if energy is not None and rank != "auto":
        raise ConfigError(
            Problem(
                "--energy",
                "does nothing without --rank auto",
                "give --rank auto, or leave it out",
                "conflicting-arguments",
            )
        )
    return DEFAULT_ENERGY if energy is None else energy


def _parse_rank(text: str) -> int | None:
    """Return a rank, or None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 6 or not 1 <= int(text) <= MAX_RANK:
        raise ConfigError(
            Problem("--rank", f"is {text!r}", f"give auto, or a number from 1 to {MAX_RANK}", "bad-argument")
        )
    return int(text)
