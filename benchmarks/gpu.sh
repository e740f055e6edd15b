#!/usr/bin/env bash
# All figures of a GPU in under eight minutes, the most important first:
#
#     bash benchmarks/gpu.sh [--dry-run] [FOLDER]
#
# Each part has a time limit. What is known is in FOLDER/gpu.jsonl and FOLDER/gpu.log at every moment (by
# default benchmarks/gpu-results). --dry-run goes through all parts at small sizes, on a CPU too.
set -u
dry_run=()
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=(--dry-run)
    shift
fi
folder=$(mkdir -p "${1:-$(dirname "$0")/gpu-results}" && cd "${1:-$(dirname "$0")/gpu-results}" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=. HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0
measure() {  # SECONDS PART:SECONDS ...
    timeout --kill-after=5 "$1" \
        "${PYTHON:-python}" benchmarks/gpu.py "${@:2}" "${dry_run[@]}" --output "$folder/gpu.jsonl" 2>&1 |
        tee -a "$folder/gpu.log"
    code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then
        echo "${*:2} ended with $code (124: after $1 s)" | tee -a "$folder/gpu.log"
        failed=1
    fi
}
measure 150 captions:130
measure 145 step:70 memory:25 lengths:25 profile:30
measure 100 compile:85
measure 80 scaling:70
exit "$failed"
