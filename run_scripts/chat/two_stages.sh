#!/usr/bin/env bash
# Trains a recipe of projects/chat in its two stages: the connector, then connector and language model from it.
# Run it again after an interruption: a stage goes on from its newest checkpoint.
#   bash run_scripts/chat/two_stages.sh llava15 8          # or tomeformer; 8 processes, one for each GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=${1:-llava15}
processes=${2:-8}
for stage in pretrain finetune; do
  torchrun --nproc-per-node "$processes" train.py --cfg-path "projects/chat/${recipe}_${stage}.yaml" \
    --options run.resume=auto
done
