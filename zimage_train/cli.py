"""The command line. Imports late: `--help`, `check` and config errors never load torch."""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zimage_train import __version__
from zimage_train.cli_lora import lora_commands
from zimage_train.cli_start import start_commands
from zimage_train.config.aitoolkit.convert import read_any
from zimage_train.config.schema import Config, Model
from zimage_train.errors import ConfigError, DiskError, Problem, ZImageTrainError
from zimage_train.interruptible import Interruptible
from zimage_train.model.variants import VARIANTS
from zimage_train.printing import FOR_MACHINES, as_event, note, print_lines, print_raw, silence
from zimage_train.sampling.prompts import read as read_prompts

app = typer.Typer(
    cls=Interruptible,
    name="zimage-train",
    help="Train LoRAs for Z-Image. Start with: zimage-train train configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__base__
"""Of a command that is misspelt; click's, wherever typer keeps that."""

app.add_typer(start_commands)
app.add_typer(lora_commands, name="lora")

ConfigPath = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The YAML file, or a job of AI Toolkit (YAML or JSON).", show_default=False),
]
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
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A file with one prompt a line, with kohya's --n --w --h --d --s --l, which win; or a YAML list.",
    ),
]
Drawn = Annotated[
    list[Path] | None,
    typer.Option("--from", help="Draw by the prompt, size, seed and steps of this PNG; options beside it win."),
]
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
    settings = _read(config, set_)
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
    price: Annotated[str | None, typer.Option("--price", help="Of an hour (0.69/h), or a file of prices.")] = None,
) -> None:
    """Check config, pictures, captions, weights and disk, and show what a run would do and take.

    Writes nothing but, into the cache folder, what it saw of each picture, so that the next time takes seconds.
    """
    settings = _read(config, set_)
    from zimage_train import preflight
    from zimage_train.app import check as checking
    from zimage_train.data.quarantine import move_rejected
    from zimage_train.model.sources import cached_only
    from zimage_train.report.console import Console

    hourly = None if price is None else checking.parse_price(price)
    console = Console.aside()
    if quarantine:
        print_lines(move_rejected(settings))
    with console.live():
        checked = preflight.examine(settings, cached_only, console.tick)
    print_lines(checking.report(checked, gpu, hourly))


@app.command()
def cache(config: ConfigPath, set_: Overrides = None) -> None:
    """Encode pictures and captions into the caches, and do nothing else."""
    settings = _read(config, set_)
    from zimage_train.app.train import cache as fill

    fill(settings)


@app.command()
def timesteps(
    config: ConfigPath,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a picture.")] = False,
) -> None:
    """Show the sigma density and the loss weights that a config trains on."""
    settings = _read(config, set_)
    import json

    from zimage_train.app import timesteps as describing

    if as_json:
        print_raw(json.dumps(describing.describe(settings)))
    else:
        print_lines(describing.picture(settings))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="turbo, deturbo, base, a hub id, a diffusers folder or a .safetensors.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw. Repeatable.")] = None,
    prompts: PromptFile = None,
    from_: Drawn = None,
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
    count: Annotated[
        int, typer.Option("--count", min=1, max=10_000, help="Pictures of each prompt, with seeds that follow.")
    ] = 1,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=64, help="How many of one size go through the model at once.")
    ] = 1,
    budget_gb: Annotated[
        float | None,
        typer.Option("--budget-gb", min=0.01, help="Stay within so many GB. Default: the card's.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Sample pictures with any number of LoRAs; each LoRA must match in full.

    Without --batch each picture is the one that a training preview or a stock pipeline draws, to the bit on a CPU.
    """
    problems = _size_problems(width, height)
    told = [name for name, one in (("--prompt", prompt), ("--prompts", prompts), ("--from", from_)) if one]
    if not told or (from_ and len(told) > 1):
        what = "is given beside --from" if told else "is missing"
        problems.append(Problem("--prompt", what, "give prompts, or pictures to draw again with --from"))
    if from_ and count > 1:
        problems.append(Problem("--count", "is given beside --from", "a picture is drawn again once"))
    settings = _models([model], "MODEL", variant, extras, dtype, problems)[0]
    from zimage_train.app import given
    from zimage_train.app import sample as sampling

    asked = sampling.Asked(negative, seed, width, height, steps, guidance, count)
    wishes = [*map(sampling.Wish, prompt or []), *(read_prompts(prompts) if prompts else [])]
    recipes = sampling.recipes_of(asked, from_) if from_ else sampling.recipes_for(asked, settings, wishes)
    if from_:
        print_lines(sampling.said_of(from_))
    if negative and not any(recipe.guidance > 0 for recipe in recipes):
        note(["--negative is not used at guidance 0, which is Turbo's own; give --guidance"])
    loras, room = [given.parse(text) for text in lora or []], sampling.Room(batch, budget_gb)
    sampling.sample(settings, loras, recipes, room, output)


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

        print_lines(comparing.compare(inputs, by, output))
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
    print_lines(draw.draw(wanted, by, output))


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


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
    for_machines: Annotated[
        bool, typer.Option("--json", help="Before a command: each line that it prints is a JSON object.")
    ] = False,
) -> None:
    FOR_MACHINES.set(for_machines)
    if version:
        print_lines([f"zimage-train {__version__}"])
        raise typer.Exit


def main() -> None:
    """Run the command line; users' errors are lines and an exit code, and only a bug shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end a run
    try:
        if sys.argv[1:2] == ["--json"]:
            FOR_MACHINES.set(True)  # before there is a command that could say so
            sys.exit(app(standalone_mode=False) or 0)
        app()
    except UsageError as error:
        _fail(ConfigError(Problem("command line", error.format_message())))
    except ZImageTrainError as error:
        _fail(error)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(ConfigError(Problem(str(error.filename)[:60] + "...", "is too long for a path", "check the path")))
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            silence()
            _fail(DiskError(Problem("standard output", f"cannot be written ({error.strerror})")))
        raise


def _read(path: Path, overrides: list[str] | None) -> Config:
    settings, notes = read_any(path, overrides or [])
    note(notes)
    return settings


def _fail(error: ZImageTrainError) -> NoReturn:
    rank = os.environ.get("RANK", "0")  # of the processes that torchrun starts, each says what it met
    with contextlib.suppress(OSError, AttributeError):  # nobody has to listen
        for one in error.problems:
            text = f"process {rank}: {one}" if rank != "0" else str(one)
            event = as_event("error", where=one.where, found=one.what, todo=one.todo, exit_code=error.exit_code)
            print(event if FOR_MACHINES.get() else text, file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
