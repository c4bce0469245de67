#!/usr/bin/env bash
# ImageNet-1K in full: convert a published ViT, then evaluate it side by side with its source on the validation set and
# on the variants of it. SFORMER_DATA is a folder that has imagenet-1k/, the validation images in class folders
# (n01440764 ...) or in parquet files; without it they are streamed from the Hub (gated: `hf auth login` first).
# imagenet-v2/, imagenet-a/ and imagenet-r/ in it, folders of class folders as their authors publish them, are evaluated
# where they are there. NPROC is the number of processes, one per GPU.
#
#     NPROC=8 SFORMER_DATA=/data bash scripts/imagenet.sh vit_base_patch16_224
set -euo pipefail
source_model=${1:-vit_base_patch16_224}
nproc=${NPROC:-1}
levels=${LEVELS:-32}
batch_size=${BATCH_SIZE:-256}
workers=${WORKERS:-4}
out=${OUT:-runs/$source_model-n$levels}
mkdir -p "$out"

[ -f "$out/model/config.json" ] || sformer convert "$source_model" --levels "$levels" -o "$out/model"

# A run that was ended goes on with --resume when the script is started again; one that has finished leaves no progress.
evaluate() {  # NAME OPTION ...
    local name=$1
    shift
    if [ -f "$out/$name.json" ]; then
        return
    fi
    torchrun --standalone --nproc-per-node "$nproc" -m sformer evaluate "$out/model" --dataset "$name" \
        --batch-size "$batch_size" --workers "$workers" --num-processes "$nproc" --resume --retry \
        --results-file "$out/$name.json" "$@"
}

evaluate imagenet-1k --benchmark imagenet-1k
evaluate imagenet-real
for variant in imagenet-v2 imagenet-a imagenet-r; do
    [ ! -d "${SFORMER_DATA:-}/$variant" ] || evaluate "$variant"
done
