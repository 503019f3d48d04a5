"""Commands before a training: write a config, caption images, check the machine, download models, import a job."""

import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zimage_train.compat.formats import read_job_as_config
from zimage_train.config.templates import MODEL_TEMPLATES, SUBJECT_KINDS
from zimage_train.dataset.caption_prompts import CAPTION_STYLES, DEFAULT_MODEL
from zimage_train.errors import ConfigError, Problem
from zimage_train.io import atomic
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.report.printing import JSON_OUTPUT, print_lines, print_notes

if TYPE_CHECKING:  # the command line loads the commands only when they run
    from zimage_train.commands.init import Answers, FolderSummary

start_commands = typer.Typer(rich_markup_mode=None)

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="The job (YAML or JSON).", show_default=False)]
FolderPath = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of images.", show_default=False)]


@start_commands.command()
def init(
    folder: FolderPath,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help=f"What the images teach: {', '.join(SUBJECT_KINDS)}.", show_default=False),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option("--variant", help=f"The model to train on: {', '.join(MODEL_TEMPLATES)}.", show_default=False),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option("--trigger", help="The word that stands for the subject in prompts.", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Plan for this GPU (4090, 4060, h100, ...) instead of this machine's."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run. Default: FOLDER_lora.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CONFIG", help="The file to write. Default: NAME.yaml.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask no questions, and use the defaults.")] = False,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="Train the miniature model of a few MB, on a CPU in a minute.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing config.")] = False,
) -> None:
    """Inspect a folder of images, and write a config for it that gives the reason for each setting."""
    from zimage_train.commands.init import (
        advise_for,
        describe_folder,
        name_of,
        require_place,
        summarize_folder,
        template_values_for,
        write_config_file,
    )
    from zimage_train.planning import gpus
    from zimage_train.report.console import Console

    _require_init_options(kind, variant, trigger, gpu, name, miniature)
    if gpu is not None:
        gpus.get_gpu(gpu)  # refuses an unknown GPU before any question is asked
    run_name = name or name_of(folder, output)
    path = output or Path(f"{run_name}.yaml")
    require_place(path, force)

    console = Console.progress_only()
    with console.live_progress():
        summary = summarize_folder(folder, console.progress)
    print_lines([*describe_folder(summary), ""])

    is_interactive = not yes and not JSON_OUTPUT.get() and sys.stdin is not None and sys.stdin.isatty()
    answers = _complete_answers(summary, kind, variant, trigger, gpu, miniature, is_interactive)
    values = template_values_for(summary, answers, run_name, miniature)
    lines = advise_for(summary, answers.kind, miniature)
    if not is_interactive:
        lines.append(f"trigger: {answers.trigger}")
    print_lines([*lines, *write_config_file(path, values, answers, summary.problems)])


def _require_init_options(
    kind: str | None, variant: str | None, trigger: str | None, gpu: str | None, name: str | None, miniature: bool
) -> None:
    """Require that the options of `init` are valid and go together.

    Raises:
        ConfigError: lists every option that is not.
    """
    from zimage_train.commands.init import answer_error

    problems = _choice_problems(("--kind", kind, SUBJECT_KINDS), ("--variant", variant, MODEL_TEMPLATES))
    if miniature and variant is not None:
        what = "cannot be combined with --miniature, which is a Turbo model"
        problems.append(Problem("--variant", what, "leave out either option", "conflicting-arguments"))
    if miniature and gpu is not None:
        what = "cannot be combined with --miniature, which needs no GPU"
        problems.append(Problem("--gpu", what, "leave out either option", "conflicting-arguments"))
    for option, value in (("--trigger", trigger), ("--name", name)):
        if value is not None and (error := answer_error(option, value)):
            problems.append(Problem(option, error, code="bad-argument"))
    if problems:
        raise ConfigError(*problems)


def _complete_answers(
    summary: "FolderSummary",
    kind: str | None,
    variant: str | None,
    trigger: str | None,
    gpu: str | None,
    miniature: bool,
    is_interactive: bool,
) -> "Answers":
    """Return the options of `init`; ask for those that are missing, or take their defaults without a terminal."""
    from zimage_train.commands.init import Answers, likely_trigger, local_gpu

    if kind is None:
        kind = _ask_choice("What do the images show?", list(SUBJECT_KINDS)) if is_interactive else "character"
    if variant is None:
        asks_variant = is_interactive and not miniature
        variant = _ask_choice("Which model?", list(MODEL_TEMPLATES)) if asks_variant else "turbo"
    if trigger is None:
        default = likely_trigger(summary.captions, summary.kohya) or SUBJECT_KINDS[kind].trigger
        trigger = _ask_trigger(default) if is_interactive else default
    if is_interactive and not miniature and gpu is None and local_gpu() is None:
        gpu = _ask_choice("Which GPU?", ["4090", *(known for known in GPU_SPECS if known != "4090")])
    return Answers(kind, variant, trigger, gpu)


@start_commands.command()
def caption(
    folder: FolderPath,
    model: Annotated[
        str, typer.Option("--model", help="The vision-language model: a folder or a hub id.")
    ] = DEFAULT_MODEL,
    style: Annotated[str, typer.Option("--style", help=f"Style of the captions: {', '.join(CAPTION_STYLES)}.")] = (
        "sentences"
    ),
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help=f"What the LoRA is to learn ({', '.join(SUBJECT_KINDS)}), which the captions then leave out.",
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option("--trigger", help="A word to add to every caption; training adds data.trigger by itself."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="Instruction for the model, instead of that of --style.")
    ] = None,
    extension: Annotated[str, typer.Option("--extension", help="Extension of the caption files.")] = ".txt",
    force: Annotated[bool, typer.Option("--force", help="Replace existing captions.")] = False,
) -> None:
    """Caption the images that have no caption, with a vision-language model on this machine.

    Each caption is written at once, so the same command continues after an interruption.
    """
    from zimage_train.commands.init import answer_error
    from zimage_train.dataset.images import EXTENSIONS

    problems = _choice_problems(("--kind", kind, SUBJECT_KINDS), ("--style", style, CAPTION_STYLES))
    for option, value in (("--trigger", trigger), ("--instruction", instruction)):
        if value is not None and not value.strip():
            problems.append(Problem(option, "is empty", "give a text, or leave out the option", "bad-argument"))
    if trigger is not None and trigger.strip() and (error := answer_error("--trigger", trigger.strip())):
        problems.append(Problem("--trigger", error, code="bad-argument"))
    if not re.fullmatch(r"\.[A-Za-z0-9_.]+", extension) or extension.lower().endswith(tuple(EXTENSIONS)):
        problems.append(Problem("--extension", f"is {extension!r}", "give a suffix such as .txt", "bad-argument"))
    if problems:
        raise ConfigError(*problems)
    from zimage_train.commands.caption import CaptionOptions, caption_folder
    from zimage_train.report.console import Console

    options = CaptionOptions(model, style, kind, trigger and trigger.strip(), instruction, extension, force)
    print_lines(caption_folder(folder, options, Console()))


@start_commands.command()
def doctor() -> None:
    """Check whether this machine can train, and say what to fix; makes no network requests."""
    from zimage_train.commands.doctor import doctor_report, gather_facts

    lines, can_train = doctor_report(gather_facts())
    print_lines(lines)
    if not can_train:
        raise typer.Exit(2)


@start_commands.command()
def prove(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="Measure on the model of this config. Default: Turbo if it is downloaded, or else the miniature.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One plan, at 512 px, meant to take ten minutes on a GPU.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where prove.html and prove.json go.")
    ] = Path("prove"),
    comfyui: Annotated[
        Path | None,
        typer.Option("--comfyui", metavar="FOLDER", help="Load the LoRA by the code of this ComfyUI, too."),
    ] = None,
    aitoolkit: Annotated[
        Path | None,
        typer.Option("--aitoolkit", metavar="FOLDER", help="Load the LoRA by the code of this AI Toolkit, too."),
    ] = None,
) -> None:
    """Measure on this machine what the project promises, and write a page that can be sent.

    The same command continues. It ends with 0 if every claim that was tried holds, and with 1 if one does not.
    """
    from zimage_train.commands.prove import prove
    from zimage_train.config.load import read_config

    projects = {"comfyui": comfyui, "aitoolkit": aitoolkit}
    given = {part: path for part, path in projects.items() if path is not None}
    if not prove(None if config is None else read_config(config), quick, output, given):
        raise typer.Exit(1)


@start_commands.command()
def download(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The config, or turbo, deturbo or base.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=YAML", help="Override a setting. Repeatable.")
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="MINUTES",
            help="Instead of downloading, wait up to MINUTES for another machine to do it, into the same HF_HOME.",
            min=0,
        ),
    ] = None,
) -> None:
    """Download the model files that a config needs, and verify their digests.

    Prints the size first, and resumes an interrupted download. It needs no GPU, so another machine can fill a shared
    disk.
    """
    from zimage_train.config import load
    from zimage_train.config.schema import ModelSettings

    if config in MODEL_TEMPLATES and set_:
        what = f"cannot be combined with {config}, which is not a config"
        raise ConfigError(Problem("--set", what, "give the path of a config", "conflicting-arguments"))
    settings = None if config in MODEL_TEMPLATES else load.read_config(Path(config), set_ or [])
    from zimage_train.commands.download import download_models
    from zimage_train.report.console import Console

    model = settings.model if settings else ModelSettings.model_validate({"variant": config})
    second_model = settings.sample.compare_on if settings else None
    print_lines(download_models(model, second_model, Console(), wait))


@start_commands.command("import")
def import_(
    job: JobPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CONFIG", help="The file to write. Default: stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert a job of AI Toolkit, or a dataset file of sd-scripts or musubi-tuner, to a config with every setting.

    Keys that cannot be honoured are refused, all at once. Other differences are reported as notes.
    """
    from zimage_train.compat.aitoolkit.convert import write_config

    settings, notes = read_job_as_config(job)
    if output is not None and output.exists() and not force:
        raise ConfigError(Problem(str(output), "exists", "give another name, or --force", "file-exists"))
    if output is not None and output.exists() and output.samefile(job):
        raise ConfigError(Problem(str(output), "is the job itself", "give another name", "bad-argument"))
    text = write_config(settings, notes, job)
    print_notes(notes)
    if output is None:
        print_lines([text.rstrip()])
    else:
        atomic.write_text(output, text)


def _choice_problems(*options: tuple[str, str | None, Collection[str]]) -> list[Problem]:
    """Return a problem for each (option, value, choices) whose value is given and is not among the choices."""
    problems = []
    for option, value, choices in options:
        if value is not None and value not in choices:
            hint = f"give one of {', '.join(choices)}"
            problems.append(Problem(option, f"is {value!r}", hint, "bad-argument"))
    return problems


def _ask_trigger(default: str) -> str:
    from zimage_train.commands.init import answer_error

    while True:
        trigger = str(typer.prompt("Trigger word?", default=default)).strip()
        error = answer_error("--trigger", trigger)
        if error is None:
            return trigger
        typer.echo(error)


def _ask_choice(question: str, choices: list[str]) -> str:
    """Ask until the answer is one of `choices`; the first choice is the default."""
    while True:
        answer = typer.prompt(f"{question} ({', '.join(choices)})", default=choices[0])
        if answer in choices:
            return answer
        typer.echo(f"{answer!r} is not one of {', '.join(choices)}")
