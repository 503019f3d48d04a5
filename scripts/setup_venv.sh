# Sourced by quickstart.sh and test.sh: setup_venv makes .venv and installs the package into it, once.
#
# Linux; written so that macOS 14 or newer on Apple silicon works too (bash 3.2), which nobody has tried. Not Windows: use WSL there.
#
#   ZIMAGE_PYTHON   the interpreter to use; otherwise the first of python3, python3.13, python3.12, python3.11 that is new enough
#   PIP_*           pip's own settings hold: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can name a place with a CPU-only torch
#
# Which torch: a CUDA torch that the interpreter already sees (the images of rented GPUs) is used as it is; otherwise the version
# in constraints.txt, in whichever build pip prefers.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
STAMP=$VENV/.zimage-train # line 1: setup_key of the finished set-up, or "unfinished"; line 2: "dev" where the dev tools are in it

say() { printf '%s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the path of a Python that is new enough. One inside .venv stands for the interpreter .venv was made from.
find_python() {
  local candidate path seen=""
  for candidate in ${ZIMAGE_PYTHON:+"$ZIMAGE_PYTHON"} ${ZIMAGE_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if path=$("$candidate" - "$VENV" 2>/dev/null <<'PY'
import sys
print("%d.%d.%d" % sys.version_info[:3])
print(sys._base_executable if sys.prefix == sys.argv[1] else sys.executable)
sys.exit(sys.version_info < (3, 11))
PY
    ); then
      printf '%s\n' "$path" | tail -n 1
      return
    fi
    [ -z "$path" ] || seen="$seen, $candidate is $(printf '%s\n' "$path" | head -n 1)"
  done
  fail "zimage-train needs Python 3.11 or newer${seen:+ (${seen#, })}; install one, or name it: ZIMAGE_PYTHON=/path/to/python bash $0"
}
