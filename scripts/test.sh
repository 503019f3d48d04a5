#!/usr/bin/env bash
# All checks, on a fresh machine too: makes .venv with the dev tools, then runs ruff, pyright and pytest.
#   bash scripts/test.sh [options of pytest, such as -m 'not slow' or -k export]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv dev
export OMP_NUM_THREADS=1 # two workers; torch's own threads would fight them for the cores

lint=0
"$VENV/bin/ruff" check zimage_train scripts tests || lint=$?
"$VENV/bin/ruff" format --check zimage_train scripts tests || lint=$?
"$VENV/bin/pyright" || lint=$?

tests=0
"$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@" || tests=$?

[ "$tests" -eq 0 ] || exit "$tests"
[ "$lint" -eq 0 ] || fail "the tests passed, but ruff or pyright found something: see above the tests"
