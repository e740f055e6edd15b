#!/usr/bin/env bash
# Writes captions of photographs with the captioner in checkpoints/photos; the first time it installs the package and
# fetches the pretrained parts (get_parts.sh).
# Usage: bash run_scripts/photos/caption.sh IMAGE...       (files, folders or addresses; options as of `evlgen caption`)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ $# -eq 0 ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
bash "$root/run_scripts/photos/get_parts.sh" >&2
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$root/.venv/bin/python" -m evlgen caption --checkpoint "$root/checkpoints/photos" "$@"
