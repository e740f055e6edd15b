#!/usr/bin/env bash
# Trains every connector between the parts of run_scripts/photos/get_parts.sh on Flickr8k, under one configuration, and
# draws what the image is worth to each: the runs of docs/training-on-real-parts.md. A run that was stopped goes on.
# Usage: bash benchmarks/image_use.sh [NAME ...] [-- KEY=VALUE ...]      (names below; default: all)
#   ITERATIONS=1000 FOLDER=output/image_use   1,000 iterations take some hours on two cores, minutes on a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
iterations=${ITERATIONS:-1000} folder=${FOLDER:-output/image_use}
bert="init: cache://parts/minilm-l6, init_lr_scale: 0.1"
small="hidden_size: 384, num_attention_heads: 12, intermediate_size: 1536"
none="hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0"

options_of() {
    case $1 in
        tomeformer) ;;
        tomeformer_seed43) echo "run.seed=43" ;;
        tomeformer_seed44) echo "run.seed=44" ;;
        tomeformer_dropout) echo "model.connector.hidden_dropout_prob=0.1"; echo "model.connector.attention_probs_dropout_prob=0.1" ;;
        tomeformer_random) echo "model.connector={name: tomeformer, num_layers: 6, r: 6, residual: true, $small, $none}" ;;
        qformer) echo "model.connector={name: qformer, num_query_token: 13, num_layers: 6, $bert, $none}" ;;
        resampler) echo "model.connector={name: resampler, num_latents: 13, num_layers: 2, hidden_size: 640}" ;;
        pool) echo "model.connector={name: pool, grid: 4}" ;;
        mlp) echo "model.connector={name: mlp}" ;;
        published) # nothing around the connector, one rate, dropout
            echo "model.soft_prompts=null"
            echo "model.connector={name: tomeformer, num_layers: 6, r: 6, init: cache://parts/minilm-l6}"
            echo "run.init_lr=3.0e-4" ;;
        *) echo "unknown: $1" >&2; return 1 ;;
    esac
}

names=() more=()
while [ $# -gt 0 ]; do
    if [ "$1" = -- ]; then shift; more=("$@"); break; fi
    names+=("$1"); shift
done
[ ${#names[@]} -gt 0 ] || names=(tomeformer published qformer resampler pool tomeformer_random mlp tomeformer_seed43 tomeformer_seed44 tomeformer_dropout)

runs=()
for name in "${names[@]}"; do
    options_of "$name" >/dev/null
    mapfile -t options < <(options_of "$name")
    .venv/bin/python train.py --cfg-path projects/photos/flickr8k_lite.yaml --options "run.max_iters=$iterations" \
        datasets.image_text.captions_together=false run.batch_size_train=32 run.warmup_steps=60 \
        run.iters_per_inner_epoch=25 run.max_eval_samples=96 run.metrics=[cider] run.max_len=16 run.resume=auto \
        "run.output_dir=$folder/$name" ${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"}
    runs+=("$name=$folder/$name/latest")
    .venv/bin/python benchmarks/image_use.py "${runs[@]}" --output "$folder/image_use.png"
done
