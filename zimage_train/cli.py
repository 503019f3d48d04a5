"""The command line. Imports late: `--help`, `check` and config errors never load torch."""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from zimage_train import __version__
from zimage_train.config.reading import read_config
from zimage_train.config.schema import Model
from zimage_train.errors import ConfigError, DiskError, Problem, ZImageTrainError
from zimage_train.model.variants import VARIANTS

app = typer.Typer(
    name="zimage-train",
    help="Train LoRAs for Z-Image. Start with: zimage-train train configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

lora_commands = typer.Typer(help="Look into LoRA files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lora_commands, name="lora")

LoraPath = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA .safetensors.", show_default=False)]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=YAML", help="Override a setting, e.g. --set train.steps=100. Repeatable."),
]


@app.command()
def train(
    config: ConfigPath,
    set_: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an older run of this name aside and begin again.")
    ] = False,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="KEY", help="Continue with a changed KEY, e.g. optimizer.lr.")
    ] = None,
) -> None:
    """Train a LoRA; the same command continues a run that was stopped."""
    settings = read_config(config, set_ or [])
    from zimage_train.app.train import train as run

    run(settings, fresh, tuple(allow or ()))


@app.command()
def check(
    config: ConfigPath,
    set_: Overrides = None,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move bad pictures to _rejected, with the reason beside each.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for this card (4090, a5000, h100, ...), not the one here.")
    ] = None,
    price: Annotated[str | None, typer.Option("--price", help="Of an hour, such as 0.69/h: shows the cost.")] = None,
) -> None:
    """Check config, pictures, captions, weights and disk, and show what a run would do and take.

    Writes nothing but, into the cache folder, what it saw of each picture, so that the next time takes seconds.
    """
    settings = read_config(config, set_ or [])
    from zimage_train import preflight
    from zimage_train.app import check as checking
    from zimage_train.data.quarantine import move_rejected
    from zimage_train.model.sources import cached_only
    from zimage_train.report.console import Console

    hourly = None if price is None else checking.parse_price(price)
    console = Console(is_main=sys.stderr is not None and sys.stderr.isatty(), stream=sys.stderr)
    if quarantine:
        _print(move_rejected(settings))
    with console.live():
        checked = preflight.examine(settings, cached_only, console.tick)
    _print(checking.report(checked, gpu, hourly))


@app.command()
def cache(config: ConfigPath, set_: Overrides = None) -> None:
    """Encode pictures and captions into the caches, and do nothing else."""
    settings = read_config(config, set_ or [])
    from zimage_train.app.train import cache as fill

    fill(settings)


@app.command()
def timesteps(
    config: ConfigPath,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a picture.")] = False,
) -> None:
    """Show the sigma density and the loss weights that a config trains on."""
    settings = read_config(config, set_ or [])
    import json

    from zimage_train.app import timesteps as describing

    _print([json.dumps(describing.describe(settings))] if as_json else describing.picture(settings))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="turbo, deturbo, base, a hub id, a diffusers folder or a .safetensors.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw. Repeatable.")] = None,
    from_: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Draw by the prompt, size, seed and steps of this PNG; options beside it win."),
    ] = None,
    lora: Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[=WEIGHT]", help="Repeatable.")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="Used where guidance is above 0.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**62, help="Prompt i is drawn with seed + i. Default: 42.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", min=32, max=4096, help="Default: 1024.")] = None,
    height: Annotated[int | None, typer.Option("--height", min=32, max=4096, help="Default: 1024.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Default: the variant's own.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0.0, help="g; the usual CFG scale is g + 1.")
    ] = None,
    variant: Annotated[
        str, typer.Option("--variant", help="What a path or hub id is: turbo, deturbo or base.")
    ] = "turbo",
    extras: Annotated[str | None, typer.Option("--extras", help="Folder or hub id of text encoder and VAE.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32.")] = "bf16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Sample pictures with any number of LoRAs; each LoRA must match in full."""
    problems = [
        Problem(f"--{name}", f"is {value}", "give a multiple of 16")
        for name, value in (("width", width), ("height", height))
        if value is not None and value % 16
    ]
    if not model:
        problems.append(Problem("MODEL", "is empty", "give turbo, deturbo, base, a hub id, a folder or a .safetensors"))
    if bool(prompt) == bool(from_):
        what = "is given beside --from" if prompt else "is missing"
        problems.append(Problem("--prompt", what, "give prompts, or pictures to draw again with --from"))
    if variant not in VARIANTS:
        problems.append(Problem("--variant", f"is {variant!r}", f"give one of {', '.join(VARIANTS)}"))
    if dtype not in ("bf16", "fp32"):
        problems.append(Problem("--dtype", f"is {dtype!r}", "give bf16 or fp32"))
    if problems:
        raise ConfigError(*problems)
    is_name = model in VARIANTS
    settings = Model.model_validate(
        {
            "variant": model if is_name else variant,
            "path": None if is_name else model,
            "extras": extras,
            "adapter": None,
            "dtype": dtype,
        }
    )
    from zimage_train.app import sample as sampling

    asked = sampling.Asked(negative, seed, width, height, steps, guidance)
    recipes = sampling.recipes_of(asked, from_) if from_ else sampling.recipes_for(asked, settings, prompt or [])
    _print(sampling.said_of(from_ or []))
    sampling.sample(settings, [sampling.parse_lora(text) for text in lora or []], recipes, output)


@lora_commands.command()
def verify(
    file: LoraPath,
    model: Annotated[
        str | None, typer.Option("--model", help="Hold it against this folder or file. Default: the 6 B model.")
    ] = None,
) -> None:
    """Prove that diffusers and ComfyUI load all of a LoRA, and the same change."""
    from zimage_train.app import lora

    _print(lora.verify(file, model))


@lora_commands.command()
def inspect(
    file: LoraPath,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw a heat map into this PNG.")] = None,
) -> None:
    """Show layout, rank, alpha, modules, how much each of them changes, and metadata."""
    from zimage_train.app import lora

    _print(lora.inspect(file, picture))


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        _print([f"zimage-train {__version__}"])
        raise typer.Exit


def main() -> None:
    """Run the command line; users' errors are lines and an exit code, and only a bug shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end a run
    try:
        app()
    except ZImageTrainError as error:
        _fail(error)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(ConfigError(Problem(str(error.filename)[:60] + "...", "is too long for a path", "check the path")))
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            _silence()
            _fail(DiskError(Problem("standard output", f"cannot be written ({error.strerror})")))
        raise


def _fail(error: ZImageTrainError) -> NoReturn:
    rank = os.environ.get("RANK", "0")  # of the processes that torchrun starts, each says what it met
    with contextlib.suppress(OSError, AttributeError):  # nobody has to listen
        for problem in error.problems:
            print(f"process {rank}: {problem}" if rank != "0" else problem, file=sys.stderr)
    sys.exit(error.exit_code)


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(lines: list[str]) -> None:
    """Print what a command is there to print; who closes the pipe has seen enough.

    Raises:
        DiskError: it can be written nowhere.
    """
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        _silence()
        if not isinstance(error, BrokenPipeError):
            raise DiskError(Problem("standard output", f"cannot be written ({error.strerror})")) from error


if __name__ == "__main__":
    main()
