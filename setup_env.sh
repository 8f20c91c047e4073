#!/usr/bin/env bash
# Makes .venv with the pinned versions of constraints.txt, once; later calls return at once.
# Usage: source setup_env.sh          (leaves the environment activated)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
stamp="$root/.venv/.installed-$(cat "$root/constraints.txt" "$root/pyproject.toml" | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "blockspec needs Python 3.11 or newer; $("$python" --version) was found. Set PYTHON=/path/to/python3.11" >&2
        exit 1
    }
    [ -e "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    echo "Installing into $root/.venv (some minutes, once)"
    # torch first and alone: as somebody's dependency it could come as the GPU build
    "$root/.venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" torch
    "$root/.venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[train,report,test,docs]"
    rm -f "$root"/.venv/.installed-*
    touch "$stamp"
fi
source "$root/.venv/bin/activate"
