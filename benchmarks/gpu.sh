#!/usr/bin/env bash
# All figures of a GPU in under eight minutes, the most important first:
#
#     bash benchmarks/gpu.sh [--dry-run] [FOLDER]
#
# Each part has a time limit. What is known is in FOLDER/gpu.jsonl and FOLDER/gpu.log at every moment (by
# default benchmarks/gpu-results). --dry-run goes through all parts at small sizes, on a CPU too.
set -u
dry_run=() times=1
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=(--dry-run) times=5  # a CPU may be slow, and busy
    shift
fi
folder=$(mkdir -p "${1:-$(dirname "$0")/gpu-results}" && cd "${1:-$(dirname "$0")/gpu-results}" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0
measure() {  # SECONDS PART:SECONDS ...
    timeout --kill-after=5 $(($1 * times)) \
        "${PYTHON:-python}" benchmarks/gpu.py "${@:2}" "${dry_run[@]}" --output "$folder/gpu.jsonl" 2>&1 |
        tee -a "$folder/gpu.log"
    code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then
        echo "${*:2} ended with $code (124: after $(($1 * times)) s)" | tee -a "$folder/gpu.log"
        failed=1
    fi
}
measure 140 captions:125
measure 135 step:65 memory:20 lengths:20 profile:25
measure 130 compile:70 fp8:50
measure 70 scaling:60
exit "$failed"
