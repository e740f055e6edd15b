#!/usr/bin/env bash
# Reads 20,000 damaged configurations, annotations, checkpoints, tables, tar files, images and videos each; 1 where
# anything but our own errors came out.
# Usage: bash run_scripts/fuzz.sh [--inputs 20000] [--kinds configs annotations checkpoints tables tars images pyav decord gif]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/install.sh tests
export PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
exec .venv/bin/python -m fuzzing "$@"
