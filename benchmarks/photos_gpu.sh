#!/usr/bin/env bash
# Everything on photographs that takes hours on a processor, in ten minutes on a GPU, the most important first: captioners with and
# without adapters (all validation photographs, 5 beams), questions, self-critical training; every connector after 1,000 steps of
# 32 captions, the TomeFormer with three seeds; a tenth, a quarter, a half and all of the data; values of r.
#
#     bash run_scripts/photos/get_parts.sh      # and flickr8k/, daquar/ in the data root
#     bash benchmarks/photos_gpu.sh [--dry-run] [FOLDER [NAME ...]]      (default: output/photos_gpu, all names of `all_jobs` below)
#
# JOBS=4 processes share the card, as one of so small a model leaves it idle. What is not done after LIMIT=540 seconds is stopped; the same
# command goes on with it. FOLDER/NAME.log has each job's output, FOLDER/tables.md what is known. --dry-run: two steps of each.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=0
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
[ $# -gt 0 ] || set -- output/photos_gpu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
wanted=" $* "
cd "$root" || exit 1
export PYTHON=${PYTHON:-.venv/bin/python} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
begun=$(date +%s)
export folder dry begun
metrics="[bleu,rouge_l,cider]"
! command -v java >/dev/null || metrics="[bleu,meteor,rouge_l,cider]"
export metrics

all_jobs() {  # NAME WHAT ..., the most important first
    echo "captioner_adapters captioner adapters"
    echo "captioner_frozen captioner frozen"
    for seed in 42 43 44; do echo "tomeformer_$seed connector tomeformer $seed 6000"; done
    for name in qformer resampler mlp pool tomeformer_random pixel_shuffle c_abstractor qformer_two_stages; do
        echo "${name}_42 connector $name 42 6000"
    done
    for images in 600 1500 3000; do
        for name in tomeformer qformer_two_stages; do echo "${name}_42_$images connector $name 42 $images"; done
    done
    for r in 0 3 5 9; do echo "tomeformer_r${r}_42 connector tomeformer_r$r 42 6000"; done
    for name in tomeformer_no_residual tomeformer_one_rate tomeformer_scale_1; do echo "${name}_42 connector $name 42 6000"; done
    for seed in 43 44; do for name in qformer resampler; do echo "${name}_$seed connector $name $seed 6000"; done; done
}

train() {  # OUTPUT PROJECT OPTIONS: goes on where it was stopped
    local output=$folder/$1 project=$2
    shift 2
    "$PYTHON" train.py --cfg-path "projects/photos/$project.yaml" --options "run.output_dir=$output" run.resume=auto "$@"
}

scores() {  # OUTPUT PROJECT OPTIONS: of its best weights, on the whole validation split
    local output=$folder/$1 project=$2
    shift 2
    "$PYTHON" evaluate.py --cfg-path "projects/photos/$project.yaml" --options "run.output_dir=$output/scores" \
        "model.checkpoint=$output/latest/checkpoints/best" "run.test_splits=[val]" "$@"
}

captioner() {
    local length=(run.max_iters=3000 run.iters_per_inner_epoch=500 run.batch_size_train=64) fewer=() few=()
    local only=("run.metrics=$metrics") same=(run.batch_size_eval=128)
    [ "$1" = adapters ] || same+=(model.language.lora=null)
    if [ "$dry" = 1 ]; then
        length=(run.max_iters=2 run.iters_per_inner_epoch=2 run.batch_size_train=2 run.max_valid_samples=2 run.image_use_samples=2)
        fewer=("${length[@]}") few=(run.max_eval_samples=4)
    fi
    train "captioner_$1" flickr8k_lite "${only[@]}" "${same[@]}" "${length[@]}" &&
        scores "captioner_$1" flickr8k_lite "${only[@]}" "${same[@]}" ${few[@]+"${few[@]}"} || return
    [ "$1" = adapters ] || return 0
    local start=model.checkpoint=$folder/captioner_adapters/latest/checkpoints/best
    train questions daquar_lite "$start" ${fewer[@]+"${fewer[@]}"} && scores questions daquar_lite ${few[@]+"${few[@]}"}
    train self_critical flickr8k_scst "$start" "${only[@]}" run.max_iters=400 run.test_splits=[] ${fewer[@]+"${fewer[@]}"} &&
        scores self_critical flickr8k_scst "${only[@]}" ${few[@]+"${few[@]}"}
}

first_images() {  # COUNT TABLE: with all of their captions
    "$PYTHON" - "$@" <<'PYTHON'
import csv
import sys

from evlgen.files.io import cache_root

with open(cache_root() / "flickr8k/train.csv", newline="", encoding="utf-8") as file:
    header, *rows = csv.reader(file)
kept = set(list(dict.fromkeys(row[0] for row in rows))[: int(sys.argv[1])])
with open(sys.argv[2], "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([header, *(row for row in rows if row[0] in kept)])
PYTHON
}

connector() {  # NAME SEED IMAGES
    local table=flickr8k/train.csv size=(BUDGET=1000it EVERY=250it SAMPLES=1000) options=("run.metrics=$metrics" run.batch_size_eval=128)
    if [ "$3" != 6000 ]; then
        table=$folder/first_$3.csv
        first_images "$3" "$table" || return
    fi
    [ "$dry" = 0 ] || { size=(BUDGET=4it EVERY=2it SAMPLES=4) options+=(run.batch_size_train=4 run.image_use_samples=4); }
    env "${size[@]}" MIN_LR=1.0e-5 SEEDS="$2" FOLDER="$folder/connectors_$2_$3" \
        bash benchmarks/photos.sh "$1" "datasets.image_text.annotations.train=$table" "${options[@]}"
}

job() {  # NAME WHAT ...
    local left=$((${LIMIT:-540} - $(date +%s) + begun)) code
    [ "$left" -gt 0 ] || { echo "not begun: $1"; return; }
    # SIGTERM saves the run; what it leaves behind is read by the next call
    timeout --signal=TERM --kill-after=20 "$left" bash -c '"$@"' - "${@:2}" >>"$folder/$1.log" 2>&1
    code=$?
    echo "$(($(date +%s) - begun)) s: $1 ended with $code"
}
export -f train scores captioner first_images connector job
all_jobs | while read -r name rest; do
    [[ $wanted == "  " || $wanted == *" $name "* ]] && echo "$name $rest"
done | xargs -P "${JOBS:-4}" -L 1 bash -c 'job "$@"' -
{
    grep -H "samples in" "$folder"/{captioner_*,questions,self_critical}/scores/latest/log.txt
    for of_one in "$folder"/connectors_*; do
        printf '\n%s\n\n' "$(basename "$of_one")" && "$PYTHON" benchmarks/photos.py "$of_one"
    done
} 2>/dev/null | tee "$folder/tables.md"
