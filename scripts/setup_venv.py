"""Make .venv with zimage-train in it, once, and start what is installed there.

  python3 scripts/setup_venv.py [install] [--dev]     the package; with --dev also what its tests need
  python3 scripts/setup_venv.py quickstart [...]      the package, then `zimage-train train configs/quickstart.yaml ...`
  python3 scripts/setup_venv.py test [...]            the package and the dev tools, then ruff, pyright and `pytest ...`

On Windows: py scripts/setup_venv.py ...

  ZIMAGE_PYTHON   the interpreter to use; else the current interpreter, or the first on the path that is new enough
  PIP_*           pip's own settings hold: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can name a place with another torch

Which torch: a CUDA torch that the interpreter already has (images of rented GPUs) is used as it is and never replaced;
otherwise the version in constraints.txt, in the build that pip prefers.
"""

from __future__ import annotations  # an interpreter older than 3.11 runs this as well, to look for a newer interpreter

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

OLDEST = (3, 11)
SCRIPT = Path(__file__).resolve()  # before the folder changes: Python 3.8 has a relative __file__
KEY_FILES = ("pyproject.toml", "constraints.txt", "scripts/setup_venv.py")
STAMP = "zimage-train-setup"
VENV_FOLDERS = {"bin", "include", "lib", "lib64", "scripts", STAMP}
"""Names, in lower case, that an incomplete .venv may contain."""
WINDOWS_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
"""Index of torch with CUDA for Windows, for which the package index has only the CPU build."""


@dataclass(frozen=True)
class Checkout:
    """Paths of a checkout; `platform` is sys.platform: "linux", "darwin" or "win32"."""

    root: Path
    platform: str

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def program(self, name: str) -> Path:
        """Return the path of an installed program."""
        if self.platform == "win32":
            return self.venv / "Scripts" / f"{name}.exe"
        return self.venv / "bin" / name

    def read_stamp(self) -> tuple[str, str]:
        """Return the key of what was installed, or "unfinished", and the extra, "dev" or empty."""
        try:
            lines = (self.venv / STAMP).read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        key, extra, *_ = [*lines, "", ""]
        return key, extra

    def write_stamp(self, key: str, extra: str = "") -> None:
        (self.venv / STAMP).write_text(f"{key}\n{extra}\n", encoding="utf-8")


# Other programs


def run(command: list, **options) -> int:
    """Run a program and return its exit status. It gets Ctrl-C itself: wait for its end before passing that on."""
    process = subprocess.Popen([str(word) for word in command], **options)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def output_of(command: list) -> str | None:
    """Return what a program prints, or None where it is missing or fails."""
    words = [str(word) for word in command]
    try:
        return subprocess.check_output(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).decode(
            errors="replace"
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def has_nvidia_driver() -> bool:
    return output_of(["nvidia-smi"]) is not None


def pip(checkout: Checkout, *arguments: str, index: str | None = None, quiet: bool = False) -> int:
    """Run pip in .venv and return its exit status. `index` is used unless PIP_EXTRA_INDEX_URL is set."""
    # Some GPU images set PIP_CONSTRAINT to the versions they were built with; here constraints.txt decides.
    env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    env["PIP_USER"] = "0"
    if index:
        env.setdefault("PIP_EXTRA_INDEX_URL", index)
    sink = subprocess.DEVNULL if quiet else None
    command = [checkout.program("python"), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return run(command, env=env, cwd=str(checkout.root), stdout=sink, stderr=sink)


# Interpreters


def describe_this_python() -> dict:
    """Return what decides how this interpreter is used. Does not import torch."""
    venv = SCRIPT.parent.parent / ".venv"
    is_inside = os.path.realpath(sys.prefix) == os.path.realpath(str(venv))
    facts = {
        "python": sys._base_executable if is_inside else sys.executable,  # the interpreter that .venv was made from
        "version": sys.version,
        "is_new": sys.version_info >= OLDEST,
        "packages": sysconfig.get_path("purelib"),
        "torch": None,
        "cuda": None,
    }
    try:
        facts["torch"] = metadata.version("torch")
        folder = Path(util.find_spec("torch").origin).parent
        facts["torch_packages"] = str(folder.parent)
        facts["cuda"] = runpy.run_path(str(folder / "version.py")).get("cuda")
    except (metadata.PackageNotFoundError, AttributeError, OSError):
        pass  # no torch, or a broken installation
    return facts


def describe(*command: Path | str) -> dict | None:
    """Return what `describe_this_python` says in another interpreter, or None where that does not start."""
    printed = output_of([*command, SCRIPT, "describe"])
    return json.loads(printed) if printed else None


def candidates(platform: str) -> list[list[str]]:
    """Return the commands that may start a Python, in the order in which they are tried."""
    if os.environ.get("ZIMAGE_PYTHON"):
        return [[os.environ["ZIMAGE_PYTHON"]]]
    if platform == "win32":
        return [[sys.executable], ["py", "-3.13"], ["py", "-3.12"], ["py", "-3.11"], ["python3"], ["python"]]
    return [[sys.executable], ["python3"], ["python3.13"], ["python3.12"], ["python3.11"]]


def find_python(platform: str) -> Path:
    """Return the first interpreter that is new enough."""
    found = []
    for command in candidates(platform):
        facts = describe(*command)
        if facts and facts["is_new"]:
            return Path(facts["python"])
        state = "older than 3.8 or broken" if shutil.which(command[0]) else "missing"
        found.append(f"{' '.join(command)} is {facts['version'].split()[0] if facts else state}")
    needed = f"error: zimage-train needs Python {OLDEST[0]}.{OLDEST[1]} or newer"
    sys.exit(f"{needed} ({', '.join(found)}); install one, or put its path into ZIMAGE_PYTHON")


def usable_cuda_torch(checkout: Checkout, facts: dict | None) -> str | None:
    """Return the version of the CUDA torch that an interpreter sees, if pyproject.toml admits that version."""
    if not facts or not facts["cuda"]:
        return None
    project = (checkout.root / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(r'"torch>=(\d+)\.(\d+)', project).groups()
    major, minor, rest = re.match(r"(\d+)\.(\d+)(.*)", facts["torch"]).groups()
    is_early = re.match(r"(\.\d+)*\.?(a|b|rc|dev)", rest) is not None  # 2.7.0a0 comes before 2.7
    if (int(major), int(minor), not is_early) >= (int(least[0]), int(least[1]), True):
        return facts["torch"]
    too_old = f"the torch {facts['torch']} of {facts['python']} is too old: {'.'.join(least)} is needed"
    print(too_old, file=sys.stderr)
    return None


# .venv


def setup_key(checkout: Checkout) -> str | None:
    """Return a checksum of everything that decides what is installed, or None if .venv has no working Python."""
    facts = describe(checkout.program("python"))
    if facts is None:
        return None
    key = hashlib.sha256(repr((str(checkout.root), facts["version"], facts["torch"])).encode())
    for name in KEY_FILES:
        key.update((checkout.root / name).read_bytes())
    return key.hexdigest()


def is_set_up(checkout: Checkout, extra: str) -> bool:
    return checkout.program("zimage-train").is_file() and checkout.read_stamp() == (setup_key(checkout), extra)


def is_venv_usable(checkout: Checkout) -> bool:
    facts = describe(checkout.program("python"))
    return facts is not None and facts["is_new"] and pip(checkout, "--version", quiet=True) == 0


def remove_venv(checkout: Checkout) -> None:
    """Remove .venv, unless it is not a virtual environment."""
    venv = checkout.venv
    if venv.is_symlink():
        venv.unlink()
    if not venv.exists():
        return
    names = {path.name.lower() for path in venv.iterdir()} if venv.is_dir() else {"a file"}
    if "pyvenv.cfg" not in names and not names <= VENV_FOLDERS:
        sys.exit(f"error: {venv} is in the way and is no virtual environment; move it")
    try:
        shutil.rmtree(str(venv))
    except OSError as error:  # Windows removes no program that runs
        sys.exit(f"error: {venv} cannot be removed ({error}); end what runs in it, and start this with another Python")


def make_venv(checkout: Checkout, python: Path) -> None:
    facts = describe(python)
    torch = usable_cuda_torch(checkout, facts)
    remove_venv(checkout)
    print(f"making {checkout.venv} with {python}" + (f" and its torch {torch}" if torch else ""))
    checkout.venv.mkdir()
    checkout.write_stamp("unfinished")
    options = ["--system-site-packages"] if torch else []
    if run([python, "-m", "venv", *options, checkout.venv], stdout=2) != 0:  # 2: standard error
        hint = "; on Debian and Ubuntu: apt-get install python3-venv" if checkout.platform == "linux" else ""
        sys.exit(f"error: {python} cannot make a virtual environment{hint}")
    inside = describe(checkout.program("python"))
    if torch and inside and inside["torch"] != torch:
        # The interpreter is itself of a virtual environment, and "system" means the interpreter beneath it.
        path = Path(inside["packages"]) / "interpreter-packages.pth"
        path.write_text(facts["torch_packages"] + "\n", encoding="utf-8")


# Installing


def choose_torch(checkout: Checkout) -> tuple[Path, list[str], str | None]:
    """Return the constraints file, requirements besides the package, and an additional index."""
    constraints = checkout.root / "constraints.txt"
    text = constraints.read_text(encoding="utf-8")
    tested = re.search(r"^torch==(.*)$", text, re.MULTILINE).group(1)
    torch = usable_cuda_torch(checkout, describe(checkout.program("python")))
    if torch:
        print(f"keeping the CUDA torch {torch} that is already there")
        constraints = checkout.venv / "constraints.txt"
        constraints.write_text(text.replace(f"\ntorch=={tested}\n", f"\ntorch=={torch}\n"), encoding="utf-8")
        return constraints, [], None
    if has_nvidia_driver():
        print(f"NVIDIA driver found: torch {tested} with CUDA")
        return constraints, ["torch"], WINDOWS_CUDA_INDEX if checkout.platform == "win32" else None
    print(
        f"macOS: torch {tested}" if checkout.platform == "darwin" else f"no NVIDIA driver: torch {tested} for the CPU"
    )
    warn_of_cuda_download(checkout, tested)
    return constraints, [f"torch=={tested}"], None


def warn_of_cuda_download(checkout: Checkout, tested: str) -> None:
    """Warn of a large download if pip would fetch the CUDA build, the only build on the default index for Linux."""
    if checkout.platform != "linux" or pip(checkout, "show", "-qq", "torch", quiet=True) == 0:
        return
    if pip(checkout, "install", "-qq", "--dry-run", "--no-deps", f"torch=={tested}+cpu", quiet=True) != 0:
        remedy = "PIP_EXTRA_INDEX_URL=(PyTorch's CPU index) avoids that"
        print(f"note: pip finds no CPU-only torch and fetches gigabytes of CUDA; {remedy}")


def install_package(checkout: Checkout, extra: str) -> None:
    constraints, torch, index = choose_torch(checkout)
    tools = f" and the {extra} tools" if extra else ""
    print(f"installing zimage-train{tools} into {checkout.venv}; the first time takes minutes")
    checkout.write_stamp("unfinished")  # cut off from here on, .venv is made anew by the next run
    package = f".[{extra or 'ui'}]"
    if pip(checkout, "install", "-qq", "--constraint", str(constraints), "-e", package, *torch, index=index) != 0:
        checkout.write_stamp("")  # a clean failure (no network) spoils nothing: the next run goes on from here
        sys.exit("error: pip could not install zimage-train; its own words are above")
    if has_nvidia_driver() and not usable_cuda_torch(checkout, describe(checkout.program("python"))):
        print(
            f"note: {checkout.venv} holds a torch without CUDA, so the GPU stays idle; "
            f"to get the CUDA build, remove {checkout.venv} and run this again"
        )
    checkout.write_stamp(str(setup_key(checkout)), extra)


def set_up(checkout: Checkout, extra: str = "") -> None:
    """Make .venv and install the package, unless both are up to date."""
    key, before = checkout.read_stamp()
    extra = before or extra  # the dev tools, once in, stay in
    if is_set_up(checkout, extra):
        print(f"{checkout.venv} is up to date")
        return
    if key == "unfinished" or not is_venv_usable(checkout):
        make_venv(checkout, find_python(checkout.platform))
    install_package(checkout, extra)


# Commands


def install(checkout: Checkout, *arguments: str) -> int:
    if set(arguments) - {"--dev"}:
        sys.exit(f"error: no such command or option: {' '.join(arguments)}\n\n{__doc__}")
    set_up(checkout, "dev" if arguments else "")
    program = checkout.program("zimage-train").relative_to(checkout.root)
    activate = ".venv\\Scripts\\activate" if checkout.platform == "win32" else "source .venv/bin/activate"
    print(f"next: `{program} doctor`, or `{activate}` and then `zimage-train doctor`")
    return 0


def quickstart(checkout: Checkout, *arguments: str) -> int:
    set_up(checkout)
    program = checkout.program("zimage-train")
    words = ["train", "configs/quickstart.yaml", *arguments]
    print(f"training: {program.relative_to(checkout.root)} {' '.join(words)}")
    if checkout.platform == "win32":  # where exec returns to the shell at once
        return run([program, *words])
    return os.execv(str(program), [str(program), *words])


def test(checkout: Checkout, *arguments: str) -> int:
    """Run the linters and the tests, all of them even if some fail."""
    set_up(checkout, "dev")
    os.environ["OMP_NUM_THREADS"] = "1"  # two workers share the cores; torch's own threads would slow both down
    ruff, folders = checkout.program("ruff"), ["zimage_train", "scripts", "tests"]
    lint = [run([ruff, "check", *folders]), run([ruff, "format", "--check", *folders])]
    lint.append(run([checkout.program("pyright")]))
    options = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # tests/conftest.py orders the files
    options += ["--durations", "20", "-p", "scripts.test_report"]
    tests = run([checkout.program("python"), "-m", "pytest", *options, *arguments])
    if tests == 0 and any(lint):
        sys.exit("error: the tests passed, but ruff or pyright found something: see above the tests")
    return tests


COMMANDS = {"install": install, "quickstart": quickstart, "test": test}


def main(checkout: Checkout, *arguments: str) -> int:
    """Run a command and return its exit status."""
    if arguments == ("describe",):  # how this script questions another interpreter
        print(json.dumps(describe_this_python()))
        return 0
    if arguments[:1] in (("-h",), ("--help",)):
        print(__doc__.strip())
        return 0
    name, *rest = arguments if arguments and arguments[0] in COMMANDS else ("install", *arguments)
    os.chdir(str(checkout.root))
    try:
        return COMMANDS[name](checkout, *rest)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # in order with what other programs print
    sys.exit(main(Checkout(SCRIPT.parent.parent, sys.platform), *sys.argv[1:]))
