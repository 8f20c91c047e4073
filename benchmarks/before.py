"""Sweeps of this tree against those of an older one, in turns: ``python -m benchmarks.before
FOLDER``, where FOLDER is another checkout (``git worktree add FOLDER COMMIT``).

Both trees run in processes of their own at the same time, and take their turns one after the other,
so that a machine that slows down slows both. What is compared is CPU time, which other programs
hardly change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pandas as pd
from jsonargparse import CLI

from benchmarks.record import write
from benchmarks.sweep import SIZES

WAYS = ("gradient", "shared_and_pruned", "full_product", "estimate")
WORKER = """
import json, sys, time, torch, blockspec
from benchmarks.sweep import SIZES, Contest, objective_of
torch.set_num_threads(1)
Contest.estimate = lambda self: blockspec.estimate_spectra(
    self.objective, self.blocks, num_probes=1, num_steps=5
)
contests = {}
for line in sys.stdin:
    size, way, count = json.loads(line)
    if size not in contests:
        contests[size] = Contest(objective_of(SIZES[size]))
        getattr(contests[size], way)()
    start = time.process_time()
    for _ in range(count):
        getattr(contests[size], way)()
    print(json.dumps((time.process_time() - start) / count), flush=True)
"""


class Tree:
    """A checkout whose code answers in a process of its own."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )

    def seconds(self, size: str, way: str, count: int) -> float:
        """CPU seconds of one call, in the mean of so many."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([size, way, count]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def main(folder: Path, rounds: int = 7, sizes: int = len(SIZES)) -> None:
    """Measures and writes the table.

    Args:
        folder: The older checkout.
        rounds: Turns of each tree with each way.
        sizes: How many of the sizes of benchmarks.sweep, from the smallest.
    """
    trees = {"before": Tree(folder.resolve()), "now": Tree(Path(__file__).parent.parent)}
    rows = []
    for size in list(SIZES)[:sizes]:
        for way in WAYS:
            once = trees["now"].seconds(size, way, 1)
            count = max(1, round(0.2 / once))
            turns = [
                {name: tree.seconds(size, way, count) for name, tree in trees.items()}
                for _ in range(rounds)
            ]
            ratios = sorted(turn["now"] / turn["before"] for turn in turns)
            rows.append(
                {
                    "model": size,
                    "way": way,
                    "before (ms)": 1e3 * median(turn["before"] for turn in turns),
                    "now / before": median(ratios),
                    "least": ratios[0],
                    "most": ratios[-1],
                }
            )
            print(rows[-1], flush=True)
    for tree in trees.values():
        tree.close()
    write("before", {"CPU time of this tree over the older one": pd.DataFrame(rows)})


if __name__ == "__main__":
    CLI(main, as_positional=True)
