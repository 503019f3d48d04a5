"""Setting up: which Python and which torch are taken, when pip is asked, and what the commands hand on.

Windows and macOS are simulated: their names and folders, on the system that runs this.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import setup_venv
from setup_venv import Checkout

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = [ROOT / "scripts/quickstart.sh", ROOT / "scripts/test.sh", ROOT / ".ci/run"]
SCRIPT = ROOT / "scripts/setup_venv.py"
START = ROOT / "scripts/runpod/start.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHON = sys._base_executable
BASH = shutil.which("bash") or "bash"

# Stands for pip: notes what it is asked to install, and puts the command there as an install would. (Putting pip itself
# into each virtual environment would take five seconds a time.)
PIP_STUB = """
import json, os, pathlib, sys, time
if "--constraint" in sys.argv:
    settings = {name: os.environ.get(name) for name in ("PIP_CONSTRAINT", "PIP_USER", "PIP_EXTRA_INDEX_URL")}
    pathlib.Path("pip.log").write_text(json.dumps({"asked": " ".join(sys.argv[1:]), **settings}))
    time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
    if "STUB_ERROR" in os.environ:
        sys.exit(os.environ["STUB_ERROR"])
    pathlib.Path(os.environ["STUB_PROGRAM"]).touch()
elif "--version" not in sys.argv:
    sys.exit(1)
"""

# Stands for an interpreter: makes virtual environments without pip, and for Windows such as they look there.
PYTHON_STUB = f"""
[ "$2" = venv ] || exec "{PYTHON}" "$@"
for folder; do :; done
if [ "$STUB_PLATFORM" != win32 ]; then exec "{PYTHON}" "$@" --without-pip; fi
mkdir -p "$folder/Scripts"
touch "$folder/pyvenv.cfg"
printf '#!{BASH}\\nexec "{PYTHON}" "$@"\\n' >"$folder/Scripts/python.exe"
chmod +x "$folder/Scripts/python.exe"
"""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in wanted)}


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def write_stub_module(folder: Path, name: str, body: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    (folder / name / "__main__.py").write_text(body, encoding="utf-8")


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in, for this process and those it starts, for pip, the interpreter and a machine without a GPU."""
    folder = tmp_path / "stubs"
    write_stub_module(folder / "modules", "pip", PIP_STUB)
    executable(folder / "nvidia-smi", "exit 9")
    executable(folder / "python", PYTHON_STUB)
    executable(folder / "python3", f'exec "{PYTHON}" "$@"')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(folder / "modules"))
    for name in ("PIP_EXTRA_INDEX_URL", "ZIMAGE_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_venv, "find_python", lambda platform: folder / "python")
    return folder


def copy_checkout(folder: Path) -> Path:
    """Copy as much of the project as installing it takes."""
    names = ("scripts/setup_venv.py", "scripts/quickstart.sh", "scripts/test.sh", "zimage_train/__init__.py")
    for name in (*names, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(params=["linux", "darwin", "win32"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path, stubs: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout in a folder with a space in its name, on each platform."""
    made = Checkout(copy_checkout(tmp_path / "a checkout"), request.param)
    monkeypatch.setenv("STUB_PLATFORM", made.platform)
    monkeypatch.setenv("STUB_PROGRAM", str(made.program("zimage-train")))
    return made


on_linux = pytest.mark.parametrize("checkout", ["linux"], indirect=True)


def asked_of_pip(checkout: Checkout) -> dict[str, str | None]:
    return json.loads((checkout.root / "pip.log").read_text(encoding="utf-8"))


def make_plain_venv(checkout: Checkout) -> None:
    command = [str(checkout.root.parent / "stubs/python"), "-m", "venv", str(checkout.venv)]
    subprocess.run(command, check=True)


def run(command: list[str | Path], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program without a terminal."""
    environ, nothing = {**os.environ, **env}, subprocess.DEVNULL
    return subprocess.run(command, cwd=cwd, env=environ, stdin=nothing, capture_output=True, text=True, check=False)


def old_python(version: str) -> str:
    """A Python that is too old, if this machine has any: on the path, or among pyenv's."""
    command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    listed = [""]
    if shutil.which("pyenv"):
        installed = run(["pyenv", "versions", "--bare"], ROOT).stdout.split()
        listed += [name for name in installed if name.startswith(f"{version}.")]
    for name in listed if shutil.which(command[0]) else []:
        answer = run(command, ROOT, **({"PYENV_VERSION": name} if name else {}))
        if answer.returncode == 0:
            return answer.stdout.strip()
    pytest.skip(f"no Python {version} on this machine")


# What the files say


@pytest.mark.parametrize("script", [*WRAPPERS, START], ids=lambda path: path.name)
def test_scripts_can_be_run(script):
    """The scripts are valid and can be run."""
    subprocess.run([BASH, "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", WRAPPERS[:2], ids=lambda path: path.name)
def test_a_wrapper_has_one_line(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line.startswith("#") for line in lines] == [True] * (len(lines) - 1) + [False]


@pytest.mark.parametrize("path", [*WRAPPERS, SCRIPT, ROOT / "constraints.txt"], ids=lambda path: path.name)
def test_no_path_or_host_of_one_machine(path):
    text = path.read_text(encoding="utf-8").replace("https://download.pytorch.org/whl/", "")
    assert not re.findall(r"(?<![\w.}])/(?:root|home|work|opt|tmp|mnt|Users)\b|://|pyenv|--(?:extra-)?index-url", text)


def test_pins_satisfy_the_project():
    """Every dependency is pinned to a version that the project allows, but Triton, whose version torch decides."""
    extras = PROJECT["optional-dependencies"]
    pinned = pins()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["dev"]]):
        if requirement.name == "triton":
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} leaves out the tested {version}"


# Which Python


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.8", "3.10"])
@pytest.mark.parametrize("way", ["it runs the script", "it is asked for"])
def test_old_python_is_refused(tmp_path, version, way):
    """An old Python is refused in a single line."""
    old, folder = old_python(version), copy_checkout(tmp_path / "a checkout")
    runs_it, named = (PYTHON, old) if way == "it is asked for" else (old, "")
    # From the folder of the script: there Python 3.8 knows its file by a relative name.
    result = run([runs_it, "setup_venv.py"], folder / "scripts", ZIMAGE_PYTHON=named, PATH="")
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(
        rf"error: zimage-train needs Python 3\.11 or newer \(\S+ is {version}\.\d+[^)]*\); install one, or put .*\n",
        result.stderr,
    )
    assert not (folder / ".venv").exists()


def test_an_old_python_finds_a_newer_one(tmp_path):
    old, folder = old_python("3.8"), copy_checkout(tmp_path / "a checkout")
    executable(tmp_path / "path/python3.12", f'exec "{PYTHON}" "$@"')
    code = "import setup_venv; print(setup_venv.find_python('linux'))"
    result = run([old, "-c", code], folder / "scripts", ZIMAGE_PYTHON="", PATH=str(tmp_path / "path"))
    assert result.stdout == f"{PYTHON}\n", result.stderr


@pytest.mark.parametrize(
    ("platform", "versions", "taken"),
    [
        ("linux", {"this": "3.14.0", "python3": "3.12.1"}, "this"),
        ("linux", {"this": "3.9.6", "python3": "3.12.1", "python3.13": "3.13.0"}, "python3"),
        ("darwin", {"this": "3.9.6", "python3": "3.9.6", "python3.12": "3.12.1", "python3.11": "3.11.9"}, "python3.12"),
        ("linux", {"this": "3.9.6", "py -3.13": "3.13.0"}, None),
        ("win32", {"this": "3.13.0", "py -3.13": "3.13.1"}, "this"),
        ("win32", {"this": "3.10.4", "py -3.12": "3.12.1", "py -3.11": "3.11.9"}, "py -3.12"),
        ("win32", {"this": "3.10.4", "python": "3.11.9"}, "python"),
        ("win32", {"this": "3.10.4", "python3.12": "3.12.1"}, None),
    ],
)
def test_first_new_enough_python(monkeypatch, platform, versions, taken):
    """The first Python that is new enough is taken."""

    def describe(*command: str) -> dict | None:
        version = versions.get(" ".join(command))
        numbers = tuple(map(int, version.split("."))) if version else ()
        path = "/".join(command)
        return {"python": path, "version": f"{version} (main)", "is_new": numbers >= (3, 11)} if version else None

    monkeypatch.delenv("ZIMAGE_PYTHON", raising=False)
    monkeypatch.setattr(setup_venv, "describe", describe)
    monkeypatch.setattr(setup_venv.sys, "executable", "this")
    monkeypatch.setattr(setup_venv.shutil, "which", lambda name: None)
    if taken:
        assert setup_venv.find_python(platform).as_posix() == taken.replace(" ", "/")
    else:
        with pytest.raises(SystemExit, match=re.escape(f"(this is {versions['this']}, ")) as caught:
            setup_venv.find_python(platform)
        assert ("py -3.13 is missing" in str(caught.value)) == (platform == "win32")
        assert "\n" not in str(caught.value)


def test_python_inside_the_venv(tmp_path):
    """For a Python inside the venv, the Python that it was made with is taken."""
    folder = copy_checkout(tmp_path / "a checkout")
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    result = run([folder / ".venv/bin/python", folder / "scripts/setup_venv.py", "describe"], tmp_path)
    python = Path(json.loads(result.stdout)["python"])
    assert python.resolve() == Path(PYTHON).resolve()
    assert not python.is_relative_to(folder)


# When it installs


@pytest.mark.slow
def test_install_only_after_a_change(checkout, capfd):
    """Packages are installed when something changed, and only then."""
    log = checkout.root / "pip.log"

    def asked(extra: str = "") -> str:
        """What a set-up asks of pip."""
        log.unlink(missing_ok=True)
        capfd.readouterr()
        setup_venv.set_up(checkout, extra)
        if not log.exists():
            assert capfd.readouterr().out == f"{checkout.venv} is up to date\n"
            return "nothing"
        return asked_of_pip(checkout)["asked"]

    def change(name: str) -> None:
        path = checkout.root / name
        path.write_text(path.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")

    assert "-e .[ui] " in asked()
    assert asked() == "nothing"
    assert "-e .[dev] " in asked("dev")
    assert asked("dev") == "nothing"
    assert asked() == "nothing", "the quickstart after the tests has nothing to do"
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup_venv.py"):
        change(name)
        assert "-e .[dev] " in asked(), "and it leaves the dev tools in"
        assert asked("dev") == "nothing"
    change("README.md")
    assert asked() == "nothing"
    checkout.program("zimage-train").unlink()
    assert "-e .[dev] " in asked()


@pytest.mark.slow
def test_pip_uses_project_constraints(checkout, monkeypatch):
    """pip uses the constraints of the project, whatever its environment says."""
    monkeypatch.setenv("PIP_CONSTRAINT", "of-the-image.txt")
    monkeypatch.setenv("PIP_USER", "1")
    setup_venv.set_up(checkout)
    assert asked_of_pip(checkout) == {
        "asked": f"--disable-pip-version-check --no-input install -qq --constraint {checkout.root / 'constraints.txt'} "
        f"-e .[ui] torch=={pins()['torch']}",
        "PIP_CONSTRAINT": None,
        "PIP_USER": "0",
        "PIP_EXTRA_INDEX_URL": None,
    }


@pytest.mark.slow
def test_failed_install_is_retried(checkout, monkeypatch, capfd):
    """A failed install is tried again in the same venv."""
    monkeypatch.setenv("STUB_ERROR", "ERROR: no network")
    with pytest.raises(SystemExit, match=r"^error: pip could not install zimage-train; its own words are above$"):
        setup_venv.set_up(checkout)
    assert capfd.readouterr().err == "ERROR: no network\n"
    (checkout.venv / "kept").touch()
    monkeypatch.delenv("STUB_ERROR")
    setup_venv.set_up(checkout)
    assert (checkout.venv / "kept").exists()
    assert setup_venv.is_set_up(checkout, "")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off while pip was installing", "its interpreter is gone", "empty folders"])
def test_a_half_made_venv_is_made_anew(checkout, damage, capfd):
    if damage == "empty folders":
        checkout.program("python").parent.mkdir(parents=True)
        (checkout.venv / "Lib").mkdir()
    else:
        make_plain_venv(checkout)
        (checkout.venv / "half").touch()
    if damage == "its interpreter is gone":
        checkout.program("python").unlink()
    if damage == "cut off while pip was installing":
        checkout.write_stamp("unfinished")
    setup_venv.set_up(checkout)
    assert f"making {checkout.venv} with" in capfd.readouterr().out
    assert not (checkout.venv / "half").exists()
    subprocess.run([checkout.program("python"), "-c", ""], check=True)


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize(("cut", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_cut_off_install_is_unfinished(checkout, monkeypatch, cut, code):
    """An install that is cut off leaves the venv marked as unfinished."""
    make_plain_venv(checkout)
    monkeypatch.setenv("STUB_SECONDS", "60")
    # What runs the tests may ignore Ctrl-C, and its children with it.
    listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [PYTHON, "-c", listen, BASH, checkout.root / "scripts/quickstart.sh"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (checkout.root / "pip.log").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, cut)  # as a terminal does at Ctrl-C: to pip as well
        assert process.wait(300) == code
    finally:
        process.kill()
        process.wait()
    assert checkout.read_stamp() == ("unfinished", "")
    assert not checkout.program("zimage-train").exists()


def test_other_folder_is_left_alone(checkout):
    """A folder that is no virtual environment is left alone."""
    checkout.venv.mkdir()
    (checkout.venv / "thesis.txt").touch()
    with pytest.raises(SystemExit, match=r"is no virtual environment; move it$"):
        setup_venv.set_up(checkout)
    assert (checkout.venv / "thesis.txt").exists()


@on_linux
def test_linked_venv_is_not_emptied(checkout, tmp_path):
    """A venv that is a link to a folder elsewhere is replaced, and the folder is not emptied."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.txt").touch()
    checkout.venv.symlink_to(tmp_path / "elsewhere")
    setup_venv.set_up(checkout)
    assert not checkout.venv.is_symlink()
    assert (tmp_path / "elsewhere/thesis.txt").exists()


@pytest.mark.parametrize("checkout", ["win32"], indirect=True)
def test_a_venv_in_use_is_named(checkout, monkeypatch):
    def in_use(path: str) -> None:
        raise PermissionError(13, "Access is denied", path)

    make_plain_venv(checkout)
    checkout.write_stamp("unfinished")
    monkeypatch.setattr(setup_venv.shutil, "rmtree", in_use)
    with pytest.raises(SystemExit, match=r"cannot be removed \(.*Access is denied.*\); end what runs in it"):
        setup_venv.set_up(checkout)


def test_missing_venv_module(checkout, stubs):
    """Without the `venv` module, Debian's package is named."""
    executable(stubs / "python", f'[ "$2" != venv ] || exit 1; exec "{PYTHON}" "$@"')
    with pytest.raises(SystemExit, match="cannot make a virtual environment") as caught:
        setup_venv.set_up(checkout)
    assert ("apt-get install python3-venv" in str(caught.value)) == (checkout.platform == "linux")


# Which torch


@pytest.mark.slow
@pytest.mark.parametrize(("driver", "asked"), [("exit 0", "torch"), ("exit 9", f"torch=={pins()['torch']}")])
def test_torch_by_the_driver(checkout, stubs, capfd, driver, asked):
    executable(stubs / "nvidia-smi", driver)
    setup_venv.set_up(checkout)
    command = asked_of_pip(checkout)
    assert command["asked"].endswith(f" -e .[ui] {asked}")
    has_index = driver == "exit 0" and checkout.platform == "win32"
    assert command["PIP_EXTRA_INDEX_URL"] == (setup_venv.WINDOWS_CUDA_INDEX if has_index else None)
    out = capfd.readouterr().out
    assert ("without CUDA, so the GPU stays idle" in out) == (driver == "exit 0")
    assert ("fetches gigabytes of CUDA" in out) == (driver == "exit 9" and checkout.platform == "linux")
    assert ("macOS: torch" in out) == (driver == "exit 9" and checkout.platform == "darwin")


@pytest.mark.parametrize("checkout", ["win32"], indirect=True)
def test_windows_keeps_the_users_index(checkout, stubs, monkeypatch):
    """On Windows, the package index that the user names is asked."""
    executable(stubs / "nvidia-smi", "exit 0")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "of-the-user")
    setup_venv.set_up(checkout)
    assert asked_of_pip(checkout)["PIP_EXTRA_INDEX_URL"] == "of-the-user"


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
def test_torch_is_kept(tmp_path, monkeypatch, capfd, version, cuda, kept):
    """A torch is kept if it has CUDA and is new enough."""
    for name, text in torch_files(version, cuda).items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    found = setup_venv.usable_cuda_torch(Checkout(ROOT, "linux"), setup_venv.describe(PYTHON))
    assert found == (version if kept else None)
    assert ("is too old" in capfd.readouterr().err) == (cuda is not None and not kept)


@pytest.mark.slow
def test_torch_of_the_interpreter(tmp_path, monkeypatch):
    """The CUDA torch of the interpreter is used, and not replaced.

    This is a whole set-up on an interpreter with such a torch, except that pip only reports what it would install.
    """
    checkout = Checkout(copy_checkout(tmp_path / "a checkout"), "linux")
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

    monkeypatch.setenv("ZIMAGE_PYTHON", str(pod))

    def would_install(report: Path, *options: str) -> dict[str, str]:
        def pip(checkout: Checkout, *arguments: str, **_) -> int:
            command = [pod, tmp_path / "pip/pip", "--python", checkout.program("python"), *arguments, *options]
            return run([*command, "--dry-run", "--report", report], checkout.root).returncode

        monkeypatch.setattr(setup_venv, "pip", pip)
        setup_venv.set_up(checkout)
        listed = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in listed}

    installed = would_install(tmp_path / "with.json")
    assert {"zimage-train", "diffusers", "peft", "accelerate"} <= set(installed)
    assert "torch" not in installed
    assert "include-system-site-packages = true" in (checkout.venv / "pyvenv.cfg").read_text(encoding="utf-8")
    constraints = (checkout.venv / "constraints.txt").read_text(encoding="utf-8")
    assert f"\ntorch=={version}\n" in constraints

    # Without it, torch would come, in the tested version: the report above left it out for the right reason.
    subprocess.run([str(pod), "-m", "pip", "uninstall", "-q", "-y", "torch"], check=True)
    assert would_install(tmp_path / "without.json", "--no-deps")["torch"].partition("+")[0] == pins()["torch"]


# What the commands hand on


@pytest.fixture
def ready(checkout: Checkout, stubs: Path) -> Path:
    """A checkout that is set up, with stubs in .venv which say how they were called."""
    make_plain_venv(checkout)
    executable(checkout.program("zimage-train"), 'printf "<%s>" "$@"; exit "${TRAIN:-0}"')
    executable(checkout.program("ruff"), 'echo "ruff $*"; exit "${RUFF:-0}"')
    executable(checkout.program("pyright"), 'echo "pyright $*"; exit "${PYRIGHT:-0}"')
    body = "import os, sys; print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:]); sys.exit(int(os.environ['PYTEST']))"
    write_stub_module(stubs / "modules", "pytest", body)
    checkout.write_stamp(str(setup_venv.setup_key(checkout)), "dev")
    return checkout.root


@on_linux
def test_quickstart_passes_its_options(ready, tmp_path):
    """The quickstart trains with the options that it was given."""
    command = [BASH, ready / "scripts/quickstart.sh", "--set", "name=two words"]
    result = run(command, tmp_path, TRAIN="130")
    assert f"{ready}/.venv is up to date\ntraining: .venv/bin/zimage-train train" in result.stdout, result.stderr
    assert result.stdout.endswith("<train><configs/quickstart.yaml><--set><name=two words>")
    assert result.returncode == 130


@pytest.mark.parametrize("checkout", ["win32"], indirect=True)
def test_quickstart_waits_on_windows(ready, checkout, monkeypatch, capfd):
    """On Windows, the quickstart waits for the training."""
    monkeypatch.setenv("TRAIN", "130")
    monkeypatch.setattr(setup_venv.os, "execv", None)
    monkeypatch.chdir(ready)
    assert setup_venv.main(checkout, "quickstart", "--set", "name=two words") == 130
    assert capfd.readouterr().out.endswith("<train><configs/quickstart.yaml><--set><name=two words>")


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize(
    ("ruff", "pyright", "tests", "code"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (1, 1, 2, 2), (0, 0, 5, 5)],
)
def test_linters_and_tests_both_count(ready, ruff, pyright, tests, code):
    """The tests run whatever the linters report, and failures of either fail the script."""
    codes = {"RUFF": str(ruff), "PYRIGHT": str(pyright), "PYTEST": str(tests)}
    result = run([BASH, "test.sh", "-k", "one thing"], ready / "scripts", OMP_NUM_THREADS="7", **codes)
    assert result.returncode == code
    folders = "zimage_train scripts tests"
    assert f"ruff check {folders}\nruff format --check {folders}\npyright \n1 -n 2 --dist loadfile" in result.stdout
    assert result.stdout.endswith("--durations 20 -p scripts.test_report -k one thing\n")
    assert ("ruff or pyright found something" in result.stderr) == (tests == 0 and code == 1)


@on_linux
def test_ci_runs_the_tests(ready):
    shutil.copytree(ROOT / ".ci", ready / ".ci")
    result = run([BASH, ".ci/run"], ready, PYTEST="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("-p scripts.test_report\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--dev"], ["install"], ["install", "--dev"]])
def test_install_says_what_to_do_next(checkout, monkeypatch, capfd, arguments):
    monkeypatch.chdir(checkout.root)
    assert setup_venv.main(checkout, *arguments) == 0
    assert ("-e .[dev]" in asked_of_pip(checkout)["asked"]) == ("--dev" in arguments)
    last = capfd.readouterr().out.splitlines()[-1]
    assert ("Scripts\\activate" in last) == (checkout.platform == "win32")
    assert ("source .venv/bin/activate" in last) == (checkout.platform != "win32")


@on_linux
def test_mistyped_command(checkout, monkeypatch):
    """A mistyped command installs nothing."""
    monkeypatch.chdir(checkout.root)
    with pytest.raises(SystemExit, match="no such command or option: tset --dev"):
        setup_venv.main(checkout, "tset", "--dev")
    assert not checkout.venv.exists()
