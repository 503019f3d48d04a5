"""The set-up scripts: which Python and which torch they take, when they install, and what they hand on."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "scripts/setup_venv.sh", ROOT / "scripts/quickstart.sh", ROOT / "scripts/test.sh", ROOT / ".ci/run"]
START = ROOT / "scripts/runpod/start.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHON = sys._base_executable
BASH = shutil.which("bash") or "bash"

# Stands for pip: notes what it is asked to install, and puts the command there as an install would. (Putting pip itself
# into each virtual environment would take five seconds a time.)
PIP_STUB = (
    f"""
find_python() {{ echo ./python; }}
printf '%s\\n' '#!/bin/sh' '[ "$2" != venv ] || set -- "$@" --without-pip' 'exec "{PYTHON}" "$@"' >python
chmod +x python
"""
    + """
venv_pip() {
  case "$*" in *--constraint*) ;; *) return 1 ;; esac
  printf '%s\\n' "$*" >>pip.log
  printf '#!/bin/sh\\n' >.venv/bin/zimage-train
  chmod +x .venv/bin/zimage-train
}
venv_works() { .venv/bin/python -c '' 2>/dev/null; }
"""
)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in wanted)}


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with as much of the project as installing it takes, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    for name in ("scripts/setup_venv.sh", "scripts/quickstart.sh", "scripts/test.sh", "zimage_train/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def shell(checkout: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the functions of setup_venv.sh, and without a terminal."""
    return subprocess.run(
        [BASH, "-c", f"set -euo pipefail\nsource scripts/setup_venv.sh\n{code}"],
        cwd=checkout,
        env={**os.environ, "ZIMAGE_PYTHON": PYTHON, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def python_3_10() -> str:
    """A Python that is too old, if this machine has one: on the path, or among pyenv's."""
    versions = [""]
    if shutil.which("pyenv"):
        listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=False).stdout
        versions += [version for version in listed.split() if version.startswith("3.10.")]
    for version in versions if shutil.which("python3.10") else []:
        env = {**os.environ, "PYENV_VERSION": version} if version else None
        command = ["python3.10", "-c", "import sys; print(sys.executable)"]
        answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    pytest.skip("no Python 3.10 on this machine")


# What the files say


@pytest.mark.parametrize("script", [*SCRIPTS, START], ids=lambda path: path.name)
def test_the_scripts_are_valid_and_can_be_run(script):
    subprocess.run([BASH, "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "constraints.txt"], ids=lambda path: path.name)
def test_no_path_or_host_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.}])/(?:root|home|work|opt|tmp|mnt|Users)\b|://|pyenv|--(?:extra-)?index-url", text)


def test_every_dependency_is_pinned_to_a_version_that_the_project_admits():
    extras = PROJECT["optional-dependencies"]
    pinned = pins()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["dev"]]):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} leaves out the tested {version}"


# Which Python


def test_python_3_10_is_refused_in_one_line(checkout):
    result = shell(checkout, "setup_venv", ZIMAGE_PYTHON=python_3_10())
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(
        r"error: zimage-train needs Python 3\.11 or newer \(\S+ is 3\.10\.\d+\); install one, or name it: .*\n",
        result.stderr,
    )
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("interpreters", "taken"),
    [
        ({"python3": "new", "python3.12": "new"}, "python3"),
        ({"python3": "3.9.6", "python3.12": "new", "python3.11": "new"}, "python3.12"),
        ({"python3": "3.9.6"}, None),
        ({}, None),
    ],
)
def test_the_first_python_that_is_new_enough_is_taken(checkout, tmp_path, interpreters, taken):
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "dirname").symlink_to(shutil.which("dirname"))
    for name, version in interpreters.items():
        answer = f"new enough {folder / name}" if version == "new" else version
        executable(folder / name, f"echo '{answer}'")
    result = shell(checkout, "find_python", PATH=str(folder), ZIMAGE_PYTHON="")
    if taken:
        assert result.stdout == f"{folder / taken}\n"
    else:
        assert result.returncode == 1
        assert f"python3 is {interpreters.get('python3', 'missing')}, python3.13 is missing" in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_python_inside_the_venv_stands_for_the_one_beneath_it(checkout):
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(checkout / ".venv")], check=True)
    result = shell(checkout, "find_python", ZIMAGE_PYTHON=str(checkout / ".venv/bin/python"))
    assert Path(result.stdout.strip()).resolve() == Path(PYTHON).resolve()
    assert not Path(result.stdout.strip()).is_relative_to(checkout)


# When it installs


def test_it_installs_when_something_changed_and_only_then(checkout):
    log = checkout / "pip.log"

    def asked(arguments: str = "") -> str | None:
        """What one set-up asks of pip."""
        log.unlink(missing_ok=True)
        result = shell(checkout, f"{PIP_STUB}\nsetup_venv {arguments}")
        assert result.returncode == 0, result.stderr
        if not log.exists():
            assert result.stdout == f"{checkout}/.venv is up to date\n"
            return None
        return log.read_text(encoding="utf-8")

    def change(name: str) -> None:
        path = checkout / name
        path.write_text(path.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")

    assert "-e . " in asked()
    assert asked() is None
    assert "-e .[dev] " in asked("dev")
    assert asked("dev") is None
    assert asked() is None, "the quickstart after the tests has nothing to do"
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup_venv.sh"):
        change(name)
        assert "-e .[dev] " in asked(), "and it leaves the dev tools in"
        assert asked("dev") is None
    change("README.md")
    assert asked() is None
    (checkout / ".venv/bin/zimage-train").unlink()
    assert "-e .[dev] " in asked()


def test_a_failed_install_is_tried_again_in_the_same_venv(checkout):
    failing = PIP_STUB + "\nvenv_pip() { echo 'ERROR: no network' >&2; return 1; }\nsetup_venv"
    result = shell(checkout, failing)
    assert result.returncode == 1
    assert result.stderr == "ERROR: no network\nerror: pip could not install zimage-train; its own words are above\n"
    (checkout / ".venv/kept").touch()
    result = shell(checkout, f"{PIP_STUB}\nsetup_venv")
    assert result.returncode == 0, result.stderr
    assert (checkout / ".venv/kept").exists()
    assert (checkout / "pip.log").exists()


@pytest.mark.parametrize("damage", ["cut off while pip was installing", "its interpreter is gone", "an empty folder"])
def test_a_half_made_venv_is_made_anew(checkout, damage):
    venv = checkout / ".venv"
    if damage == "an empty folder":
        (venv / "bin").mkdir(parents=True)
    else:
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(venv)], check=True)
        (venv / "half").touch()
    if damage == "its interpreter is gone":
        (venv / "bin/python").unlink()
        (venv / "bin/python").symlink_to("nothing")
    if damage == "cut off while pip was installing":
        cut = PIP_STUB.replace("chmod +x .venv", "kill -KILL $$; chmod +x .venv") + "\nsetup_venv"
        assert shell(checkout, cut).returncode == -9
    result = shell(checkout, f"{PIP_STUB}\nsetup_venv")
    assert result.returncode == 0, result.stderr
    assert f"making {venv} with" in result.stdout
    assert not (venv / "half").exists()
    subprocess.run([str(venv / "bin/python"), "-c", ""], check=True)


def test_a_folder_that_is_no_virtual_environment_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/thesis.txt").touch()
    result = shell(checkout, f"{PIP_STUB}\nsetup_venv")
    assert result.returncode == 1
    assert result.stderr.endswith("is no virtual environment; move it\n")
    assert (checkout / ".venv/thesis.txt").exists()


# Which torch


@pytest.mark.parametrize(("driver", "asked"), [("exit 0", "torch"), ("exit 9", f"torch=={pins()['torch']}")])
def test_torch_by_the_driver(checkout, driver, asked):
    executable(checkout / "driver/nvidia-smi", driver)
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(checkout / ".venv")], check=True)
    result = shell(checkout, f"{PIP_STUB}\nsetup_venv", PATH=f"{checkout / 'driver'}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    command = (checkout / "pip.log").read_text(encoding="utf-8").rstrip()
    assert command == f"install -qq --constraint {checkout}/constraints.txt -e . {asked}"
    assert ("without CUDA, so the GPU stays idle" in result.stdout) == (driver == "exit 0")


def torch_files(version: str, cuda: str | None) -> dict[str, str]:
    info = f"torch-{version}.dist-info"
    return {
        "torch/__init__.py": "raise SystemExit('nothing may import the dummy')\n",
        "torch/version.py": f"__version__ = {version!r}\ncuda: str | None = {cuda!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }


@pytest.mark.parametrize(
    ("version", "cuda", "kept"),
    [
        ("2.12.1+cu128", "12.8", True),
        ("2.13.0", "13.0", True),  # the default index's CUDA build has no local version
        ("2.8.0a0+5228986c39.nv25.5", "12.9", True),
        ("3.0.0", "13.0", True),
        ("2.7.0a0+7c8ec84dab.nv25.3", "12.8", False),
        ("2.6.0+cu124", "12.4", False),
        ("1.13.1+cu117", "11.7", False),
        ("2.13.0+cpu", None, False),
    ],
)
def test_a_torch_is_kept_if_it_has_cuda_and_is_new_enough(checkout, tmp_path, version, cuda, kept):
    for name, text in torch_files(version, cuda).items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text, encoding="utf-8")
    result = shell(checkout, 'cuda_torch "$ZIMAGE_PYTHON"', PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == (f"{version}\n" if kept else "")
    assert ("is too old" in result.stderr) == (cuda is not None and not kept)


@pytest.mark.slow
def test_the_cuda_torch_of_the_interpreter_is_used_and_not_replaced(checkout, tmp_path):
    """A whole set-up on an interpreter that has such a torch, except that pip only reports what it would install."""
    version = "2.12.1+cu128"
    wheel = tmp_path / f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in torch_files(version, "12.8").items():
            archive.writestr(name, text)
    pod = tmp_path / "pod/bin/python"
    subprocess.run([PYTHON, "-m", "venv", str(tmp_path / "pod")], check=True)
    subprocess.run([str(pod), "-m", "pip", "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True)
    # An older pip downloads everything before it reports.
    newer = [str(pod), "-m", "pip", "install", "-q", "--retries", "1", "--target", str(tmp_path / "pip"), "pip>=23.3"]
    fetched = subprocess.run(newer, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"the package index cannot be reached: {fetched.stderr.strip().splitlines()[-1]}")

    def would_install(report: Path, *options: str) -> dict[str, str]:
        arguments = f'"$@" {" ".join(options)} --dry-run --report "{report}"'
        dry_run = f"""
        venv_pip() {{ "{pod}" "{tmp_path}/pip/pip" --python .venv/bin/python {arguments}; }}
        venv_works() {{ .venv/bin/python -c '' 2>/dev/null; }}
        """
        result = shell(checkout, dry_run + "setup_venv", ZIMAGE_PYTHON=str(pod))
        assert result.returncode == 0, result.stderr
        listed = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in listed}

    installed = would_install(tmp_path / "with.json")
    assert {"zimage-train", "diffusers", "peft", "accelerate"} <= set(installed)
    assert "torch" not in installed
    assert "include-system-site-packages = true" in (checkout / ".venv/pyvenv.cfg").read_text(encoding="utf-8")
    constraints = (checkout / ".venv/constraints.txt").read_text(encoding="utf-8")
    assert f"\ntorch=={version}\n" in constraints

    # Without it, torch would come, in the tested version: the report above left it out for the right reason.
    subprocess.run([str(pod), "-m", "pip", "uninstall", "-q", "-y", "torch"], check=True)
    assert would_install(tmp_path / "without.json", "--no-deps")["torch"].partition("+")[0] == pins()["torch"]


# What the commands hand on


@pytest.fixture
def ready(checkout: Path) -> Path:
    """A checkout that is set up, with stubs in .venv which say how they were called."""
    done = 'ROOT=$PWD\nVENV=$ROOT/.venv\nsay() { echo "$*"; }\nfail() { echo "error: $*" >&2; exit 1; }\n'
    (checkout / "scripts/setup_venv.sh").write_text(done + 'setup_venv() { echo "set up:$*"; }\n', encoding="utf-8")
    executable(checkout / ".venv/bin/zimage-train", 'printf "<%s>" "$@"; exit "${TRAIN:-0}"')
    executable(checkout / ".venv/bin/ruff", 'echo "ruff $*"; exit "${RUFF:-0}"')
    executable(checkout / ".venv/bin/pyright", 'echo "pyright $*"; exit "${PYRIGHT:-0}"')
    executable(checkout / ".venv/bin/python", 'printf "<%s>" "$OMP_NUM_THREADS" "$@"; exit "${PYTEST:-0}"')
    return checkout


def run(checkout: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [BASH, script, *arguments]
    environ = {**os.environ, **env}
    return subprocess.run(
        command, cwd=checkout, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def test_quickstart_trains_with_the_options_it_was_given(ready):
    result = run(ready, "scripts/quickstart.sh", "--set", "name=two words", TRAIN="130")
    assert "set up:\n" in result.stdout
    assert result.stdout.endswith("<train><configs/quickstart.yaml><--set><name=two words>")
    assert result.returncode == 130


@pytest.mark.parametrize(
    ("ruff", "pyright", "tests", "code"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (1, 1, 2, 2), (0, 0, 5, 5)],
)
def test_the_tests_run_whatever_the_linters_say_and_either_fails_the_script(ready, ruff, pyright, tests, code):
    stubs = {"RUFF": str(ruff), "PYRIGHT": str(pyright), "PYTEST": str(tests)}
    result = run(ready, "scripts/test.sh", "-k", "one thing", **stubs)
    assert result.returncode == code
    paths = "zimage_train scripts tests"
    assert f"set up:dev\nruff check {paths}\nruff format --check {paths}\npyright \n" in result.stdout
    assert result.stdout.endswith("<1><-m><pytest><-n><2><--dist><loadfile><-k><one thing>")


def test_ci_runs_the_tests(ready):
    shutil.copytree(ROOT / ".ci", ready / ".ci")
    result = run(ready, ".ci/run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("<pytest><-n><2><--dist><loadfile>")
