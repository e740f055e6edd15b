#!/usr/bin/env bash
# Trains the backbones of the Shapes world again, as bundled in evlgen/assets/shapes: vision encoder and language model.
#   bash run_scripts/make_shapes_backbones.sh [OUTPUT_FOLDER [STEPS]]
# About 20 minutes on two cores. STEPS shortens every training, to see that the recipe runs.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="${1:-$root/output/shapes_backbones}"
steps=(${2:+--steps "$2"})
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false

mkdir -p "$output"
for part in vision language; do
    "$python" "$root/run_scripts/shapes/train_$part.py" --output "$output" ${steps[@]+"${steps[@]}"}
done
"$python" "$root/run_scripts/shapes/write_card.py" --output "$output"
echo "Backbones are in $output. To bundle them: cp -r $output/{vision.safetensors,language,CARD.md} $root/evlgen/assets/shapes/"
