#!/usr/bin/env bash
# From a fresh machine to a finished LoRA: makes .venv, installs, trains the miniature. Three minutes without a GPU,
# downloads aside.
#   bash scripts/quickstart.sh [options of zimage-train train, such as --set train.steps=20]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv
say "training: .venv/bin/zimage-train train configs/quickstart.yaml${*:+ $*}"
exec "$VENV/bin/zimage-train" train configs/quickstart.yaml "$@"
