"""The architecture as a test: who may import whom, how large things may be, and what is never written here.

Every checker below works on plain text or plain tables, so that it can be shown to fail on a wrong one.
"""

import ast
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "zimage_train"

LAYERS: list[list[str]] = [
    # 0: no equations, no models, nothing but the standard library, pydantic and yaml
    [
        # packages, empty but for a docstring
        "zimage_train app config config.aitoolkit data lora mini model report sampling training",
        "errors sizes files serialize model.headers model.digests",
        "errors printing",
        "model.native",
        "errors model.shapes",
        "seeding",
        "tensors",
        "weighting",
        "config.yaml_reader",
        "model.variants config.values config.section config.data config.methods config.previews config.schema",
        "errors config.yaml_reader config.schema config.reading",
        "errors config.yaml_reader config.schema config.reading config.aitoolkit.job config.aitoolkit.convert",
        "config.aitoolkit.rows config.aitoolkit.keys config.aitoolkit.job config.aitoolkit.optimizers",
        "config.aitoolkit.keys config.aitoolkit.job config.aitoolkit.previews config.aitoolkit.convert",
        "model.variants config.aitoolkit.job config.aitoolkit.parts config.aitoolkit.convert",
        "config.aitoolkit.rows config.aitoolkit.optimizers config.aitoolkit.convert",
        "errors config.yaml_reader config.schema config.aitoolkit.convert config.variations",
        "model.variants config.methods config.schema schedules config.advice",
        "config.recipes",
    ],
    # 1: equations, pictures, names, where models are
    [
        "flow",
        "automagic optim",
        "prodigy8bit optim",
        "distributed",
        "tensorfile",
        "data.buckets data.captions data.images data.looks data.masks data.folder data.plan data.quarantine",
        "data.captions data.describing",
        "model.remote model.huggingface model.modelscope model.hub model.sources",
        "model.sources model.vision",
        "ema",
        "lora.keys lora.families lora.headers",
        "lora.names lora.rules",
        "lora.metadata lora.alphas lora.memos",
        "model.quantize model.linear model.recompute",
        "model.pinning model.sources model.weights model.stream",
        "model.linear model.quantize model.weights model.sources model.transformer model.extras model.text model.vae",
        "sampling.recipe sampling.workflow",
        "sampling.prompts",
        "report.metrics",
        "report.console",
        "mini.world mini.scores",
    ],
    # 2: what is made of them
    [
        "checkpoint",
        "data.cache data.filling",
        "lora.fused lora.files lora.attach lora.adapter",
        "lora.files lora.attach lora.swap",
        "lora.fused lora.files lora.loaders lora.anatomy",
        "lora.fused lora.files lora.layouts",
        "lora.files lora.arithmetic lora.checkpoints",
        "lora.blending",
        "measured",
        "cards prices",
        "cards memory flops planner",
        "report.template report.grid report.pictures report.change report.page",
        "report.template report.grid report.comparison",
        "report.heatmap",
        "report.trackers",
        "sampling.turbo",
    ],
    # 3: the frozen model, everything that is known before a run, what a step is
    [
        "assemble encoding",
        "assemble sampling.previews",
        "sampling.drift",
        "preflight forecast costs",
        "preflight accelerator",
        "pods",
        "training.objectives",
        "training.objectives training.own",
        "training.pace",
    ],
    # 4: the loop, and the commands
    [
        "training.stopping training.run_folder training.views training.run training.validation training.publish",
        "training.stopping training.publish training.validation training.run training.loop",
        "training.stopping training.run_folder training.views training.run training.setup",
        "training.run training.rehearsal app.train",
        "training.run_folder training.fit app.train",
        "app.given app.sample app.train",
        "app.given app.sample app.draw",
        "app.given app.merging",
        "app.given app.checkpoints",
        "training.run_folder app.compare",
        "app.sample app.compare app.draw",
        "app.given app.sample app.compare app.drift",
        "training.run_folder app.draw",
        "training.stopping training.run_folder app.train app.sweep",
        "app.compare app.sweep",
        "training.stopping app.train",
        "training.run_folder training.views app.train",
        "training.validation training.publish app.train",
        "training.loop app.train",
        "training.setup app.train",
        "app.timesteps app.lora app.check",
        "app.init app.doctor app.download app.caption",
        "training.run_folder app.compare app.workbench app.merging",
        "app.sample app.workbench app.checkpoints",
    ],
    # 5: the command line
    ["interruptible cli_draw cli_lora cli", "cli_start cli __main__"],
]
"""Layers from the bottom. A module imports from lower layers, and from those before it in a line of its own layer."""

TORCH_FREE = [
    module
    for line in (
        "zimage_train app config data lora mini model report sampling training errors sizes files serialize seeding",
        "config.yaml_reader config.values config.section config.data config.methods config.previews config.schema",
        "config.advice config.reading",
        "weighting schedules config.variations report.template report.grid report.comparison app.compare",
        "config.aitoolkit config.aitoolkit.rows config.aitoolkit.keys config.aitoolkit.job config.aitoolkit.optimizers",
        "config.aitoolkit.previews config.aitoolkit.parts config.aitoolkit.convert",
        "model.variants model.native model.hub model.headers model.shapes model.digests model.sources model.extras",
        "model.pinning model.remote model.huggingface model.modelscope",
        "data.buckets data.captions data.images data.looks data.masks data.folder data.plan data.quarantine",
        "data.describing",
        "lora.families lora.keys lora.names lora.headers lora.metadata lora.alphas lora.memos lora.rules",
        "sampling.prompts sampling.recipe sampling.workflow report.metrics report.console report.pictures",
        "report.change report.page report.heatmap report.trackers measured cards memory flops planner",
        "mini.world mini.scores preflight forecast costs prices pods app.check app.init app.doctor app.download",
        "training.stopping training.run_folder training.views",
        "config.recipes interruptible printing cli_start cli_draw cli_lora cli __main__",
    )
    for module in line.split()
]
"""Importing one of these loads none of HEAVY: what `check`, `--help` and config errors need, and what can."""

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchao", "prodigyopt"}

LATE = {
    ("__main__", PACKAGE): "a Ctrl-C while modules are imported must find its handler",
    ("cli", PACKAGE): "--help, check and config errors do not load torch",
    ("cli", "json"): "only for --json",
    ("cli_draw", PACKAGE): "as cli",
    ("cli_lora", PACKAGE): "as cli",
    ("cli_start", PACKAGE): "as cli",
    ("app.doctor", "torch"): "verdicts are made without it",
    ("app.doctor", PACKAGE): "as torch",
    ("seeding", "torch"): "keys are used without torch; only a generator needs it",
    ("model.hub", PACKAGE): "local paths never need a hub, and one hub never needs the library of the other",
    ("optim", "bitsandbytes"): "an optional dependency: works without it until it is asked for",
    ("optim", "prodigyopt"): "as bitsandbytes",
    ("optim", "transformers"): "slow to import; only adafactor needs it",
    ("optim", PACKAGE): "prodigy8bit needs bitsandbytes",
    ("model.quantize", "bitsandbytes"): "as there; only nf4 needs it",
    ("lora.blending", "peft"): "slow to import; an exact sum needs nothing of it",
    ("lora.loaders", "diffusers"): "only the check of an export needs diffusers' loader",
    ("report.trackers", "torch"): "the TensorBoard writer is slow to import and may be off",
    ("report.trackers", "wandb"): "an optional dependency: works without it until it is asked for",
    ("training.loop", "resource"): "missing on Windows",
}
"""Imports inside functions, by module and what is imported, each with its reason."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_CLASS_LINES = 400, 60, 200
LONGER_FUNCTIONS = {
    "training.loop:train": (90, "the loop is one function on one screen"),
}
BANNED_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}
ONLY_IN_FILES = {
    "os": {"replace", "rename", "renames", "fsync", "unlink", "remove", "removedirs", "rmdir", "truncate"},
    "shutil": {"rmtree", "move", "copytree"},
}
YAML_LOADERS = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all", "UnsafeLoader"}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


class Import(NamedTuple):
    """One import: the module that is imported, and the function that holds it (None: the module itself)."""

    target: str
    function: str | None
    is_typing_only: bool = False


class Finding(NamedTuple):
    """One banned construct."""

    what: str
    line: int


def modules() -> dict[str, Path]:
    """Every module of the package by its short name (`config.schema`); a package by its own name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or PACKAGE] = path
    return found


MODULES = modules()
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def imports_of(source: str, known: Iterable[str] = ()) -> list[Import]:
    """Every import in `source`, wherever it stands; ours without the package's name, `known` being our modules."""
    known = set(known)

    def short(name: str) -> str:
        return name.removeprefix(f"{PACKAGE}.")

    def names(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (short(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = short(f"{module}.{alias.name}")
                yield inner if inner in known else short(module)

    found: list[Import] = []

    def visit(node: ast.AST, function: str | None, typing_only: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = getattr(node, "name", "lambda")
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only = True
        found.extend(Import(name, function, typing_only) for name in names(node))
        for child in ast.iter_child_nodes(node):
            visit(child, function, typing_only)

    visit(ast.parse(source), None, False)
    return found


IMPORTS = {name: imports_of(source, MODULES) for name, source in SOURCES.items()}


def layer_problems(imports: dict[str, list[Import]], layers: list[list[str]]) -> list[str]:
    """Every import that the layers forbid, and every module and table entry that has no counterpart."""
    place = {module: number for number, lines in enumerate(layers) for line in lines for module in line.split()}
    problems = [f"{module} has no layer" for module in imports if module not in place]
    problems += [f"{module} is in the table and does not exist" for module in place if module not in imports]

    def allowed(module: str, target: str) -> bool:
        if place[target] != place[module]:
            return place[target] < place[module]
        orders = [line.split() for line in layers[place[module]]]
        return any(
            module in order and target in order and order.index(target) < order.index(module) for order in orders
        )

    for module, found in imports.items():
        targets = {one.target for one in found if one.target in place and one.target != module}
        problems += [
            f"{module} imports {target}"
            for target in sorted(targets)
            if module in place and not allowed(module, target)
        ]
    return problems


def heavy_by_import(module: str, imports: dict[str, list[Import]], heavy: set[str] = HEAVY) -> set[str]:
    """What of `heavy` is loaded as soon as `module` is imported, directly or through our other modules."""
    seen, todo, found = set(), [module], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for one in imports.get(current, []):
            if one.function is None and not one.is_typing_only:
                found |= {one.target.split(".")[0]} & heavy
                parents = [one.target.rsplit(".", depth)[0] for depth in range(1, one.target.count(".") + 1)]
                todo += [name for name in (one.target, *parents) if name in imports]
    return found


def sizes(source: str) -> Iterator[tuple[str, str, int]]:
    """(kind, name, lines) of the file, its functions and its classes."""
    yield "file", "", len(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield kind, node.name, (node.end_lineno or first) - first + 1


def too_large(module: str, source: str) -> list[str]:
    """What in `source` is longer than it may be."""
    limits = {"file": MAX_FILE_LINES, "function": MAX_FUNCTION_LINES, "class": MAX_CLASS_LINES}
    return [
        f"{module}: {kind} {name} has {lines} lines"
        for kind, name, lines in sizes(source)
        if lines > (LONGER_FUNCTIONS.get(f"{module}:{name}", (limits[kind], ""))[0])
    ]


def banned(source: str) -> list[Finding]:
    """Constructs that this project never uses."""
    found: list[Finding] = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        found += [Finding(what, line) for what in _banned_in(node)]
    return found


def _banned_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ExceptHandler):
        if node.type is None:
            yield "bare except"
        if all(isinstance(one, ast.Pass) or _is_ellipsis(one) for one in node.body):
            yield "except: pass"
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner, name = node.value.id, node.attr
        if owner == "torch" and name == "load":
            yield "torch.load"
        if owner == "yaml" and name in {
            "load",
            "load_all",
            "full_load",
            "full_load_all",
            "unsafe_load",
            "UnsafeLoader",
        }:
            yield f"yaml.{name}"
        if name in ONLY_IN_FILES.get(owner, ()):
            yield f"only in files.py: {owner}.{name}"
        if owner == "importlib" and name == "import_module":
            yield "dynamic import"
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from _banned_import(node)
    elif isinstance(node, ast.Call):
        yield from _banned_call(node)


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def _banned_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    if any(root.split(".")[0] in PICKLES for root in roots):
        yield "pickle"
    if isinstance(node, ast.ImportFrom):
        if node.level:
            yield "relative import"
        forbidden = {"torch": {"load"}, "yaml": {"load", "full_load", "unsafe_load"}, **ONLY_IN_FILES}
        for name in {alias.name for alias in node.names} & forbidden.get(node.module or "", set()):
            yield f"from {node.module} import {name}"
        if any(alias.name == "*" for alias in node.names):
            yield "star import"


def _banned_call(node: ast.Call) -> Iterator[str]:
    if any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
        yield "trust_remote_code"
    if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile", "__import__"}:
        yield node.func.id
    if isinstance(node.func, ast.Attribute):
        arguments = len(node.args) + len(node.keywords)
        if node.func.attr in {"unlink", "rmdir", "rename", "write_text", "write_bytes"}:
            owner = ast.unparse(node.func.value)
            if owner not in {"os", "files"}:
                yield f"only in files.py: .{node.func.attr}"
        if node.func.attr == "replace" and arguments == 1 and not node.keywords:  # a path; text takes two arguments
            yield "only in files.py: .replace"


def bad_name(module: str) -> str | None:
    """The word in a module's name that says nothing, if there is one."""
    words = {word for part in module.lower().split(".") for word in part.split("_")}
    return next(iter(sorted(words & BANNED_WORDS)), None)


# The package


def test_every_module_has_a_layer_and_imports_only_what_is_below_it():
    assert layer_problems(IMPORTS, LAYERS) == []


def test_packages_are_empty_so_that_importing_one_module_loads_no_other():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    ours = {name: [one.target for one in IMPORTS[name] if one.target in MODULES] for name in packages}
    assert ours == {name: [] for name in packages}


def test_torch_free_modules_import_nothing_heavy():
    assert {name: heavy_by_import(name, IMPORTS) for name in TORCH_FREE} == {name: set() for name in TORCH_FREE}


def test_modules_that_could_be_promised_torch_free_are():
    free = {name for name in MODULES if not heavy_by_import(name, IMPORTS)}
    assert free - set(TORCH_FREE) == {"checkpoint"} & free, "add them to TORCH_FREE, or say why not"


def test_imports_inside_functions_are_the_listed_ones_and_no_others():
    found = set()
    for module, imports in IMPORTS.items():
        for one in imports:
            if one.function is not None:
                found.add((module, PACKAGE if one.target in MODULES else one.target.split(".")[0]))
    assert found == set(LATE)


def test_nothing_is_larger_than_it_may_be():
    assert [problem for name, source in SOURCES.items() for problem in too_large(name, source)] == []


def test_exceptions_to_sizes_are_needed():
    for place, (limit, _) in LONGER_FUNCTIONS.items():
        module, name = place.split(":")
        lines = max(lines for _, found, lines in sizes(SOURCES[module]) if found == name)
        assert lines <= limit


def test_no_module_has_a_name_that_says_nothing():
    assert {name: bad_name(name) for name in MODULES if bad_name(name)} == {}


def test_nothing_banned_is_written_anywhere():
    found = {name: banned(source) for name, source in SOURCES.items()}
    found["files"] = [one for one in found["files"] if not one.what.startswith("only in files.py")]
    assert {name: findings for name, findings in found.items() if findings} == {}


def test_files_is_where_renaming_syncing_and_removing_happens():
    whats = {one.what for one in banned(SOURCES["files"])}
    assert whats >= {"only in files.py: os.fsync", "only in files.py: .replace", "only in files.py: .unlink"}


# That each of these can fail


TINY_LAYERS = [["low", "other"], ["first second", "lonely"], ["top"]]


@pytest.mark.parametrize(
    ("module", "target", "is_allowed"),
    [
        ("top", "low", True),
        ("top", "lonely", True),
        ("second", "first", True),
        ("first", "second", False),
        ("first", "lonely", False),
        ("low", "top", False),
        ("low", "other", False),
    ],
)
def test_layers_allow_only_what_is_below(module: str, target: str, is_allowed: bool):
    imports = {name: [] for name in ("low", "other", "first", "second", "lonely", "top")}
    for inside in (f"import {target}", f"from {PACKAGE} import {target}", f"from {PACKAGE}.{target} import x"):
        for source in (inside, f"def f():\n    {inside}", f"class C:\n    def g(self):\n        {inside}"):
            found = layer_problems(imports | {module: imports_of(source, imports)}, TINY_LAYERS)
            assert found == ([] if is_allowed else [f"{module} imports {target}"])


def test_a_module_without_a_layer_and_a_layer_without_a_module_fail():
    assert layer_problems({"low": [], "new": []}, [["low gone"]]) == [
        "new has no layer",
        "gone is in the table and does not exist",
    ]


def test_heavy_imports_are_followed_through_our_modules_but_not_into_functions():
    sources = {
        "pure": "import json",
        "late": "def f():\n    import torch",
        "typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "direct": "from torch.nn import Module",
        "guarded": "try:\n    import diffusers\nexcept ImportError:\n    diffusers = None",
        "in_class": "class C:\n    import peft",
        "through": f"from {PACKAGE} import direct",
        "pack": "import transformers",
        "pack.inner": "",
        "inside": f"import {PACKAGE}.pack.inner",
    }
    imports = {name: imports_of(source, sources) for name, source in sources.items()}
    found = {name: sorted(heavy_by_import(name, imports)) for name in sources}
    assert found == {
        "pure": [],
        "late": [],
        "typed": [],
        "direct": ["torch"],
        "guarded": ["diffusers"],
        "in_class": ["peft"],
        "through": ["torch"],
        "pack": ["transformers"],
        "pack.inner": [],
        "inside": ["transformers"],
    }


def test_too_large_functions_classes_and_files_are_found():
    body = "    x = 1\n"
    assert too_large("m", "def f():\n" + body * 59) == []
    assert too_large("m", "def f():\n" + body * 60) == ["m: function f has 61 lines"]
    assert too_large("m", "class C:\n    async def f():\n" + ("    " + body) * 60) == ["m: function f has 61 lines"]
    assert too_large("m", "@one\n@two\ndef f():\n" + body * 58) == ["m: function f has 61 lines"]
    assert too_large("m", "class C:\n" + body * 200) == ["m: class C has 201 lines"]
    assert too_large("m", "x = 1\n" * 401) == ["m: file  has 401 lines"]
    assert too_large("training.loop", "def train():\n" + body * 89) == []
    assert too_large("training.loop", "def train():\n" + body * 90) == ["training.loop: function train has 91 lines"]
    assert too_large("training.setup", "def train():\n" + body * 89) != []


@pytest.mark.parametrize("name", ["utils", "model.helpers", "common.x", "lora_utils", "data.misc_io", "run_manager"])
def test_names_that_say_nothing_are_found(name: str):
    assert bad_name(name) is not None


@pytest.mark.parametrize("name", ["model.variants", "data.folder", "managed", "commons", "utility"])
def test_other_names_are_fine(name: str):
    assert bad_name(name) is None


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("from torch import load", "from torch import load"),
        ("import pickle", "pickle"),
        ("def f():\n    import pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch, marshal", "pickle"),
        ("yaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("yaml.full_load(text)", "yaml.full_load"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("from yaml import full_load", "from yaml import full_load"),
        ("M.from_pretrained(p, trust_remote_code=False)", "trust_remote_code"),
        ("try:\n    f()\nexcept:\n    g()", "bare except"),
        ("try:\n    f()\nexcept OSError:\n    pass", "except: pass"),
        ("try:\n    f()\nexcept OSError:\n    ...", "except: pass"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("__import__(name)", "__import__"),
        ("importlib.import_module(name)", "dynamic import"),
        ("from .schema import Config", "relative import"),
        ("from os.path import *", "star import"),
        ("os.replace(a, b)", "only in files.py: os.replace"),
        ("os.rename(a, b)", "only in files.py: os.rename"),
        ("os.fsync(f)", "only in files.py: os.fsync"),
        ("os.unlink(a)", "only in files.py: os.unlink"),
        ("os.remove(a)", "only in files.py: os.remove"),
        ("shutil.rmtree(a)", "only in files.py: shutil.rmtree"),
        ("call(os.fsync, f)", "only in files.py: os.fsync"),
        ("from os import replace", "from os import replace"),
        ("from shutil import rmtree", "from shutil import rmtree"),
        ("path.unlink()", "only in files.py: .unlink"),
        ("(folder / 'x').rename(y)", "only in files.py: .rename"),
        ("path.replace(target)", "only in files.py: .replace"),
        ("path.write_text('x')", "only in files.py: .write_text"),
        ("path.write_bytes(x)", "only in files.py: .write_bytes"),
    ],
)
def test_banned_constructs_are_found(source: str, what: str):
    assert what in [one.what for one in banned(source)]
    assert banned(f"x = 1\nif x:\n{textwrap.indent(source, '    ')}")[0].line >= 3


@pytest.mark.parametrize(
    "source",
    [
        "tensorfile.load(path)",
        "yaml.compose(text, Loader=yaml.SafeLoader)",
        "yaml.dump(value)",
        "text.replace('a', 'b')",
        "text.replace('a', 'b', 1)",
        "dataclasses.replace(x, dim=1)",
        "replace(base, dim=1)",
        "try:\n    f()\nexcept OSError:\n    return_code = 1",
        "with contextlib.suppress(OSError):\n    f()",
        "os.path.exists(x)",
        "shutil.disk_usage(x)",
        "files.write_text(path, 'x')",
        "re.compile(x).search(y)",
        "model.eval()",
        "'trust_remote_code'",
        "from typing import Any",
    ],
)
def test_what_is_not_banned_is_left_alone(source: str):
    assert banned(source) == []
