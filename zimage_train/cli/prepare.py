"""The commands before a training: look at images, describe them, fetch models, examine the machine."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from zimage_train.compat.formats import read_job_as_config
from zimage_train.config.templates import MODEL_TEMPLATES, SUBJECT_KINDS
from zimage_train.dataset.caption_prompts import CAPTION_STYLES
from zimage_train.errors import ConfigError, Problem
from zimage_train.io import atomic
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.report.printing import JSON_OUTPUT, print_lines, print_notes

start_commands = typer.Typer(rich_markup_mode=None)

CAPTIONER = "Qwen/Qwen3-VL-4B-Instruct"

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="The YAML or JSON file.", show_default=False)]
FolderPath = Annotated[Path, typer.Argument(metavar="FOLDER", help="The images.", show_default=False)]


@start_commands.command()
def init(
    folder: FolderPath,
    kind: Annotated[str | None, typer.Option("--kind", help=f"{', '.join(SUBJECT_KINDS)}.", show_default=False)] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help=f"{', '.join(MODEL_TEMPLATES)}.", show_default=False)
    ] = None,
    trigger: Annotated[
        str | None, typer.Option("--trigger", help="The word that comes to mean what is taught.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for this card (4090, 4060, h100, ...), not the one here.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run. Default: after the folder.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CONFIG", help="The file to write. Default: NAME.yaml.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is most usual.")] = False,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="To try it in a minute: on the model of a few MB, without a GPU.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a config that is there.")] = False,
) -> None:
    """Look at a folder of images, and write a config for it with the reasons beside each setting."""
    problems = [
        Problem(option, f"is {value!r}", f"give one of {', '.join(known)}")
        for option, value, known in (("--kind", kind, SUBJECT_KINDS), ("--variant", variant, MODEL_TEMPLATES))
        if value is not None and value not in known
    ]
    if miniature:
        model = ("--variant", variant, "it is a Turbo"), ("--gpu", gpu, "it needs none")
        given = [(option, f"is given beside --miniature: {why}") for option, value, why in model if value]
        problems += [Problem(option, what, "leave one of them out") for option, what in given]
    from zimage_train.commands.init import (
        Answers,
        advise_for,
        answer_error,
        describe_folder,
        likely_trigger,
        local_gpu,
        name_of,
        require_place,
        summarize_folder,
        template_values_for,
        write_config_file,
    )
    from zimage_train.planning import gpus
    from zimage_train.report.console import Console

    for option, value in (("--trigger", trigger), ("--name", name)):
        if value is not None and (why := answer_error(option, value)):
            problems.append(Problem(option, why))
    if problems:
        raise ConfigError(*problems)
    if gpu is not None:
        gpus.get_gpu(gpu)
    run = name or name_of(folder, output)
    path = output or Path(f"{run}.yaml")
    require_place(path, force)
    console = Console.progress_only()
    with console.live_progress():
        seen = summarize_folder(folder, console.progress)
    print_lines([*describe_folder(seen), ""])
    asks = not yes and not JSON_OUTPUT.get() and sys.stdin is not None and sys.stdin.isatty()
    kind = kind or (_asked("What do they show?", list(SUBJECT_KINDS)) if asks else "character")
    variant = variant or (_asked("Which model?", list(MODEL_TEMPLATES)) if asks and not miniature else "turbo")
    usual = likely_trigger(seen.captions, seen.kohya) or SUBJECT_KINDS[kind].trigger
    trigger = trigger or (_asked_trigger(usual) if asks else usual)
    if asks and not miniature and gpu is None and local_gpu() is None:
        gpu = _asked("Which card will train?", ["4090", *(card for card in GPU_SPECS if card != "4090")])
    answers = Answers(kind, variant, trigger, gpu)
    own = template_values_for(seen, answers, run, miniature)
    said = advise_for(seen, answers.kind, miniature) + ([] if asks else [f"trigger: {trigger}"])
    print_lines([*said, *write_config_file(path, own, answers, seen.problems)])


@start_commands.command()
def caption(
    folder: FolderPath,
    model: Annotated[
        str, typer.Option("--model", help="A vision-language model: a folder, or its name on the hub.")
    ] = CAPTIONER,
    style: Annotated[str, typer.Option("--style", help=f"{', '.join(CAPTION_STYLES)}.")] = "sentences",
    kind: Annotated[
        str | None,
        typer.Option("--kind", help=f"{', '.join(SUBJECT_KINDS)}: captions leave out what is to be learned."),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option("--trigger", help="A word that every caption shall have; training adds its own.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="What to ask the model, instead of the style's own text.")
    ] = None,
    extension: Annotated[str, typer.Option("--extension", help="Of the caption files.")] = ".txt",
    force: Annotated[bool, typer.Option("--force", help="Write over captions that are there.")] = False,
) -> None:
    """Describe every image that has no caption, with a model on this machine; the same command goes on."""
    problems = [
        Problem(option, f"is {value!r}", f"give one of {', '.join(known)}")
        for option, value, known in (("--kind", kind, SUBJECT_KINDS), ("--style", style, CAPTION_STYLES))
        if value is not None and value not in known
    ]
    for option, value in (("--trigger", trigger), ("--instruction", instruction)):
        if value is not None and not value.strip():
            problems.append(Problem(option, "is empty", "give a text, or leave the option out"))
    from zimage_train.commands.init import answer_error
    from zimage_train.dataset.images import EXTENSIONS

    if trigger is not None and trigger.strip() and (why := answer_error("--trigger", trigger.strip())):
        problems.append(Problem("--trigger", why))
    if not re.fullmatch(r"\.[A-Za-z0-9_.]+", extension) or extension.lower().endswith(tuple(EXTENSIONS)):
        problems.append(Problem("--extension", f"is {extension!r}", "give one such as .txt"))
    if problems:
        raise ConfigError(*problems)
    from zimage_train.commands.caption import CaptionOptions, caption_folder
    from zimage_train.report.console import Console

    wanted = CaptionOptions(model, style, kind, trigger and trigger.strip(), instruction, extension, force)
    print_lines(caption_folder(folder, wanted, Console()))


@start_commands.command()
def doctor() -> None:
    """Say whether this machine can train, what is in the way, and what to do; asks nobody on the network."""
    from zimage_train.commands.doctor import doctor_report, gather_facts

    lines, can_train = doctor_report(gather_facts())
    print_lines(lines)
    if not can_train:
        raise typer.Exit(2)


@start_commands.command()
def download(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file, or turbo, deturbo or base.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=YAML", help="Override a setting. Repeatable.")
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option("--wait", metavar="MINUTES", help="Let another machine bring it into the same HF_HOME.", min=0),
    ] = None,
) -> None:
    """Fetch everything that a config reads from the hub, and compare it with the hub's digests.

    Says first how much it is; goes on where it was stopped. For a machine without a GPU that fills a shared disk.
    """
    from zimage_train.config import load
    from zimage_train.config.schema import ModelSettings

    if config in MODEL_TEMPLATES and set_:
        raise ConfigError(Problem("--set", f"is given beside {config}", "give a config"))
    settings = None if config in MODEL_TEMPLATES else load.read_config(Path(config), set_ or [])
    from zimage_train.commands.download import download_models
    from zimage_train.report.console import Console

    model = settings.model if settings else ModelSettings.model_validate({"variant": config})
    also = settings.sample.compare_on if settings else None
    print_lines(download_models(model, also, Console(), wait))


@start_commands.command("import")
def import_(
    job: JobPath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="CONFIG", help="The file to write. Default: the terminal.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write the config that a job of AI Toolkit becomes, with every setting.

    Keys that cannot be honoured are refused, all at once; what else is worth knowing is said line by line.
    """
    from zimage_train.compat.aitoolkit.convert import write_config

    settings, notes = read_job_as_config(job)
    if output is not None and output.exists() and not force:
        raise ConfigError(Problem(str(output), "exists", "give another name, or --force"))
    if output is not None and output.exists() and output.samefile(job):
        raise ConfigError(Problem(str(output), "is the job itself", "give another name"))
    text = write_config(settings, notes, job)
    print_notes(notes)
    if output is None:
        print_lines([text.rstrip()])
    else:
        atomic.write_text(output, text)


def _asked_trigger(usual: str) -> str:
    from zimage_train.commands.init import answer_error

    trigger = ""
    while why := answer_error("--trigger", trigger):
        if trigger:
            typer.echo(why)
        trigger = str(typer.prompt("Which word shall stand for it?", default=usual)).strip()
    return trigger


def _asked(question: str, choices: list[str]) -> str:
    while (answer := typer.prompt(f"{question} ({', '.join(choices)})", default=choices[0])) not in choices:
        typer.echo(f"{answer!r} is none of {', '.join(choices)}")
    return answer
