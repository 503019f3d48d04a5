#!/usr/bin/env bash
# All checks, on a fresh machine too: makes .venv with the dev tools, then runs ruff, pyright and pytest.
#   bash scripts/test.sh [options of pytest, such as -m 'not slow' or -k export]
exec "$(command -v python3 || command -v python || echo "${ZIMAGE_PYTHON:-python3}")" "$(dirname "${BASH_SOURCE[0]}")/setup_venv.py" test "$@"
