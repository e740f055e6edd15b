#!/usr/bin/env bash
# Installs what is missing and runs the tests. Arguments go to pytest: bash run_scripts/test.sh tests/models -k merging
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/install.sh tests
# the tests need no network: nothing may be fetched behind their back
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
