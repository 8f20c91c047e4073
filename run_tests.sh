#!/usr/bin/env bash
# Every test, on a machine that has only git, Python >= 3.11 and pip. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh
# the page of blockspec report is tested in a real browser; where there is none its tests say that they are skipped
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing Chromium (a minute, once)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null ||
        echo "Chromium could not be installed: the tests of the page are skipped" >&2
fi
workers="$(nproc)"    # before the next line: nproc heeds OMP_NUM_THREADS
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m pytest -n "$workers" --dist worksteal -m "" "$@"    # the slow ones too
