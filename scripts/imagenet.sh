#!/usr/bin/env bash
# ImageNet-1K in full: convert a published ViT, then evaluate it side by side with its source on the validation set and
# on the variants of it. Needs the Hub (imagenet-1k is gated: `hf auth login` first) or IMAGENET, a folder of the
# validation images in class folders (n01440764 ...) or in parquet files; IMAGENET_V2, _A and _R are folders of class
# folders, as their authors publish them. NPROC is the number of processes, one per GPU.
#
#     NPROC=8 bash scripts/imagenet.sh vit_base_patch16_224
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
evaluate() {  # NAME DATASET OPTION ...
    local name=$1 dataset=$2
    shift 2
    if [ -f "$out/$name.json" ]; then
        return
    fi
    torchrun --standalone --nproc-per-node "$nproc" -m sformer evaluate "$out/model" --dataset "$dataset" \
        --batch-size "$batch_size" --workers "$workers" --num-processes "$nproc" --resume --retry \
        --results-file "$out/$name.json" "$@"
}

if [ -n "${IMAGENET:-}" ]; then
    evaluate imagenet-1k "$IMAGENET" --benchmark imagenet-1k
    evaluate imagenet-real "$IMAGENET" --benchmark imagenet-real
else  # streamed: only the 50,000 validation images are read, not the training set
    evaluate imagenet-1k imagenet-1k --streaming
    evaluate imagenet-real imagenet-real --streaming
fi
[ -z "${IMAGENET_V2:-}" ] || evaluate imagenet-v2 "$IMAGENET_V2" --benchmark imagenet-v2
[ -z "${IMAGENET_A:-}" ] || evaluate imagenet-a "$IMAGENET_A" --benchmark imagenet-a
[ -z "${IMAGENET_R:-}" ] || evaluate imagenet-r "$IMAGENET_R" --benchmark imagenet-r
