"""Write the files that follow from the code: configs, their schema and reference, and the reference of the commands.

python scripts/generate.py           write the files that are stale
python scripts/generate.py --check   write nothing; exit with 1 if a file is stale
"""

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from zimage_train.cli import app
from zimage_train.compat.aitoolkit import keys
from zimage_train.compat.aitoolkit.rules import OFF, HandledHere, Mapped, Row, WithoutEffect
from zimage_train.config import strict_yaml, templates
from zimage_train.config.sample import ExtraLora, PreviewPrompt
from zimage_train.config.schema import Config
from zimage_train.dataset.buckets import Bucket
from zimage_train.diffusion.request import SamplingRequest
from zimage_train.lora import targets
from zimage_train.models.arch import TransformerShape
from zimage_train.planning.gpus import GPU_SPECS
from zimage_train.planning.memory import host_bytes
from zimage_train.planning.planner import MemoryPlan, PlanConstraints, choose_plan
from zimage_train.planning.recompute_costs import describe_mode
from zimage_train.planning.workload import Workload, caption_tokens
from zimage_train.report import printing

from proofs.page import proof_md

ROOT = Path(__file__).parent.parent

EXAMPLE = Config.model_validate({"name": "my_lora", "data": [{"folder": "photos"}]})
"""The config that the reference shows: defaults, and examples of the two settings that have none."""

HEAD = """\
# yaml-language-server: $schema=schema.json
# Every setting with its default, except for name and data.0.folder, which every config gives itself.
# A config needs only what it changes; configs/quickstart.yaml is a start. Written by scripts/generate.py.

"""


def schema_json() -> str:
    """Return the JSON schema of a config, with which editors complete and check YAML."""
    schema = _tidy(Config.model_json_schema())
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "zimage-train config"}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """Return a schema without generated titles and defaults of whole sections, with descriptions on a single line."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    drop = {"title"} if isinstance(node.get("title"), str) else set()
    drop |= {"default"} if isinstance(node.get("default"), dict) and "$ref" in node else set()
    if isinstance(node.get("description"), str):
        node = node | {"description": _one_line(node["description"])}
    return {key: _tidy(value) for key, value in node.items() if key not in drop}


EMPTY_LISTS: dict[str, type[BaseModel]] = {"prompts": PreviewPrompt, "extra_loras": ExtraLora, "beside": ExtraLora}
"""Lists that are empty by default, so that the reference describes the fields of their entries separately."""


def reference_yaml() -> str:
    """Return a config with every setting, each below a comment that describes it."""
    return HEAD + "\n".join(_section(EXAMPLE, ""))


def _section(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines.append(f"{indent}# {_one_line(field.description or '')}")
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *_section(value, f"{indent}  ")]
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(f"{indent}{name}:")
            for entry in value:
                lines += [f"{indent}  -", *_section(entry, f"{indent}    ")]
        else:
            dumped = strict_yaml.dump({name: section.model_dump(include={name})[name]})
            lines += [indent + line for line in dumped.splitlines()]
        if name in EMPTY_LISTS:
            entries = EMPTY_LISTS[name].model_fields.items()
            fields = {key: _one_line(entry.description or "") for key, entry in entries}
            lines += [f"{indent}#   {key}: {text}" for key, text in fields.items()]
        if not indent:
            lines.append("")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def config_md() -> str:
    """Return the page of all settings with default and description, in a table for each section."""
    lines = ["# Every setting", "", f"{NOTICE} A config names what it changes; the rest has these defaults.", ""]
    lines += _table(EXAMPLE, "", "the run")
    return "\n".join(lines) + "\n"


def _table(section: BaseModel, prefix: str, title: str) -> list[str]:
    rows: list[str] = []
    below: list[str] = []
    for name, field in type(section).model_fields.items():
        value, text = getattr(section, name), _one_line(field.description or "")
        nested = value[0] if isinstance(value, list) and value and isinstance(value[0], BaseModel) else value
        if isinstance(nested, BaseModel):
            path = f"{prefix}{name}" + (".N" if isinstance(value, list) else "")
            below += _table(nested, f"{path}.", f"`{path}`: {text[0].lower()}{text[1:]}")
        else:
            default = json.dumps(section.model_dump(mode="json", include={name})[name])
            must = " (required)" if field.is_required() else ""
            rows.append(f"| `{prefix}{name}` | `{default}`{must} | {text.replace('|', '/')} |")
    head = [f"## {title[0].upper()}{title[1:]}" if prefix == "" else f"## {title}", ""]
    return [*head, "| setting | default | what it does |", "|---|---|---|", *rows, "", *below]


def cli_md() -> str:
    """Return the page of all commands, with the output of `--help` of each."""
    events = inspect.cleandoc(printing.__doc__ or "").partition("\n\n")[2]
    machines = f"`zimage-train --json train CONFIG`, and so with every command: {events[0].lower()}{events[1:]}"
    commands = _commands(get_command(app.app))
    lines = ["# Every command", "", NOTICE, "", "| command | what it does |", "|---|---|"]
    for words, command in commands:
        anchor = "-".join(["zimage-train", *words])
        lines.append(f"| [`{' '.join(words)}`](#{anchor}) | {_first_sentence(command.help or '')} |")
    lines += ["", machines, ""]
    for words, _ in commands:
        shown = CliRunner().invoke(app.app, [*words, "--help"], env={"COLUMNS": "110", "TERMINAL_WIDTH": "110"})
        text = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
        text = re.sub(r"^Usage: \S+", "Usage: zimage-train", text)
        lines += [f"## zimage-train {' '.join(words)}", "", "```text", text, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: Any) -> list[tuple[list[str], Any]]:
    """Return every command of a group with the words that call it."""
    found: list[tuple[list[str], Any]] = []
    for name, command in group.commands.items():
        inner = _commands(command) if hasattr(command, "commands") else [([], command)]
        found += [([name, *rest], command) for rest, command in inner]
    return found


def _first_sentence(text: str) -> str:
    return _one_line(inspect.cleandoc(text).partition("\n\n")[0]).replace("|", "/")


AITOOLKIT_TABLE = "## Every key"


def aitoolkit_md() -> str:
    """Return the page about AI Toolkit's jobs: its text unchanged, and the tables of keys."""
    text = (ROOT / "docs/aitoolkit.md").read_text(encoding="utf-8").partition(AITOOLKIT_TABLE)[0]
    lines = [text + AITOOLKIT_TABLE, "", f"{NOTICE} Keys stand below `config.process`; `[]` is each entry of a list."]
    sections = {key: key.rpartition(".")[0] for key in keys.KEYS}
    for section in dict.fromkeys(sections.values()):
        title = f"`{section}`" if section else "The job"
        lines += ["", f"### {title}", "", "| key | default there | here |", "|---|---|---|"]
        for key in (key for key in keys.KEYS if sections[key] == section):
            row = keys.KEYS[key]
            default = f"`{json.dumps(row.default)}`" if isinstance(row, Mapped) and row.default is not None else ""
            lines.append(f"| `{key}` | {default} | {_fate(row)} |")
    lines += ["", "### Flags of prompts", "", "| flag | here |", "|---|---|"]
    lines += [f"| `--{flag}` | {_fate(keys.KEYS[f'sample.samples[].{name}'])} |" for flag, name in keys.FLAGS.items()]
    lines += [f"| `--{flag}` | left out: {why} |" for flag, why in keys.FLAGS_LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def _fate(row: Row) -> str:
    """Return what happens to a key of AI Toolkit, as a cell of the table."""
    if isinstance(row, Mapped):
        to = ", ".join(f"`{name}`" for name in filter(None, row.to.split(", ")))
        return ": ".join(filter(None, [to, row.remark.replace("|", "/")]))
    if isinstance(row, WithoutEffect):
        return f"no effect there either: {row.why}"
    if isinstance(row, HandledHere):
        return f"left out: {row.why}"
    passing = [] if row.neutral == OFF else [f"`{json.dumps(value)}`" for value in row.neutral]
    return f"refused, but for {', '.join(passing)}: {row.why}" if passing else f"refused: {row.why}; {row.hint}"


FITS = "**Predicted**, not measured"
"""Beginning of the README's line on GPUs."""


def readme() -> str:
    """Return the README with its line on the GPUs that a run fits."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(rf"^{re.escape(FITS)}.*$", lambda _: budget_line(), text, count=1, flags=re.MULTILINE)


def memory_md() -> str:
    """Return the page about memory with its table of GPUs."""
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    return re.sub(r"\| GPU memory \|.*?\n\n", lambda _: budget_table() + "\n\n", text, flags=re.DOTALL)


BUDGETS = {24: "4090", 16: "4080", 12: "4070", 8: "4060"}
"""Memory in GB, and the GPU whose data sheet times are predicted from."""
MAIN_MEMORY = 32e9
CAPTION = "a photo of zchar in a sunlit garden, half body, warm light, shallow depth of field"
SIDES = (512, 768, 1024)


def plan_for(budget_gb: int) -> MemoryPlan:
    """Return the plan for a character LoRA of rank 16 at three resolutions, in bf16, with 32 GB of main memory."""
    shape = TransformerShape()
    modules = targets.select_modules(["attention", "feed_forward"], shape.linears)
    preview = SamplingRequest(
        prompt=CAPTION, negative="", seed=1, width=1024, height=1024, steps=8, guidance=0.0, shift=3.0
    )
    workload = Workload(
        shape=shape,
        dtype="bf16",
        trained=16 * sum(sum(shape.linears[module]) for module in modules),
        optimizer="adamw8bit",
        sizes=Counter({Bucket(side, side): 20 for side in SIDES}),
        batch_size=1,
        caption_tokens=caption_tokens(CAPTION),
        previews=(preview,),
        gpu=True,
    )
    return choose_plan(
        workload, PlanConstraints((None,), None, None), budget_gb * 1e9, MAIN_MEMORY, GPU_SPECS[BUDGETS[budget_gb]]
    )


def budget_yaml(budget_gb: int) -> str:
    """Return configs/turbo_character.yaml with a memory budget, and the plan for it as comments."""
    plan = plan_for(budget_gb)
    streamed, layers = plan.placement.streamed, plan.workload.shape.n_layers
    held = (
        f"{streamed} of {layers} blocks wait in main memory ({host_bytes(plan.workload, plan.placement) / 1e9:.1f} GB)"
    )
    modes = {side: plan.mode_of(plan.workload.tokens(Bucket(side, side))) for side in SIDES}
    head = [
        f"# A person or character on Z-Image-Turbo with {budget_gb} GB of GPU memory; images, captions: photos/.",
        f"# The planner predicts {plan.peak.total / 1e9:.1f} GB at the most. zimage-train check says what it",
        "# chooses for your images, card and main memory; here:",
        f"#   weights   bf16, {held if streamed else 'all on the card'}",
        *(f"#   {side:4} px   {describe_mode(mode)} recomputed" for side, mode in modes.items()),
        "# Written by scripts/generate.py.",
    ]
    text = templates.render_template("turbo", "character")
    body = text[text.index("name: ") :].replace("name: my_character", f"name: my_character_{budget_gb}gb", 1)
    memory = ["memory:", f"  budget_gb: {budget_gb}"]
    return "\n".join([*head, body.rstrip(), *memory, ""])


def budget_table() -> str:
    """Return the table of budgets in docs/memory.md."""
    rows = ["| GPU memory | weights | 512 px | 768 px | 1024 px | peak |", "|---|---|---|---|---|---|"]
    for budget_gb, name in BUDGETS.items():
        plan, card = plan_for(budget_gb), GPU_SPECS[name]
        weights = f"bf16, {plan.placement.streamed} of 30 blocks streamed" if plan.placement.streamed else "bf16"
        cells = []
        for side in SIDES:
            size = Bucket(side, side)
            cells.append(f"{plan.step_seconds(size, card):.1f} s, {plan.mode_of(plan.workload.tokens(size))}")
        rows.append(f"| {budget_gb} GB ({name}) | {weights} | {' | '.join(cells)} | {plan.peak.total / 1e9:.1f} GB |")
    return "\n".join(rows)


def budget_line() -> str:
    """Return the README's line on the GPUs that a run fits."""
    size = Bucket(SIDES[-1], SIDES[-1])
    cards = [
        f"{budget_gb} GB ({name}, {plan_for(budget_gb).step_seconds(size, GPU_SPECS[name]):.1f} s a step)"
        for budget_gb, name in BUDGETS.items()
        if plan_for(budget_gb).fits
    ]
    fits = f"rank 16 at {SIDES[-1]} px fits {', '.join(cards)} with {MAIN_MEMORY / 1e9:.0f} GB of RAM"
    measured = "Steps measured on an H100 took 0.6 to 1.6 times as long as predicted."
    return f"{FITS}: {fits} ([details](docs/memory.md)). {measured}"


NOTICE = "Written by `scripts/generate.py` from the code; a test keeps it so."

GENERATED: dict[str, Callable[[], str]] = {
    "configs/schema.json": schema_json,
    "configs/reference.yaml": reference_yaml,
    **{
        f"configs/{base}_{kind}.yaml": partial(templates.render_template, base, kind)
        for base in templates.MODEL_TEMPLATES
        for kind in templates.SUBJECT_KINDS
    },
    **{f"configs/{budget_gb}gb.yaml": partial(budget_yaml, budget_gb) for budget_gb in BUDGETS},
    "README.md": readme,
    "docs/memory.md": memory_md,
    "docs/config.md": config_md,
    "docs/commands.md": cli_md,
    "docs/aitoolkit.md": aitoolkit_md,
    "docs/proof.md": partial(proof_md, NOTICE),
}


def stale(root: Path = ROOT) -> list[str]:
    """Return the generated files that are missing, or differ from what would be written now."""
    return [
        name
        for name, make in GENERATED.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != make()
    ]


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write the stale files, or with `--check` only print their names; return the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    names = stale(root)
    for name in names:
        if arguments:
            print(f"{name} is stale; run python scripts/generate.py")
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(GENERATED[name](), encoding="utf-8")
            print(f"wrote {name}")
    return 1 if arguments and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
