#!/usr/bin/env bash
# Trains the bundled connector of the Shapes world again: train.py on projects/shapes/caption.yaml. About 7 minutes on two cores.
# Usage: bash run_scripts/make_shapes_connector.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/python train.py --cfg-path projects/shapes/caption.yaml \
    --options run.output_dir=output/shapes_connector "$@"
made=output/shapes_connector/latest/checkpoints/latest
echo "The connector is in $made. To bundle it: cp $made/model.safetensors $made/config.yaml evlgen/assets/shapes/connector/"
