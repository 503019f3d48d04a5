"""What ruff and import-linter cannot say of the code; their rules stand in pyproject.toml."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "zimage_train"
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}

MAX_FILE_LINES = 400
MAX_LOOP_LINES = 90
MAX_TEST_NAME_LENGTH = 39
EMPTY_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}
PATH_METHODS = {"unlink", "rmdir", "rename", "write_text", "write_bytes"}
WRITES_FILES = PACKAGE / "io" / "atomic.py"


def test_import_contracts_hold():
    """A room imports from lower rooms only, nothing is cyclic, and what must be free of torch is."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_torch_free_modules_load_no_torch():
    """The contract reads imports; this test makes them."""
    names = [name for name in CONTRACTS["torch-free"]["source_modules"] if not name.endswith("__main__")]
    heavy = CONTRACTS["torch-free"]["forbidden_modules"]
    code = f"import sys, {', '.join(names)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_empty():
    """Importing a module loads no other of its package."""
    packages = [source for path, source in SOURCES.items() if path.name == "__init__.py" and path.parent != PACKAGE]
    assert [source for source in packages if "zimage_train" in source] == []


def test_files_are_short_enough():
    long = {path.name: lines for path, source in SOURCES.items() if (lines := source.count("\n")) > MAX_FILE_LINES}
    assert long == {}
    loop = ast.parse(SOURCES[PACKAGE / "training" / "loop.py"])
    train = next(node for node in loop.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno < MAX_LOOP_LINES


def test_module_names_say_something():
    names = {path for path in SOURCES if EMPTY_WORDS & set(path.stem.split("_"))}
    assert names == set()


def test_names_of_tests_are_short():
    """Names of tests have under 40 characters, so that `-k` and reports stay readable."""
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {
        (name, node.name)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    assert len(functions) > 1000
    assert {(name, test) for name, test in functions if len(test) > MAX_TEST_NAME_LENGTH} == set()


def path_writes(source: str) -> Iterator[str]:
    """Yield each method call of a path that changes the disk, and each use of `trust_remote_code`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
            yield f"line {node.lineno}: trust_remote_code"
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in ("atomic", "files"):
            is_path_replace = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
            if node.func.attr in PATH_METHODS or is_path_replace:
                yield f"line {node.lineno}: .{node.func.attr}"


def test_only_one_module_changes_the_disk():
    """Every file is written whole or not at all, by `io/atomic.py`."""
    found = {str(path): list(path_writes(source)) for path, source in SOURCES.items() if path != WRITES_FILES}
    assert {path: writes for path, writes in found.items() if writes} == {}
    assert {write.partition(".")[2] for write in path_writes(SOURCES[WRITES_FILES])} >= {"replace", "unlink"}
