#!/usr/bin/env bash
# Tiles between the parts of run_scripts/photos/get_parts.sh on Flickr8k, whose photographs have 224 x 224 pixels: an overview and four tiles
# of 112 pixels against one image of 224 and one of 112, all with 15 soft prompts and the same captions. The table of docs/parts.md.
# Usage: bash benchmarks/tiles.sh [NAME ...]      (names below; default: all; what was stopped goes on)
#   BUDGET=60it SEEDS=42 SAMPLES=128 FOLDER=output/tiles
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${FOLDER:-output/tiles} python=${PYTHON:-.venv/bin/python}
bert="num_layers: 5, residual: true, init: cache://parts/minilm-l6, init_lr_scale: 0.1, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0"
tiles="max: 4, overview: true"

names=("$@")
[ $# -gt 0 ] || names=(large before after small)
for name in "${names[@]}"; do   # the encoder has 49 tokens of 224 pixels and 16 of 112
    case $name in
        small) r="[1, 0, 0, 0, 0]" options=(model.vision.image_size=112) ;;
        large) r="[7, 7, 7, 7, 6]" options=() ;;
        before) r="[3, 3, 3, 2, 2], r_per_image: true" options=(model.vision.image_size=112 "model.vision.tiles={$tiles, join: before}") ;;
        after) r="[3, 3, 3, 2, 2]" options=(model.vision.image_size=112 "model.vision.tiles={$tiles, join: after}") ;;
        *) echo "unknown: $name" >&2; exit 1 ;;
    esac
    resume=()
    [ ! -e "$folder/$name/plan.json" ] || resume=(--resume)
    "$python" -m evlgen compare --cfg-path projects/photos/flickr8k_lite.yaml --grid "model.connector={name: tomeformer, r: $r, $bert}" \
        --budget "${BUDGET:-60it}" --seeds "${SEEDS:-42}" --split val --evaluate-samples "${SAMPLES:-128}" --output "$folder/$name" \
        ${resume[@]+"${resume[@]}"} --options model.language.lora=null datasets.image_text.captions_together=false run.cache_vision=false \
        run.batch_size_train=32 run.warmup_steps=20 run.min_lr=1.0e-3 run.num_beams=1 run.max_len=20 run.image_use_samples=256 \
        run.metrics=[bleu,meteor,cider] run.log_freq=10 ${options[@]+"${options[@]}"}
done
