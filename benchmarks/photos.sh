#!/usr/bin/env bash
# Every connector between the parts of run_scripts/photos/get_parts.sh on Flickr8k: same frozen parts, same seconds of training, sizes
# within a tenth of the TomeFormer's 10.5 million weights. The rate stays at 1e-3 after its warm-up: in minutes, a falling one stops the
# learning before it has begun. The runs of benchmarks/photos.md. What was stopped goes on.
# Usage: bash benchmarks/photos.sh [NAME ...] [KEY=VALUE ...]      (names below; default: those of the table; changes to all of them)
#   BUDGET=540s EVERY=270s SEEDS=42 SAMPLES=64 MIN_LR=1.0e-3 FOLDER=output/photos_compare
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${FOLDER:-output/photos_compare} python=${PYTHON:-.venv/bin/python}
bert="init: cache://parts/minilm-l6, init_lr_scale: 0.1"
small="hidden_size: 384, num_attention_heads: 12, intermediate_size: 1536"
none="hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0"

connector_of() {
    case $1 in
        tomeformer) echo "{name: tomeformer, num_layers: 5, r: 7, residual: true, $bert, $none}" ;;
        tomeformer_r[0-9]*) connector_of tomeformer | sed "s/r: 7/r: ${1#tomeformer_r}/" ;;
        tomeformer_no_residual) connector_of tomeformer | sed "s/residual: true/residual: false/" ;;
        tomeformer_one_rate) connector_of tomeformer | sed "s/init_lr_scale: 0.1/init_lr_scale: 1.0/" ;;
        tomeformer_scale_1) connector_of tomeformer ;;
        tomeformer_random) echo "{name: tomeformer, num_layers: 5, r: 7, residual: true, $small, $none}" ;;
        qformer | qformer_two_stages) echo "{name: qformer, num_query_token: 14, num_layers: 4, $bert, $none}" ;;
        resampler) echo "{name: resampler, num_latents: 14, num_layers: 2, hidden_size: 640}" ;;
        mlp) echo "{name: mlp, hidden_size: 5120}" ;;                            # 49 soft prompts
        pool) echo "{name: pool, grid: 4, hidden_size: 5120}" ;;                 # 16
        pixel_shuffle) echo "{name: pixel_shuffle, hidden_size: 1792}" ;;        # 16
        c_abstractor) echo "{name: c_abstractor, grid: 4, hidden_size: 704}" ;;  # 16
        *) echo "error: there is no row '$1': connector_of in $0 has their names" >&2; return 1 ;;
    esac
}

names=() changes=()
for argument in "$@"; do
    case $argument in
        *=*) changes+=("$argument") ;;
        *) names+=("$argument") ;;
    esac
done
[ ${#names[@]} -gt 0 ] || names=(tomeformer qformer resampler pool pixel_shuffle qformer_two_stages c_abstractor mlp tomeformer_random)
for name in "${names[@]}"; do
    if [ "$name" = qformer_two_stages ]; then
        files=(benchmarks/photos/qformer_stage1.yaml+benchmarks/photos/qformer_stage2.yaml) options=()
    else
        scale=0.4
        [ "$name" != tomeformer_scale_1 ] || scale=1.0
        files=(--cfg-path projects/photos/flickr8k_lite.yaml --grid "model.connector=$(connector_of "$name")") options=("model.soft_prompts={scale: $scale}" model.language.lora=null model.language.pack=true datasets.image_text.captions_together=false run.batch_size_train=32 run.warmup_steps=20)
    fi
    resume=()
    [ ! -e "$folder/$name/plan.json" ] || resume=(--resume)
    "$python" -m evlgen compare "${files[@]}" --budget "${BUDGET:-540s}" --evaluate-every "${EVERY:-270s}" --seeds "${SEEDS:-42}" \
        --split val --evaluate-samples "${SAMPLES:-64}" --output "$folder/$name" ${resume[@]+"${resume[@]}"} --options \
        "run.min_lr=${MIN_LR:-1.0e-3}" run.num_beams=1 run.max_len=20 run.image_use_samples=128 \
        run.metrics=[bleu,meteor,cider] run.log_freq=10 ${options[@]+"${options[@]}"} ${changes[@]+"${changes[@]}"}
done
