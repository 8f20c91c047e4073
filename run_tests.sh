#!/usr/bin/env bash
# Every test, on a machine that has only git, Python >= 3.11 and pip. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh
workers="$(nproc)"    # before the next line: nproc heeds OMP_NUM_THREADS
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m pytest -n "$workers" --dist worksteal -m "" "$@"    # the slow ones too
