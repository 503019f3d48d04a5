"""The prompts that a command draws: those of its options and prompt files, with the trigger of its LoRAs inserted."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zimage_train.config import triggers
from zimage_train.config.prompt_flags import flag_in
from zimage_train.diffusion.prompts import PromptSpec, read_prompt_file
from zimage_train.errors import Argument, ConfigError, Location, Problem, ZImageTrainError, collect_errors, raise_all
from zimage_train.io.safetensors_format import read_header
from zimage_train.lora.metadata import triggers_of
from zimage_train.models import locate

PROMPT = Location(argument=Argument("--prompt"))


def prompt_specs(prompts: Sequence[str], file: Path | None, loras: Sequence[Path]) -> list[PromptSpec]:
    """Return the prompts of `--prompt` and of the file of `--prompts`.

    A placeholder, such as `[trigger]`, becomes the trigger that the metadata of `loras` names.

    Raises:
        ConfigError: the file is no prompt file, a prompt of `--prompt` has flags, or a placeholder has no trigger.
    """
    errors: list[ZImageTrainError] = []
    specs: list[PromptSpec] = []
    for prompt in prompts:
        with collect_errors(errors):
            specs.append(PromptSpec(_without_flags(prompt), location=PROMPT))
    if file is not None:
        with collect_errors(errors):
            specs += read_prompt_file(file)
    raise_all(errors)
    return _insert_trigger(specs, loras)


def _without_flags(prompt: str) -> str:
    """Return the prompt if it has no flags.

    Raises:
        ConfigError: it has.
    """
    flag = flag_in(prompt)
    if flag is not None:
        hint = "give options such as --width 512, or the prompt with its flags in a file of --prompts"
        what = f"has {flag.text}, which would be words of the prompt"
        raise ConfigError(Problem(PROMPT, what, hint, "bad-value"))
    return prompt


def _insert_trigger(specs: Sequence[PromptSpec], loras: Sequence[Path]) -> list[PromptSpec]:
    if not any(triggers.placeholder_in(text) for spec in specs for text in _texts(spec)):
        return list(specs)
    known: list[str] = []
    for path in loras:
        # A LoRA that cannot be read, or is still to be downloaded, is an error or not where it is used.
        with collect_errors([]):
            known += triggers_of(read_header(locate.lora_in(path)).metadata)
    known = list(dict.fromkeys(known))
    if len(known) == 1:
        return [_with_trigger(spec, known[0]) for spec in specs]
    found = f"the LoRAs have several triggers ({', '.join(known)})" if known else "no LoRA names a trigger"
    problems: list[Problem] = []
    for spec in specs:
        placeholder = next(filter(None, map(triggers.placeholder_in, _texts(spec))), None)
        if placeholder is not None:
            where = spec.location or PROMPT
            problems.append(Problem(where, f"has {placeholder}, and {found}", "write the word itself", "no-trigger"))
    raise ConfigError(*problems)


def _texts(spec: PromptSpec) -> list[str]:
    return [spec.prompt, spec.overrides.get("negative", "")]


def _with_trigger(spec: PromptSpec, trigger: str) -> PromptSpec:
    overrides = dict(spec.overrides)
    if "negative" in overrides:
        overrides["negative"] = triggers.fill_placeholders(overrides["negative"], trigger)
    return replace(spec, prompt=triggers.fill_placeholders(spec.prompt, trigger), overrides=overrides)
