#!/usr/bin/env bash
# From nothing to the blockwise Hessian spectra of a GPT-2 along its training.
#
#   bash run_gpt2.sh                         English text that every CPython ships, a GPT-2 of 137,000 parameters:
#                                            five to six minutes and 2 GiB, after set-up
#   bash run_gpt2.sh openwebtext             GPT-2 124M on OpenWebText with the settings of arXiv 2402.16788: 54 GB of disk for
#                                            the data and hours to prepare it, days of training on 8 GPUs, hours of spectra on one
#   --out FOLDER                             default: runs/embedded_tiny or runs/gpt2_124m
#   --device cpu|cuda                        default: a GPU if there is one
#
# The result is FOLDER/spectra: run.json, spectra.parquet, heterogeneity.parquet, figures/; and FOLDER/report.html, a page to explore
# it. A second call does what is missing.
set -euo pipefail
cd "$(dirname "$0")"

experiment=embedded
out=
device=auto
while [ $# -gt 0 ]; do
    case "$1" in
        embedded|openwebtext) experiment="$1"; shift ;;
        --out) out="${2:?--out needs a folder}"; shift 2 ;;
        --device) device="${2:?--device needs a name}"; shift 2 ;;
        *) echo "run_gpt2.sh: unknown argument $1 (embedded, openwebtext, --out FOLDER, --device NAME)" >&2; exit 2 ;;
    esac
done

source setup_env.sh
python - "$device" <<'END'    # before hours of training
import sys
from blockspec.runs.settings import find_device
try:
    find_device(sys.argv[1])
except ValueError as error:
    sys.exit(f"run_gpt2.sh: {error}")
END
trainer_device=auto
[ "$device" = cpu ] && trainer_device=cpu

if [ "$experiment" = openwebtext ]; then
    config=gpt2_124m
    out="${out:-runs/gpt2_124m}"
    python -m language_models.data openwebtext --out data/openwebtext --val_share 0.0005    # the share of nanoGPT
    launcher=(accelerate launch)              # as many GPUs as there are; `accelerate config` changes it
else
    config=embedded_tiny
    out="${out:-runs/embedded_tiny}"
    launcher=(python)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"    # matrices are small: two threads are no faster, and spin where others work
fi
spectra=language_models/configs/spectra/${config/_tiny/}.yaml

"${launcher[@]}" -m language_models.train --config "language_models/configs/$config.yaml" --out "$out" \
    --training.device "$trainer_device"
blockspec run --config "$spectra" --checkpoints "$out/step_*" --out "$out/spectra" --device "$device"
page="$(blockspec report "$out/spectra" -o "$out/report.html")"    # not within echo, which would hide that it failed
echo "a page to explore it: $page"
