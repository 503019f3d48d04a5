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


Fresh = Annotated[bool, typer.Option("--fresh", help="Move an older run of this name aside and begin again.")]
Allow = Annotated[
    list[str] | None, typer.Option("--allow", metavar="KEY", help="Continue with a changed KEY, e.g. optimizer.lr.")
]
Negative = Annotated[str | None, typer.Option("--negative", help="Used where guidance is above 0.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**62, help="Prompt i is drawn with seed + i. Default: 42.")
]
Width = Annotated[int | None, typer.Option("--width", min=32, max=4096, help="Default: 1024.")]
Height = Annotated[int | None, typer.Option("--height", min=32, max=4096, help="Default: 1024.")]
Variant = Annotated[str, typer.Option("--variant", help="What a path or hub id is: turbo, deturbo or base.")]
Extras = Annotated[str | None, typer.Option("--extras", help="Folder or hub id of text encoder and VAE.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bf16 or fp32.")]


@app.command()
def train(
    config: ConfigPath,
    set_: Overrides = None,
    fresh: Fresh = False,
    allow: Allow = None,
) -> None:
    """Train a LoRA; the same command continues a run that was stopped."""
    settings = read_config(config, set_ or [])
    from zimage_train.app.train import train as run

    run(settings, fresh, tuple(allow or ()))


@app.command()
def sweep(
    config: ConfigPath,
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="KEY=V1,V2", help="A setting and its values. Repeatable: all combinations."),
    ],
    set_: Overrides = None,
    fresh: Fresh = False,
    allow: Allow = None,
) -> None:
    """Train one run for each value of a setting, with the same seed and caches, and compare them.

    The same command continues a sweep that was stopped; values that are added later join what is there.
    """
    from zimage_train.config.variations import variations

    runs = variations(config, set_ or [], vary)
    from zimage_train.app.sweep import sweep as run_all

    run_all(runs, fresh, tuple(allow or ()))


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
    negative: Negative = None,
    seed: Seed = None,
    width: Width = None,
    height: Height = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Default: the variant's own.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0.0, help="g; the usual CFG scale is g + 1.")
    ] = None,
    variant: Variant = "turbo",
    extras: Extras = None,
    dtype: Dtype = "bf16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Sample pictures with any number of LoRAs; each LoRA must match in full."""
    problems = _size_problems(width, height)
    if bool(prompt) == bool(from_):
        what = "is given beside --from" if prompt else "is missing"
        problems.append(Problem("--prompt", what, "give prompts, or pictures to draw again with --from"))
    settings = _models([model], "MODEL", variant, extras, dtype, problems)[0]
    from zimage_train.app import sample as sampling

    asked = sampling.Asked(negative, seed, width, height, steps, guidance)
    recipes = sampling.recipes_of(asked, from_) if from_ else sampling.recipes_for(asked, settings, prompt or [])
    _print(sampling.said_of(from_ or []))
    sampling.sample(settings, [sampling.parse_lora(text) for text in lora or []], recipes, output)


@app.command()
def compare(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_LORA", help="Run folders, LoRA files, a sweep's folder.", show_default=False),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            "--by", help="What the columns are: run, step, prompt, model, LoRA, strength, sampling, a setting."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Draw this with every LoRA. Repeatable.")] = None,
    strength: Annotated[
        str | None, typer.Option("--strength", help="Weights of each LoRA; 0 is the bare model. Default: 0,1.")
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option("--sampling", metavar="STEPS:G,...", help="E.g. 8:0,30:1. Default: the variant's own."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="As in sample. Default: turbo. Repeatable.", show_default=False)
    ] = None,
    negative: Negative = None,
    seed: Seed = None,
    width: Width = None,
    height: Height = None,
    variant: Variant = "turbo",
    extras: Extras = None,
    dtype: Dtype = "bf16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for grid, page, pictures.")] = Path("compare"),
) -> None:
    """Put runs or LoRAs side by side: one labelled grid, and one page with a slider and zoom.

    Runs alone are compared by the previews that they have. With --prompt, or with a LoRA file, pictures are drawn: a
    run then stands for its LoRA.
    """
    drawing = {"--strength": strength, "--sampling": sampling, "--model": model, "--negative": negative, "--seed": seed}
    drawing |= {"--width": width, "--height": height, "--extras": extras}
    drawing |= {"--variant": None if variant == "turbo" else variant, "--dtype": None if dtype == "bf16" else dtype}
    given = [name for name, value in drawing.items() if value is not None]
    has_files = any(path.is_file() for path in inputs)
    if not prompt and not given and not has_files:
        from zimage_train.app import compare as comparing

        _print(comparing.compare(inputs, by, output))
        return
    problems = _size_problems(width, height)
    if not prompt:
        why = "LoRA files have no pictures to compare" if has_files else f"{given[0]} is for drawing"
        problems.append(Problem("--prompt", f"is missing, and {why}", "say what to draw, or give run folders alone"))
    models = _models(model or ["turbo"], "--model", variant, extras, dtype, problems)
    from zimage_train.app import draw

    asked = draw.Asked(negative, seed, width, height, None, None)
    strengths, samplings = draw.parse_strengths(strength or "0,1"), draw.parse_samplings(sampling) if sampling else []
    wanted = draw.Wanted(models, draw.lora_files(inputs), strengths, samplings, prompt or [], asked)
    _print(draw.draw(wanted, by, output))


def _size_problems(width: int | None, height: int | None) -> list[Problem]:
    sizes = (("width", width), ("height", height))
    return [
        Problem(f"--{name}", f"is {value}", "give a multiple of 16")
        for name, value in sizes
        if value is not None and value % 16
    ]


def _models(
    names: list[str], where: str, variant: str, extras: str | None, dtype: str, problems: list[Problem]
) -> list[Model]:
    """The models of these names, as options beside them describe them.

    Raises:
        ConfigError: lists `problems`, and what is wrong with these.
    """
    found = list(problems)
    if not all(names):
        found.append(Problem(where, "is empty", "give turbo, deturbo, base, a hub id, a folder or a .safetensors"))
    if len(set(names)) < len(names):
        found.append(Problem(where, "is given twice with one value", "leave one out"))
    if variant not in VARIANTS:
        found.append(Problem("--variant", f"is {variant!r}", f"give one of {', '.join(VARIANTS)}"))
    if dtype not in ("bf16", "fp32"):
        found.append(Problem("--dtype", f"is {dtype!r}", "give bf16 or fp32"))
    if found:
        raise ConfigError(*found)
    return [
        Model.model_validate(
            {
                "variant": name if name in VARIANTS else variant,
                "path": None if name in VARIANTS else name,
                "extras": extras,
                "adapter": None,
                "dtype": dtype,
            }
        )
        for name in names
    ]


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
