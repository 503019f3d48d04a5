"""The commands that draw images: `zimage-train sample`, `compare` and `drift`."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.diffusion.prompts import read_prompt_file
from zimage_train.errors import ConfigError, Problem
from zimage_train.report.printing import print_lines, print_notes

draw_commands = typer.Typer()

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


@draw_commands.command()
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
        int, typer.Option("--count", min=1, max=10_000, help="Images of each prompt, with seeds that follow.")
    ] = 1,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=64, help="How many of one size go through the model at once.")
    ] = 1,
    budget_gb: Annotated[
        float | None,
        typer.Option("--budget-gb", min=0.01, help="Stay within so many GB. Default: the card's.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path("samples"),
) -> None:
    """Sample images with any number of LoRAs; each LoRA must match in full.

    Without --batch each image is the one that a training preview or a stock pipeline draws, to the bit on a CPU.
    """
    problems = _size_problems(width, height)
    told = [name for name, one in (("--prompt", prompt), ("--prompts", prompts), ("--from", from_)) if one]
    if not told or (from_ and len(told) > 1):
        what = "is given beside --from" if told else "is missing"
        problems.append(Problem("--prompt", what, "give prompts, or images to draw again with --from"))
    if from_ and count > 1:
        problems.append(Problem("--count", "is given beside --from", "an image is drawn again once"))
    settings = _models([model], "MODEL", variant, extras, dtype, problems)[0]
    from zimage_train.commands import lora_args
    from zimage_train.commands.sample import (
        BatchLimit,
        PromptSpec,
        SamplingOptions,
        requests_for,
        requests_of,
        said_of,
        sample_images,
    )

    asked = SamplingOptions(negative, seed, width, height, steps, guidance, count)
    wishes = [*map(PromptSpec, prompt or []), *(read_prompt_file(prompts) if prompts else [])]
    recipes = requests_of(asked, from_) if from_ else requests_for(asked, settings, wishes)
    if from_:
        print_lines(said_of(from_))
    if negative and not any(recipe.guidance > 0 for recipe in recipes):
        print_notes(["--negative is not used at guidance 0, which is Turbo's own; give --guidance"])
    loras, room = [lora_args.parse_weighted_lora(text) for text in lora or []], BatchLimit(batch, budget_gb)
    sample_images(settings, loras, recipes, room, output)


@draw_commands.command()
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
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for grid, page, images.")] = Path("compare"),
) -> None:
    """Put runs or LoRAs side by side: one labelled grid, and one page with a slider and zoom.

    Runs alone are compared by the previews that they have. With --prompt, or with a LoRA file, images are drawn: a
    run then stands for its LoRA.
    """
    drawing = {"--strength": strength, "--sampling": sampling, "--model": model, "--negative": negative, "--seed": seed}
    drawing |= {"--width": width, "--height": height, "--extras": extras}
    drawing |= {"--variant": None if variant == "turbo" else variant, "--dtype": None if dtype == "bf16" else dtype}
    given = [name for name, value in drawing.items() if value is not None]
    has_files = any(path.is_file() for path in inputs)
    if not prompt and not given and not has_files:
        from zimage_train.commands.compare import compare_runs

        print_lines(compare_runs(inputs, by, output))
        return
    problems = _size_problems(width, height)
    if not prompt:
        why = "LoRA files have no images to compare" if has_files else f"{given[0]} is for drawing"
        problems.append(Problem("--prompt", f"is missing, and {why}", "say what to draw, or give run folders alone"))
    models = _models(model or ["turbo"], "--model", variant, extras, dtype, problems)
    from zimage_train.commands import draw

    asked = draw.SamplingOptions(negative, seed, width, height, None, None)
    strengths, samplings = draw.parse_strengths(strength or "0,1"), draw.parse_samplings(sampling) if sampling else []
    wanted = draw.GridSpec(models, draw.lora_files(inputs), strengths, samplings, prompt or [], asked)
    print_lines(draw.draw_grid(wanted, by, output))


@draw_commands.command()
def drift(
    model: Annotated[str, typer.Argument(help="turbo, a hub id, a diffusers folder or a .safetensors, of Turbo.")],
    lora: Annotated[list[str], typer.Option("--lora", metavar="FILE[=WEIGHT]", help="Repeatable.", show_default=False)],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Nothing of the concept. Repeatable. Default: four of the trainer's own."),
    ] = None,
    prompts: PromptFile = None,
    seed: Seed = None,
    width: Width = None,
    height: Height = None,
    extras: Extras = None,
    dtype: Dtype = "bf16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for grid, page, images.")] = Path("drift"),
) -> None:
    """Tell whether a LoRA leaves Turbo its 8 steps: its velocity on Turbo's own way, and images at 8 and 30 steps.

    Needs no images to hold them against. Prompts should have nothing to do with what the LoRA was trained for.
    """
    problems = _size_problems(width, height)
    if model in VARIANTS and model != "turbo":
        problems.append(Problem("MODEL", f"is {model}, which has no 8 steps to lose", "give turbo"))
    settings = _models([model], "MODEL", "turbo", extras, dtype, problems)[0]
    from zimage_train.commands import lora_args, sample
    from zimage_train.commands.drift import drift_report

    asked = sample.SamplingOptions(None, seed, width, height, None, None)
    wishes = [*map(sample.PromptSpec, prompt or []), *(read_prompt_file(prompts) if prompts else [])]
    print_lines(drift_report(settings, [lora_args.parse_weighted_lora(text) for text in lora], wishes, asked, output))


def _size_problems(width: int | None, height: int | None) -> list[Problem]:
    sizes = (("width", width), ("height", height))
    return [
        Problem(f"--{name}", f"is {value}", "give a multiple of 16")
        for name, value in sizes
        if value is not None and value % 16
    ]


def _models(
    names: list[str], where: str, variant: str, extras: str | None, dtype: str, problems: list[Problem]
) -> list[ModelSettings]:
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
        ModelSettings.model_validate(
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
