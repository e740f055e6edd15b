#!/usr/bin/env bash
# Installs the oldest releases that pyproject.toml admits into a folder of their own, and runs the core of the tests with them.
# Usage: bash run_scripts/oldest.sh [FOLDER] [PYTEST ARGUMENTS ...]      (default: .venv-oldest; the tests named below)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.venv-oldest}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- tests/models tests/datasets tests/processors tests/tasks tests/common tests/test_minimal.py tests/test_cli.py
[ -x "$folder/bin/python" ] || ${PYTHON:-python3} -m venv "$folder"
"$folder/bin/python" -m pip install --quiet uv
"$folder/bin/uv" pip install --python "$folder/bin/python" --resolution lowest-direct -e ".[tests]"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec "$folder/bin/python" -m pytest -p no:cacheprovider "$@"
