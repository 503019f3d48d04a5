"""The command line. Commands import late, so that `--help`, `check` and config errors never load torch."""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zimage_train import __version__
from zimage_train.cli.interruptible import Interruptible
from zimage_train.cli.lora import lora_commands
from zimage_train.cli.prepare import start_commands
from zimage_train.cli.sampling import draw_commands
from zimage_train.compat.formats import AI_TOOLKIT, DATASET_TOML
from zimage_train.config import load
from zimage_train.config.foreign import register_format
from zimage_train.config.schema import Config
from zimage_train.errors import ConfigError, DiskError, Problem, ZImageTrainError
from zimage_train.report.printing import JSON_OUTPUT, discard_stdout, error_event, print_lines, print_notes, print_raw

register_format(AI_TOOLKIT)
register_format(DATASET_TOML)

app = typer.Typer(
    cls=Interruptible,
    name="zimage-train",
    help="Train LoRAs for Z-Image. Start with: zimage-train init FOLDER",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__base__
"""click.UsageError, reached through typer so that we need not import click."""

app.add_typer(start_commands)
app.add_typer(draw_commands)
app.add_typer(lora_commands, name="lora")

ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="The config (YAML), or a job of AI Toolkit (YAML or JSON).", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=YAML", help="Override a setting, e.g. --set train.steps=100. Repeatable."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; an existing run of this name is kept in a folder NAME.old.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", metavar="KEY", help="Continue a run although the setting KEY, e.g. optimizer.lr, has changed."
    ),
]


@app.command()
def train(
    config: ConfigPath,
    set_: Overrides = None,
    fresh: Fresh = False,
    allow: Allow = None,
) -> None:
    """Train a LoRA; the same command continues a run that was stopped."""
    settings = _read(config, set_)
    from zimage_train.commands.train import run_training

    run_training(settings, fresh, tuple(allow or ()))


@app.command()
def sweep(
    config: ConfigPath,
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="KEY=V1,V2", help="A setting and its values. If repeated, all combinations."),
    ],
    set_: Overrides = None,
    fresh: Fresh = False,
    allow: Allow = None,
) -> None:
    """Train a run for each value of a setting, with the same seed and caches, and compare them.

    The same command continues a sweep that was stopped. If values are added, only their runs are trained.
    """
    from zimage_train.commands.sweep_values import make_sweep_runs

    runs = make_sweep_runs(config, set_ or [], vary)
    from zimage_train.commands.sweep import run_sweep

    run_sweep(runs, fresh, tuple(allow or ()))


@app.command()
def check(
    config: ConfigPath,
    set_: Overrides = None,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move unusable images to _rejected, with the reason beside each.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Plan for this GPU (4090, a5000, h100, ...) instead of this machine's."),
    ] = None,
    price: Annotated[
        str | None, typer.Option("--price", help="Price of the GPU per hour, e.g. 0.69/h, to show what the run costs.")
    ] = None,
) -> None:
    """Check config, images, captions, weights and disk space, and predict memory and time of the run.

    It writes only an index of the images into the cache folder, which makes the next check fast.
    """
    settings = _read(config, set_)
    from zimage_train.commands.check import check_report, parse_price
    from zimage_train.dataset.quarantine import move_rejected
    from zimage_train.models.locate import cached_only
    from zimage_train.planning import preflight
    from zimage_train.report.console import Console

    hourly = None if price is None else parse_price(price)
    console = Console.progress_only()
    if quarantine:
        print_lines(move_rejected(settings))
    with console.live_progress():
        spec = preflight.check_run(settings, cached_only, console.progress)
    print_lines(check_report(spec, gpu, hourly))


@app.command()
def cache(config: ConfigPath, set_: Overrides = None) -> None:
    """Encode images and captions into the caches, without training."""
    settings = _read(config, set_)
    from zimage_train.commands.train import fill_run_caches

    fill_run_caches(settings)


@app.command()
def ui(
    runs: Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Folder of the runs.")] = Path("runs"),
    folders: Annotated[
        list[Path] | None,
        typer.Option(
            "--folder",
            metavar="FOLDER",
            help="A folder whose images and LoRAs the page may open. Repeatable. Default: the working directory and "
            "the home directory.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at. Any but this machine's own asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen at.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page in the browser for the whole job: images, config, queue, live runs, LoRA files."""
    try:
        from zimage_train.ui.server import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("zimage_train"):
            raise
        hint = "install it with `pip install 'zimage-train[ui]'`, or in a checkout `pip install -e '.[ui]'`"
        raise ConfigError(
            Problem("ui", f"needs {error.name}, which is not installed", hint, "missing-package")
        ) from None
    serve(runs, folders or [Path.cwd(), Path.home()], host, port, browser)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, output/NAME.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="ORG/REPO", help="Upload to this repository of the Hugging Face hub."),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="License of the LoRA, e.g. apache-2.0. --to requires it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. Default: RUN/publish.", show_default=False)
    ] = None,
) -> None:
    """Write a folder with the LoRA of a run, a model card and its previews, ready to upload.

    Nothing is uploaded without --to.
    """
    from zimage_train.commands.publish import publish_run

    print_lines(publish_run(run, license_, to, output))


@app.command()
def timesteps(
    config: ConfigPath,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a chart.")] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Fit loss weights to model and images, and print them for a config."),
    ] = False,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="CONFIG", help="Draw the density of this config over it too. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Draw the density as a picture (PNG). Default with --with: timesteps.png."),
    ] = None,
) -> None:
    """Show the distribution of sigma and the loss weights that a config trains with."""
    draws = bool(others) or output is not None
    if as_json + draws + measure > 1:
        raise typer.BadParameter("give one of --json, --measure and a picture (--with, --output)")
    if measure:
        settings = _read(config, set_)
        from zimage_train.commands.timesteps_measure import measure_weights

        print_lines(measure_weights(settings))
        return
    named = [(config.name, _read(config, set_))]
    for other in others or []:
        named.append((other.name, _read(other, None)))
    import json

    from zimage_train.commands.timesteps import density_chart, describe_timesteps, plot_densities

    if as_json:
        print_raw(json.dumps(describe_timesteps(named[0][1])))
    for name, settings in [] if as_json else named:
        print_lines([*([f"{name}:"] if others else []), *density_chart(settings)])
    if draws:
        print_lines(plot_densities(named, output or Path("timesteps.png")))


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    for_machines: Annotated[
        bool, typer.Option("--json", help="Before a command: print each line as a JSON object.")
    ] = False,
) -> None:
    JSON_OUTPUT.set(for_machines)
    if version:
        print_lines([f"zimage-train {__version__}"])
        raise typer.Exit


def main() -> None:
    """Run the command line. Errors of the user become lines and an exit code; only a bug shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that a terminal cannot show must not end a run
    try:
        if sys.argv[1:2] == ["--json"]:
            JSON_OUTPUT.set(True)  # `top` sets it too late for errors in the command line itself
            sys.exit(app(standalone_mode=False) or 0)
        app()
    except UsageError as error:
        _fail(ConfigError(Problem("command line", error.format_message(), code="bad-command-line")))
    except ZImageTrainError as error:
        _fail(error)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            where = f"{str(error.filename)[:60]}..."
            _fail(ConfigError(Problem(where, "is too long for a path", "check the path", "too-long")))
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            discard_stdout()
            what = f"cannot be written ({error.strerror})"
            _fail(DiskError(Problem("standard output", what, code="cannot-write")))
        raise


def _read(path: Path, overrides: list[str] | None) -> Config:
    settings, notes = load.read_config_with_notes(path, overrides or [])
    print_notes(notes)
    return settings


def _fail(error: ZImageTrainError) -> NoReturn:
    """Print the problems of `error` on stderr, and exit with its code."""
    rank = os.environ.get("RANK", "0")  # torchrun starts several processes, and each prints its own problems
    with contextlib.suppress(OSError, AttributeError):  # stderr may be closed
        for problem in error.problems:
            text = f"process {rank}: {problem}" if rank != "0" else str(problem)
            print(error_event(problem, error.exit_code) if JSON_OUTPUT.get() else text, file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
