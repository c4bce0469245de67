#!/usr/bin/env bash
# COCO 2017 in full: train a Mask R-CNN on a timm backbone with its published weights, convert all of it, and evaluate it
# side by side with its source on every image of val2017. COCO is a folder as it is published: annotations/
# instances_train2017.json and instances_val2017.json, train2017/, val2017/. NPROC is the number of processes that
# evaluate, one per GPU; training runs on one. CHECKPOINT is a file of weights in the place of the published ones.
#
#     COCO=/data/coco NPROC=8 bash scripts/coco.sh vit_base_patch14_dinov2
#
# Started again, it goes on where it ended: with the epoch, or after the image. An annotation of val2017 that is not
# usable (docs/detection.md) ends it; up to MAX_BAD of them are left out, and the results name them.
set -euo pipefail
backbone=${1:-vit_base_patch14_dinov2}
coco=${COCO:?is to name the folder of COCO 2017}
nproc=${NPROC:-1}
levels=${LEVELS:-32}
read -ra image_size <<< "${IMAGE_SIZE:-1024 1024}"
read -ra train_options <<< "${TRAIN_OPTIONS:-}"  # more options of sformer detect train
out=${OUT:-runs/coco-$backbone}
source_model=$out/source
model=$out/n$levels

# All blocks are trained: the maps of a frozen backbone would be kept on disk, a megabyte or more per image.
[ -f "$source_model/config.json" ] || sformer detect train --backbone "$backbone" \
    ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} --masks --data "$coco" --split train2017 --skip-bad \
    --image-size "${image_size[@]}" --channels "${CHANNELS:-256}" --epochs "${EPOCHS:-12}" \
    --batch-size "${BATCH_SIZE:-8}" --lr "${LR:-0.0001}" --trained-blocks "${TRAINED_BLOCKS:-1000}" \
    "${train_options[@]}" -o "$source_model"

[ -f "$model/config.json" ] || sformer convert "$source_model" --levels "$levels" --calibration "$coco" \
    --split train2017 --num-images "${NUM_IMAGES:-64}" -o "$model"

# Beside the weights, where sformer publish looks for results
[ -f "$model/val2017.json" ] || torchrun --standalone --nproc-per-node "$nproc" -m sformer evaluate "$model" \
    --data "$coco" --split val2017 --max-bad "${MAX_BAD:-0}" --num-processes "$nproc" --resume \
    --results-file "$model/val2017.json"
