#!/usr/bin/env bash
# Transformers against convolutional networks: blockwise Hessian spectra of a ViT, a ResNet and a VGG.
#
#   bash vision_models/run.sh                  scikit-learn's 1,797 real digits; a ViT, a ResNet, a VGG and an MLP-mixer of 80,000 to
#                                              200,000 parameters, trained and measured: at most 8 minutes on two cores and 3 GB
#   bash vision_models/run.sh imagenet PATH    ViT-base (14 blocks), ResNet18 and VGG16 of arXiv 2402.16788 at initialisation, on 256
#                                              images of PATH/train/<class>/*.JPEG: hours on one GPU of 80 GB, weeks on a CPU (from
#                                              the counts of operations in spectra/imagenet_*.yaml, not measured)
#   --train                                    of imagenet: train the three first, on all of PATH/train and PATH/val (90 epochs each;
#                                              estimated: days on 8 GPUs), and measure along the training
#   --out FOLDER                               default: runs/digits or runs/imagenet
#   --device cpu|cuda                          of the spectra; default: a GPU if there is one
#
# The result is FOLDER/spectra/<model> (run.json, spectra.parquet, heterogeneity.parquet, figures/) and FOLDER/comparison, the models
# beside each other. A second call does what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

experiment=digits
images=
out=
device=auto
train=no
while [ $# -gt 0 ]; do
    case "$1" in
        imagenet) experiment=imagenet; images="${2:?imagenet needs the folder that holds train/}"; shift 2 ;;
        --train) train=yes; shift ;;
        --out) out="${2:?--out needs a folder}"; shift 2 ;;
        --device) device="${2:?--device needs a name}"; shift 2 ;;
        *) echo "run.sh: unknown argument $1 (imagenet PATH, --train, --out FOLDER, --device NAME)" >&2; exit 2 ;;
    esac
done
out="${out:-runs/$experiment}"
configs=vision_models/configs

source setup_env.sh

digits() { # one model after the other; each call is one process on one core
    for model in "$@"; do
        python -m vision_models.train --config "$configs/digits_$model.yaml" --out "$out/$model" --training.tracker none
        checkpoints=("$out/$model"/step_*)
        blockspec run --config "$configs/spectra/digits_${model}.yaml" --out "$out/spectra/$model" --device "$device" \
            --checkpoints "[\"${checkpoints[0]}\", \"${checkpoints[-1]}\"]"
        echo "$model: trained and measured" >&3
    done
}

imagenet() {
    for model in vit_base resnet18 vgg16; do
        arguments=(--model_args.root "$images/train")
        if [ "$train" = yes ]; then
            accelerate launch -m vision_models.train --config "$configs/imagenet_$model.yaml" --out "$out/$model" --data.name "$images"
            arguments+=(--checkpoints "$out/$model/step_*")
        fi
        blockspec run --config "$configs/spectra/imagenet_${model}.yaml" --out "$out/spectra/$model" --device "$device" \
            "${arguments[@]}"
    done
}

if [ "$experiment" = imagenet ]; then
    models=(resnet18 vgg16 vit_base)
    imagenet
else
    models=(resnet vgg mixer vit)
    export OMP_NUM_THREADS=1
    mkdir -p "$out"
    exec 3>&1
    digits vit vgg > "$out/vit_vgg.log" 2>&1 & first=$!
    digits resnet mixer > "$out/resnet_mixer.log" 2>&1 & second=$!
    echo "training and measuring; progress is in $out/vit_vgg.log and $out/resnet_mixer.log"
    status=0
    wait "$first" || { status=1; tail -n 5 "$out/vit_vgg.log" >&2; }
    wait "$second" || { status=1; tail -n 5 "$out/resnet_mixer.log" >&2; }
    [ "$status" = 0 ] || exit 1
fi

blockspec compare "${models[@]/#/$out/spectra/}" --out "$out/comparison"
