#!/usr/bin/env bash
# From nothing to a trained captioner: makes .venv, installs, trains a TomeFormer between the bundled frozen backbones on
# the Shapes world, evaluates on held-out images and writes captions.png. No download but the packages; no GPU needed.
# Usage: bash run_scripts/quickstart.sh [KEY=VALUE ...]      (changes to the configuration, such as run.max_iters=200)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/install.sh
export TOKENIZERS_PARALLELISM=false
.venv/bin/python train.py --cfg-path projects/shapes/caption.yaml --options run.max_iters=900 run.output_dir=output/quickstart "$@"
result=output/quickstart/latest/result/test
cp "$result/captions.png" captions.png
echo
.venv/bin/python - "$result" <<'PY'
import json
import sys

metrics = json.load(open(f"{sys.argv[1]}/metrics.json"))
left_out = metrics.pop("left_out", {})
print("held-out images:  " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
PY
echo "images with their captions: $PWD/captions.png"
echo "the trained model:            $PWD/output/quickstart/latest/checkpoints/best"
echo "caption an image with it:     .venv/bin/python -m evlgen caption IMAGE --checkpoint output/quickstart/latest/checkpoints/best"
