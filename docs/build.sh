#!/usr/bin/env bash
# The documentation site: build/docs/index.html. Warnings are errors.
set -euo pipefail
cd "$(dirname "$0")/.."
source setup_env.sh
python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs
echo "read it: file://$PWD/build/docs/index.html"
