#!/usr/bin/env bash
# The plain tests with the lowest versions that pyproject.toml promises, in an environment of its own
# (.venv-lowest): bash run_lowest.sh [arguments of pytest]
# torch is that of constraints.txt: its older releases are not in every registry as builds for the CPU.
set -euo pipefail
cd "$(dirname "$0")"
[ -d .venv-lowest ] || python3 -m venv .venv-lowest
python=.venv-lowest/bin/python
$python - > .venv-lowest/lowest.txt <<'PYTHON'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
promised = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for requirement in promised:
    found = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)$", requirement)
    if found and found[1] != "torch":
        print(f"{found[1]}=={found[2]}")
print(*(line for line in Path("constraints.txt").read_text().split() if line.startswith("torch==")))
PYTHON
$python -m pip install --quiet --constraint .venv-lowest/lowest.txt --editable '.[train,report,test]'
PYTHONPATH=. OMP_NUM_THREADS=1 $python -m pytest "$@"
