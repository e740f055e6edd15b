#!/usr/bin/env bash
# Makes .venv in the project's folder and installs the package and what it needs into it. Does nothing when that is done.
# Usage: bash run_scripts/install.sh [EXTRA]        (EXTRA: tests)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed, and none was found on the PATH." >&2
    return 1
}

if ! [ -x .venv/bin/python ]; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "error: $python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
fi

# installed before, from the same pyproject.toml and folder?
stamp=.venv/.installed${extra:+-$extra}
wanted="$(cksum <pyproject.toml) $PWD"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "installing (a few minutes and some GB the first time: PyTorch is large)"
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet -e ".${extra:+[$extra]}"
    echo "$wanted" >"$stamp"
fi
