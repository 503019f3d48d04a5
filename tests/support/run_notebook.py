"""`python run_notebook.py NOTEBOOK`: run all code cells in order, as a kernel would, without Jupyter.

A line that begins with `!` goes to the shell with the values of its `{expressions}`; a command of this program is run
by a fork, which saves it the seconds of its imports. The last expression of a cell is
what the notebook shows; its type is printed. A cell or command that fails ends the program, where Jupyter would go on
after a command; only `doctor` may fail, since it says with its exit code that there is no GPU.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def shell(command: str) -> None:
    words = shlex.split(command)
    if words[:3] == [sys.executable, "-m", "zimage_train"]:
        code = run_here(words[3:])
    else:
        code = subprocess.run(command, shell=True, check=False).returncode
    if code != 0 and not command.endswith(" doctor"):
        sys.exit(f"exit code {code}: {command}")


def run_here(words: list[str]) -> int:
    """Run a command of this program in a fork, which has imported everything already; return its exit code."""
    import zimage_train.commands.train  # noqa: F401  so that no fork has to
    from zimage_train import __main__ as program

    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        sys.argv = ["zimage-train", *words]
        program.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_cell(source: str, names: dict[str, Any]) -> None:
    """Run a cell in the namespace `names`."""

    def call(line: str) -> None:
        shell(re.sub(r"{([^}]+)}", lambda found: str(eval(found[1], names)), line))

    names["_shell"] = call
    lines = [f"_shell({line[1:]!r})" if line.startswith("!") else line for line in source.splitlines()]
    body = ast.parse("\n".join(lines)).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None
    if shown is not None:
        print(f"[shows {type(shown).__name__}]", flush=True)


def main(path: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            print(f"[{cell['id']}]", flush=True)
            run_cell("".join(cell["source"]), names)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
