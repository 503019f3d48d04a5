#!/usr/bin/env bash
# From a fresh machine to a finished LoRA: makes .venv, installs, trains the miniature. Three minutes without a GPU,
# downloads aside.
#   bash scripts/quickstart.sh [options of zimage-train train, such as --set train.steps=20]
exec "$(command -v python3 || command -v python || echo "${ZIMAGE_PYTHON:-python3}")" "$(dirname "${BASH_SOURCE[0]}")/setup_venv.py" quickstart "$@"
