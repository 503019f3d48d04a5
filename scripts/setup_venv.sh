# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: `setup_venv [dev]` makes .venv and installs the package and its dependencies, once.
#
# For Linux. Written to work on macOS 14+ with Apple silicon too (bash 3.2, no GNU tools), but untested there. On Windows, use WSL.
#
#   ZIMAGE_PYTHON   the interpreter to use; else the first of python3, python3.13, python3.12, python3.11 that is new enough
#   PIP_*           pip's own settings hold: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can name a place with a CPU-only torch
#
# Which torch: a CUDA torch that the interpreter already has (images of rented GPUs) is used as it is and never replaced;
# otherwise the version in constraints.txt, in the build that pip prefers.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
STAMP=$VENV/zimage-train-setup # line 1: the setup_key of what was installed, or "unfinished"; line 2: the extra, "dev" or empty

setup_venv() {
  local extra=${1:-} python
  cd "$ROOT"
  [ "$(stamped 2)" != dev ] || extra=dev # the dev tools, once in, stay in
  if is_set_up "$extra"; then
    say "$VENV is up to date"
    return
  fi
  if [ "$(stamped 1)" = unfinished ] || ! venv_works; then
    python=$(find_python)
    make_venv "$python"
  fi
  install_package "$extra"
}

say() { printf '%s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

stamped() { sed -n "$1p" "$STAMP" 2>/dev/null || true; }

is_set_up() {
  local key
  key=$(setup_key) && [ "$(stamped 1)" = "$key" ] && [ "$(stamped 2)" = "$1" ] && [ -x "$VENV/bin/zimage-train" ]
}

# A checksum of all that decides what is installed; fails where .venv has no working Python.
setup_key() {
  "$VENV/bin/python" - "$ROOT" 2>/dev/null <<'PY'
import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

root = Path(sys.argv[1])
try:
    torch = version("torch")
except PackageNotFoundError:
    torch = None
key = hashlib.sha256(repr((str(root), sys.version, torch)).encode())
for name in ("pyproject.toml", "constraints.txt", "scripts/setup_venv.sh"):
    key.update((root / name).read_bytes())
print(key.hexdigest())
PY
}

venv_works() {
  "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && venv_pip --version >/dev/null 2>&1
}

# pip in .venv. Some GPU images set PIP_CONSTRAINT to the versions they were built with; here constraints.txt decides.
venv_pip() { env -u PIP_CONSTRAINT PIP_USER=0 "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# Prints the path of a Python that is new enough.
find_python() {
  local candidate answer found=""
  if [ -n "${ZIMAGE_PYTHON:-}" ]; then set -- "$ZIMAGE_PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
  for candidate in "$@"; do
    answer=$(describe_python "$candidate") || answer=missing
    case $answer in
      "new enough "*)
        say "${answer#new enough }"
        return
        ;;
      *) found="$found, $candidate is $answer" ;;
    esac
  done
  fail "zimage-train needs Python 3.11 or newer (${found#, }); install one, or name it: ZIMAGE_PYTHON=/path/to/python bash $0"
}

# "new enough PATH" or the version. A Python inside .venv stands for the one that .venv was made from.
describe_python() {
  "$1" - "$VENV" 2>/dev/null <<'PY'
import os, sys

if sys.version_info < (3, 11):
    print("%d.%d.%d" % sys.version_info[:3])
else:
    inside = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])
    print("new enough " + (sys._base_executable if inside else sys.executable))
PY
}

# The version of the CUDA torch that the interpreter $1 sees, if it is one that pyproject.toml admits. Does not import torch.
cuda_torch() {
  "$1" - "$ROOT/pyproject.toml" <<'PY'
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

try:
    installed = version("torch")
    facts = runpy.run_path(str(Path(find_spec("torch").origin).with_name("version.py")))
except (PackageNotFoundError, AttributeError, OSError):
    sys.exit()
if not facts.get("cuda"):
    sys.exit()
least = re.search(r'"torch>=(\d+)\.(\d+)', Path(sys.argv[1]).read_text(encoding="utf-8")).groups()
*release, rest = re.match(r"(\d+)\.(\d+)(.*)", installed).groups()
early = re.match(r"(\.\d+)*\.?(a|b|rc|dev)", rest) is not None  # 2.7.0a0 comes before 2.7
if (int(release[0]), int(release[1]), not early) >= (int(least[0]), int(least[1]), True):
    print(installed)
else:
    print(f"the torch {installed} of {sys.executable} is too old: {'.'.join(least)} is needed", file=sys.stderr)
PY
}

make_venv() {
  local python=$1 torch
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && ls -A "$VENV" | grep -qvxE 'bin|include|lib|lib64|zimage-train-setup'; then
    fail "$VENV is in the way and is no virtual environment; move it"
  fi
  torch=$(cuda_torch "$python")
  say "making $VENV with $python${torch:+ and its torch $torch}"
  rm -rf "$VENV"
  mkdir "$VENV"
  echo unfinished >"$STAMP"
  "$python" -m venv ${torch:+--system-site-packages} "$VENV" >&2 ||
    fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  # Where the interpreter is itself of a virtual environment, "system" means the one beneath it: point to its packages.
  if [ -n "$torch" ] && [ "$(cuda_torch "$VENV/bin/python")" != "$torch" ]; then
    "$python" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])' \
      >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/interpreter-packages.pth"
  fi
}

install_package() {
  local extra=$1 package=. constraints=$ROOT/constraints.txt tested torch key
  tested=$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")
  torch=$(cuda_torch "$VENV/bin/python")
  [ -z "$extra" ] || package=".[$extra]"
  set -- -e "$package"
  if [ -n "$torch" ]; then
    say "keeping the CUDA torch $torch that is already there"
    constraints=$VENV/constraints.txt
    sed "s/^torch==.*/torch==$torch/" "$ROOT/constraints.txt" >"$constraints"
  elif nvidia_driver; then
    say "NVIDIA driver found: torch $tested with CUDA"
    set -- "$@" torch
  else
    say "no NVIDIA driver: torch $tested for the CPU"
    set -- "$@" "torch==$tested"
    warn_of_cuda_download "$tested"
  fi
  say "installing zimage-train${extra:+ and the $extra tools} into $VENV; the first time takes minutes"
  echo unfinished >"$STAMP"
  trap 'exit 130' INT # cut off in the middle, by this or worse, .venv stays unfinished and the next run makes it anew
  if ! venv_pip install -qq --constraint "$constraints" "$@"; then
    : >"$STAMP" # a clean failure (no network, no such version) spoils nothing: the next run goes on from here
    fail "pip could not install zimage-train; its own words are above"
  fi
  trap - INT
  if nvidia_driver && [ -z "$(cuda_torch "$VENV/bin/python")" ]; then
    say "note: $VENV holds a torch without CUDA, so the GPU stays idle; to get the CUDA build, remove $VENV and run this again"
  fi
  key=$(setup_key)
  printf '%s\n%s\n' "$key" "$extra" >"$STAMP"
}

nvidia_driver() { nvidia-smi >/dev/null 2>&1; }

# On Linux the default index has only the CUDA build; say so before gigabytes come, unless pip knows of a CPU build.
warn_of_cuda_download() {
  [ "$(uname -s)" = Linux ] || return 0
  ! venv_pip show -qq torch 2>/dev/null || return 0
  ! venv_pip install -qq --dry-run --no-deps "torch==$1+cpu" 2>/dev/null || return 0
  say "note: pip finds no CPU-only torch and fetches gigabytes of CUDA; PIP_EXTRA_INDEX_URL=(PyTorch's CPU index) avoids that"
}
