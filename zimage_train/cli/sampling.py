"""The commands that draw images: `zimage-train sample`, `compare` and `drift`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from zimage_train.config.schema import ModelSettings
from zimage_train.config.variants import VARIANTS
from zimage_train.errors import ConfigError, Problem
from zimage_train.io.operating_system import is_too_long
from zimage_train.report.printing import print_lines, print_notes

draw_commands = typer.Typer()

Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[=WEIGHT]", help="LoRA to apply, with weight 1 by default. Repeatable."),
]
Negative = Annotated[
    str | None, typer.Option("--negative", help="Negative prompt; has an effect at a guidance above 0.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**62, help="Random seed; prompt i uses seed + i. Default: 42.")
]
Width = Annotated[int | None, typer.Option("--width", min=32, max=4096, help="Width in pixels. Default: 1024.")]
Height = Annotated[int | None, typer.Option("--height", min=32, max=4096, help="Height in pixels. Default: 1024.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="Prompt file: a prompt per line, with kohya's --n --w --h --d --s --l, which override the options here; "
        "or a YAML list.",
    ),
]
From = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        help="Draw with the prompt, size, seed and steps that this PNG of zimage-train, A1111, Forge or ComfyUI "
        "contains; other options override them. Repeatable.",
    ),
]
Variant = Annotated[
    str, typer.Option("--variant", help="Variant of a model given as path or hub id: turbo, deturbo or base.")
]
Extras = Annotated[str | None, typer.Option("--extras", help="Folder or hub id of the text encoder and the VAE.")]
TextEncoder = Annotated[
    str | None, typer.Option("--text-encoder", help="Text encoder instead: hub id, folder or .safetensors.")
]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer instead: hub id or folder.")]
Vae = Annotated[str | None, typer.Option("--vae", help="VAE instead: hub id, folder or .safetensors.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Precision of the model: bf16 or fp32.")]


@dataclass(frozen=True)
class ModelParts:
    """Where the parts of a model besides its transformer come from, as the settings of `model` of the same names."""

    extras: str | None
    text_encoder: str | None
    tokenizer: str | None
    vae: str | None


@draw_commands.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="turbo, deturbo, base, a hub id, a diffusers folder or a .safetensors."),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Prompt to draw. Repeatable.")] = None,
    prompts: PromptFile = None,
    from_: From = None,
    lora: Lora = None,
    negative: Negative = None,
    seed: Seed = None,
    width: Width = None,
    height: Height = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=1000, help="Sampling steps. Default: as the variant needs.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            min=0.0,
            help="Guidance g; the usual CFG scale is g + 1. Default: as the variant needs.",
            show_default=False,
        ),
    ] = None,
    variant: Variant = "turbo",
    extras: Extras = None,
    text_encoder: TextEncoder = None,
    tokenizer: Tokenizer = None,
    vae: Vae = None,
    dtype: Dtype = "bf16",
    count: Annotated[
        int, typer.Option("--count", min=1, max=10_000, help="Number of images of each prompt, with successive seeds.")
    ] = 1,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=64, help="Number of images of equal size to draw at once.")
    ] = 1,
    budget_gb: Annotated[
        float | None,
        typer.Option(
            "--budget-gb", min=0.01, help="Memory limit in GB. Default: what the GPU has.", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path("samples"),
) -> None:
    """Draw images with a model and any number of LoRAs.

    All modules of a LoRA must match the model. Unless --batch is above 1, an image equals the training preview, and the
    image of diffusers' pipeline, with the same settings; on a CPU bit for bit.
    """
    problems = _size_problems(width, height)
    problems += _prompt_source_problems(has_prompts=bool(prompt or prompts), has_images=bool(from_), count=count)
    parts = ModelParts(extras, text_encoder, tokenizer, vae)
    settings = _parse_models([model], "MODEL", variant, parts, dtype, problems)[0]
    from zimage_train.commands import lora_args
    from zimage_train.commands.prompt_sources import prompt_specs
    from zimage_train.commands.sample import BatchLimit, SamplingOptions, requests_for, sample_images
    from zimage_train.commands.sample_from import requests_from_images

    options = SamplingOptions(negative, seed, width, height, steps, guidance, count)
    loras = [lora_args.parse_weighted_lora(text) for text in lora or []]
    if from_:
        requests, notes = requests_from_images(options, settings, from_)
        print_lines(notes)
    else:
        specs = prompt_specs(prompt or [], prompts, [weighted.path for weighted in loras])
        requests = requests_for(options, settings, specs)
    if negative and not any(request.guidance > 0 for request in requests):
        print_notes(["--negative has no effect at guidance 0, which is Turbo's default; give --guidance"])
    sample_images(settings, loras, requests, BatchLimit(batch, budget_gb), output)


DRAWING_OPTIONS = (
    *("strength", "sampling", "model", "negative", "seed", "width", "height"),
    *("extras", "text_encoder", "tokenizer", "vae", "variant", "dtype"),
)
"""Options of `compare` that have no effect on previews, which are drawn already."""


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@draw_commands.command()
def compare(
    context: typer.Context,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_LORA", help="Run folders, folders of a sweep, or LoRA files.", show_default=False
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="What differs between columns: run, step, prompt, model, LoRA, strength, sampling, or a setting.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt to draw with every LoRA. Repeatable.")
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option("--strength", help="Weights to apply each LoRA with; 0 is the model without it. Default: 0,1."),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            "--sampling",
            metavar="STEPS:G,...",
            help="Steps and guidance g to draw with, e.g. 8:0,30:1. Default: as the variant needs.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Model to draw on, as for sample. Default: turbo. Repeatable.", show_default=False
        ),
    ] = None,
    negative: Negative = None,
    seed: Seed = None,
    width: Width = None,
    height: Height = None,
    variant: Variant = "turbo",
    extras: Extras = None,
    text_encoder: TextEncoder = None,
    tokenizer: Tokenizer = None,
    vae: Vae = None,
    dtype: Dtype = "bf16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for grid, page and images.")] = Path("compare"),
) -> None:
    """Compare runs or LoRAs in a labelled grid of images, and on an HTML page with a slider and zoom.

    Run folders alone are compared by their previews. With --prompt, or with a LoRA file, images are drawn, and a run
    stands for its LoRA.
    """
    given = [f"--{name.replace('_', '-')}" for name in DRAWING_OPTIONS if _is_given(context, name)]
    has_files = any(path.is_file() for path in inputs)
    if not prompt and not given and not has_files:
        from zimage_train.commands.compare import compare_runs

        print_lines(compare_runs(inputs, by, output))
        return
    problems = _size_problems(width, height)
    if not prompt:
        reason = "LoRA files contain no images to compare" if has_files else f"{given[0]} is only for drawing"
        hint = "say what to draw, or give run folders alone"
        problems.append(Problem("--prompt", f"is missing, and {reason}", hint, "missing-argument"))
    parts = ModelParts(extras, text_encoder, tokenizer, vae)
    models = _parse_models(model or ["turbo"], "--model", variant, parts, dtype, problems)
    from zimage_train.commands import draw
    from zimage_train.commands.prompt_sources import prompt_specs
    from zimage_train.commands.sample import SamplingOptions

    loras = draw.lora_files(inputs)
    grid = draw.GridSpec(
        models=models,
        loras=loras,
        strengths=draw.parse_strengths(strength or "0,1"),
        samplings=draw.parse_samplings(sampling) if sampling else [],
        prompts=[spec.prompt for spec in prompt_specs(prompt or [], None, loras)],
        options=SamplingOptions(negative, seed, width, height, None, None),
    )
    print_lines(draw.draw_grid(grid, by, output))


@draw_commands.command()
def drift(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="turbo, or a hub id, diffusers folder or .safetensors of Turbo.")
    ],
    lora: Annotated[
        list[str],
        typer.Option(
            "--lora",
            metavar="FILE[=WEIGHT]",
            help="LoRA to measure, with weight 1 by default. If repeated, they are applied together.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="Prompt without the concept of the LoRA. Repeatable. Default: four built-in prompts."
        ),
    ] = None,
    prompts: PromptFile = None,
    seed: Seed = None,
    width: Width = None,
    height: Height = None,
    extras: Extras = None,
    text_encoder: TextEncoder = None,
    tokenizer: Tokenizer = None,
    vae: Vae = None,
    dtype: Dtype = "bf16",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for grid, page and images.")] = Path("drift"),
) -> None:
    """Measure how far a LoRA has drifted from Turbo's 8 steps.

    Compares the velocity with and without the LoRA on Turbo's own trajectories, and draws images with 8 and with 30
    steps. It needs no reference images. The prompts should have nothing to do with what the LoRA was trained for.
    """
    problems = _size_problems(width, height)
    if model in VARIANTS and model != "turbo":
        problems.append(Problem("MODEL", f"is {model}, which needs more than 8 steps", "give turbo", "bad-argument"))
    parts = ModelParts(extras, text_encoder, tokenizer, vae)
    settings = _parse_models([model], "MODEL", "turbo", parts, dtype, problems)[0]
    from zimage_train.commands import lora_args
    from zimage_train.commands.drift import drift_report
    from zimage_train.commands.prompt_sources import prompt_specs
    from zimage_train.commands.sample import SamplingOptions

    options = SamplingOptions(None, seed, width, height, None, None)
    loras = [lora_args.parse_weighted_lora(text) for text in lora]
    specs = prompt_specs(prompt or [], prompts, [weighted.path for weighted in loras])
    print_lines(drift_report(settings, loras, specs, options, output))


def _prompt_source_problems(has_prompts: bool, has_images: bool, count: int) -> list[Problem]:
    """Return the problems of the prompts and the images (`--from`) that say what `sample` draws."""
    problems: list[Problem] = []
    if has_prompts and has_images:
        what = "cannot be combined with --from, whose images have prompts"
        problems.append(Problem("--prompt", what, "give either prompts or --from", "conflicting-arguments"))
    elif not has_prompts and not has_images:
        hint = "say what to draw, or give images to draw again with --from"
        problems.append(Problem("--prompt", "is missing", hint, "missing-argument"))
    if has_images and count > 1:
        what = "cannot be combined with --from, which draws each image once"
        problems.append(Problem("--count", what, "leave out --count", "conflicting-arguments"))
    return problems


def _size_problems(width: int | None, height: int | None) -> list[Problem]:
    problems = []
    for option, pixels in (("--width", width), ("--height", height)):
        if pixels is not None and pixels % 16:
            problems.append(Problem(option, f"is {pixels}", "give a multiple of 16", "bad-argument"))
    return problems


def _parse_models(
    names: list[str], where: str, variant: str, parts: ModelParts, dtype: str, problems: list[Problem]
) -> list[ModelSettings]:
    """Return the settings of the models `names`, with the options that apply to all of them.

    Args:
        where: the argument or option that gave the names.
        problems: earlier problems of the command line, to be listed together with new problems.

    Raises:
        ConfigError: lists `problems` and those of the models.
    """
    problems = list(problems)
    if not all(names):
        hint = "give turbo, deturbo, base, a hub id, a folder or a .safetensors"
        problems.append(Problem(where, "is empty", hint, "bad-argument"))
    if len(set(names)) < len(names):
        problems.append(Problem(where, "is given twice with the same value", "give it once", "set-twice"))
    if variant not in VARIANTS:
        problems.append(Problem("--variant", f"is {variant!r}", f"give one of {', '.join(VARIANTS)}", "bad-argument"))
    places = {f"--{part.replace('_', '-')}": source for part, source in asdict(parts).items()}
    for option, source in places.items():
        if source == "":
            problems.append(Problem(option, "is empty", "give a folder or hub id, or leave it out", "bad-argument"))
    given = [(where, name) for name in names]
    for place, name in (*given, *places.items()):
        if name is not None and is_too_long(name):
            problems.append(Problem(place, f"{name[:40]}... is too long for a path", "check the path", "too-long"))
    if dtype not in ("bf16", "fp32"):
        problems.append(Problem("--dtype", f"is {dtype!r}", "give bf16 or fp32", "bad-argument"))
    if problems:
        raise ConfigError(*problems)
    models = []
    for name in names:
        is_variant = name in VARIANTS
        values = {"variant": name if is_variant else variant, "path": None if is_variant else name}
        models.append(ModelSettings.model_validate({**values, **asdict(parts), "adapter": None, "dtype": dtype}))
    return models
