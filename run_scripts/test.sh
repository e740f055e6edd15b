#!/usr/bin/env bash
# Installs what is missing and runs the tests. Arguments go to pytest: bash run_scripts/test.sh tests/models -k merging
# Tests marked slow or gpu (see pyproject.toml) run with --all: bash run_scripts/test.sh --all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/install.sh tests
# the tests need no network: nothing may be fetched behind their back
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# several processes of one thread each, a file of tests at a time: twice as fast as one process of several threads
export OMP_NUM_THREADS=1
processes=$(.venv/bin/python -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
exec .venv/bin/python -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder "$@"
