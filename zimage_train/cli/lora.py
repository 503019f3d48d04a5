"""The commands that look into LoRA files and make new ones of them: `zimage-train lora ...`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zimage_train.errors import ConfigError, Problem
from zimage_train.report.printing import print_lines

if TYPE_CHECKING:
    from zimage_train.commands.lora_edit import OutputFile

lora_commands = typer.Typer(
    help="Look into LoRA files, and make new ones of them.", no_args_is_help=True, rich_markup_mode=None
)

LoraPath = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA .safetensors.", show_default=False)]
OutputPath = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="The .safetensors to write.", show_default=False)
]
MaybeOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="The .safetensors to write.", show_default=False)
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="bf16 or fp32; auto is bf16 where that loses nothing, otherwise fp32.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Scale = Annotated[
    list[str] | None,
    typer.Option(
        "--scale",
        metavar="WHAT=FACTOR",
        help="layers.0-9=0.5, attention.to_{q,k,v}=0.8, adaln=0, layers=bell, likeness=1.2. Repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the factor of every module, and write nothing.")]
Image = Annotated[Path | None, typer.Option("--picture", help="Also draw a heat map into this PNG.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        min=0.0,
        max=1.0,
        help="For --rank auto: of the squared change, keep this. Default: 0.99.",
        show_default=False,
    ),
]
RankText = Annotated[
    str, typer.Option("--rank", metavar="N|auto", help="auto: the lowest that keeps --energy, for each module.")
]
KEEP = 0.99
MOST_RANK = 4096


@lora_commands.command()
def verify(
    file: LoraPath,
    model: Annotated[
        str | None, typer.Option("--model", help="Hold it against this folder or file. Default: the 6 B model.")
    ] = None,
) -> None:
    """Prove that diffusers and ComfyUI load all of a LoRA, and the same change."""
    from zimage_train.commands import lora

    print_lines(lora.verify_file(file, model))


@lora_commands.command()
def inspect(file: LoraPath, image: Image = None) -> None:
    """Show layout, rank, alpha, modules, how much each of them changes, and metadata."""
    from zimage_train.commands import lora

    print_lines(lora.inspect_file(file, image))


@lora_commands.command()
def diff(
    file: LoraPath,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.", show_default=False)],
    image: Image = None,
) -> None:
    """Compare what two LoRAs change: how far apart they are, and whether in the same direction."""
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
    """Scale a LoRA's change by layer and component; a factor of 0 leaves the module out.

    Rules that name layers, components, or both are three lists. Of each list the last rule that names a module counts,
    and the three multiply. Curves over layers: linear_in (0 to 1), linear_out (1 to 0), bell; 0.8*bell too. Named sets
    of components are community opinion (blog.hinablue.me): prompt_adherence, composition, likeness, clothing,
    background, colour_light.
    """
    if not scale:
        raise ConfigError(Problem("--scale", "is missing", "write for example --scale layers.0-9=0.5"))
    from zimage_train.commands import lora_edit

    print_lines(lora_edit.weight(file, scale, _output(output, dtype, force, dry_run)))


@lora_commands.command()
def merge(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE=RATIO", help="LoRAs, each with its ratio.", show_default=False)
    ],
    scale: Scale = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank", metavar="N|auto", help="Default: ranks add up, as the exact sum needs.", show_default=False
        ),
    ] = None,
    energy: Energy = None,
    method: Annotated[str, typer.Option("--method", help="sum, ties, dare_ties or dare_linear.")] = "sum",
    density: Annotated[
        float | None,
        typer.Option("--density", min=0.0, max=1.0, help="What ties and dare keep. Default: 0.5.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**62, help="Of dare's draws. Default: 42.", show_default=False)
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide ratios by the sum of their sizes.")] = False,
    dry_run: DryRun = False,
    output: MaybeOutput = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Put LoRAs together: the sum of their changes, each times its ratio.

    The sum is exact, for any ranks, alphas, layouts and modules, and linear in the ratios, which may be negative.
    A --scale is as in weight, for all files, or for one: 2:adaln=0 is for the second.
    """
    from zimage_train.commands import lora_args, lora_merge

    ratios = [lora_args.parse_weighted_lora(text, "merge", is_weight_needed=True) for text in files]
    number = None if rank is None else _rank(rank)
    kept = _energy(rank or "", energy)
    way = lora_merge.method_of(method, density, seed, number, kept if rank == "auto" else None)
    target = _output(output, dtype, force, dry_run)
    print_lines(lora_merge.merge_files(ratios, scale or [], way, normalize, target))


@lora_commands.command()
def resize(
    file: LoraPath,
    rank: RankText,
    output: OutputPath,
    energy: Energy = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Bring a LoRA to a lower rank: the best approximation of each change, and how much of it is kept."""
    from zimage_train.commands import lora_edit

    print_lines(lora_edit.resize(file, _rank(rank), _energy(rank, energy), lora_edit.OutputFile(output, dtype, force)))


@lora_commands.command()
def ema(
    saves: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_FILE", help="A run folder, or LoRAs that a run saved.")
    ],
    output: OutputPath,
    decay: Annotated[
        float | None,
        typer.Option(
            "--decay", min=0.0, max=0.999999, help="A step, as ema.decay. Default: 0.999.", show_default=False
        ),
    ] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option("--sigma-rel", min=0.001, max=0.28, help="Instead: width of a power law (EDM2), 0.05 to 0.25."),
    ] = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Average the LoRAs that a run saved, as if it had kept an EMA of that length."""
    if decay is not None and sigma_rel is not None:
        raise ConfigError(Problem("--sigma-rel", "is given beside --decay", "give one of them"))
    from zimage_train.commands import lora_edit

    length = decay if decay is not None or sigma_rel is not None else 0.999
    output_ = lora_edit.OutputFile(output, dtype, force)
    print_lines(lora_edit.ema(lora_edit.saves(saves), length, sigma_rel, output_))


@lora_commands.command()
def convert(
    file: LoraPath,
    to: Annotated[
        str, typer.Option("--to", help="comfyui, diffusers, kohya, diffsynth or musubi.", show_default=False)
    ],
    output: OutputPath,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32; auto leaves every tensor as it is.")] = "auto",
    force: Force = False,
) -> None:
    """Write a LoRA in another layout, to the bit: there and back is the same file.

    Reads any prefix (diffusion_model, transformer, base_model.model, lora_unet, lycoris, none), lora_A/B, down/up,
    .default, fused q, k, v; and DoRA, LoKr and LoHa, for layouts that have a place for them.
    """
    from zimage_train.commands import lora_edit

    print_lines(lora_edit.convert(file, to, lora_edit.OutputFile(output, dtype, force)))


@lora_commands.command()
def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A folder, .safetensors, hub id or variant.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The one that it was trained from.")],
    output: OutputPath,
    rank: RankText = "32",
    energy: Energy = None,
    dtype: Dtype = "bf16",
    force: Force = False,
) -> None:
    """Write the LoRA that leads from one checkpoint to another, and say how much of the way it goes."""
    from zimage_train.commands import lora_bake, lora_edit

    output_ = lora_edit.OutputFile(output, dtype, force)
    print_lines(lora_bake.extract_command(tuned, base, _rank(rank), _energy(rank, energy), output_))


@lora_commands.command()
def bake(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="turbo, deturbo, base, a hub id, a folder or a file.")],
    lora: Annotated[list[str], typer.Option("--lora", metavar="FILE[=WEIGHT]", help="Repeatable.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="comfyui (one file) or diffusers (a folder).", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The file or folder to write.", show_default=False)
    ],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16 or fp32. Default: as each weight is.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Write a model with LoRAs added to its weights, and say what rounding has cost."""
    from zimage_train.commands import lora_args, lora_bake

    print_lines(
        lora_bake.bake_command(model, [lora_args.parse_weighted_lora(text) for text in lora], to, dtype, output, force)
    )


def _output(path: Path | None, dtype: str, force: bool, dry_run: bool) -> "OutputFile | None":
    """Where to write; None: nowhere."""
    from zimage_train.commands.lora_edit import OutputFile

    if dry_run and path is not None:
        raise ConfigError(Problem("--dry-run", "is given beside -o", "leave one out"))
    if path is None and not dry_run:
        raise ConfigError(Problem("-o", "is missing", "say where to write, or give --dry-run to only look"))
    return None if path is None else OutputFile(path, dtype, force)


def _energy(rank: str, energy: float | None) -> float:
    if energy is not None and rank != "auto":
        raise ConfigError(Problem("--energy", "does nothing without --rank auto", "give --rank auto, or leave it out"))
    return KEEP if energy is None else energy


def _rank(text: str) -> int | None:
    """A rank; None: the lowest that keeps enough."""
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 6 or not 1 <= int(text) <= MOST_RANK:
        raise ConfigError(Problem("--rank", f"is {text!r}", f"give auto, or a number from 1 to {MOST_RANK}"))
    return int(text)
