"""The commands that look into LoRA files: `zimage-train lora ...`."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_train.printing import print_lines

lora_commands = typer.Typer(help="Look into LoRA files.", no_args_is_help=True, rich_markup_mode=None)

LoraPath = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA .safetensors.", show_default=False)]


@lora_commands.command()
def verify(
    file: LoraPath,
    model: Annotated[
        str | None, typer.Option("--model", help="Hold it against this folder or file. Default: the 6 B model.")
    ] = None,
) -> None:
    """Prove that diffusers and ComfyUI load all of a LoRA, and the same change."""
    from zimage_train.app import lora

    print_lines(lora.verify(file, model))


@lora_commands.command()
def inspect(
    file: LoraPath,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw a heat map into this PNG.")] = None,
) -> None:
    """Show layout, rank, alpha, modules, how much each of them changes, and metadata."""
    from zimage_train.app import lora

    print_lines(lora.inspect(file, picture))
