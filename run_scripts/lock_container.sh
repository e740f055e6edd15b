#!/usr/bin/env bash
# Writes the lock files of the container: the exact versions, and digests, of what pyproject.toml asks for.
# Usage: bash run_scripts/lock_container.sh [CONSTRAINTS]     (uv must be on the PATH; CONSTRAINTS: versions to keep to, as
#        `pip freeze` of a tested environment prints them)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
constraints=${1:-}
all=$(mktemp)
trap 'rm -f "$all"' EXIT
uv pip compile pyproject.toml --extra serve --extra pyav --extra lora ${constraints:+--constraint "$constraints"} \
    --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links --quiet \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --output-file "$all" >/dev/null
# what a CPU does not need, and torch itself, are a list of their own
python3 - "$all" <<'PYTHON'
import re
import sys
from pathlib import Path

entries = re.findall(r"^\S+==(?:.*\\\n)*.*\n", Path(sys.argv[1]).read_text(), re.M)
gpu = re.compile(r"(torch|torchvision|triton|nvidia-|cuda-)[\w-]*==")
lists = {"requirements.txt": [], "requirements-cuda.txt": []}
for entry in entries:
    lists["requirements-cuda.txt" if gpu.match(entry) else "requirements.txt"].append(entry)
for name, found in lists.items():
    Path("docker", name).write_text("# written by run_scripts/lock_container.sh\n" + "".join(found))
PYTHON
