"""Times things in turns, and writes a dated table with the command, the machine and the
versions.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch

import blockspec

PACKAGES = ("blockspec", "torch", "transformers")


def clock() -> float:
    """Seconds: those that this process computes, where one thread does all of it, so that a busy
    machine matters less.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def in_turns(contestants: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a busy machine harms all alike; one round to
    warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, function in contestants.items():
            start = clock()
            function()
            if turn > 0:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write(
    name: str,
    tables: Mapping[str, pd.DataFrame],
    *,
    notes: str = "",
    packages: tuple[str, ...] = PACKAGES,
) -> Path:
    """Prints the tables and writes them as ``benchmarks/results/<name>_<hardware>_<date>.md``."""
    hardware = (
        torch.cuda.get_device_name().replace(" ", "-")
        if torch.cuda.is_available()
        else f"cpu{torch.get_num_threads()}"
    )
    today = datetime.date.today().isoformat()
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    module = Path(sys.argv[0]).resolve().stem
    lines = [
        f"# {name}, {today}",
        "",
        f"`python -m benchmarks.{module} {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), Python "
        f"{platform.python_version()}, {versions}.",
    ]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", *_markdown(table)]
    if notes:
        lines += ["", notes]
    text = "\n".join(lines) + "\n"
    print(text)
    path = Path(__file__).parent / "results" / f"{name}_{hardware}_{today}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def _version(package: str) -> str:
    """Of a checkout that is not installed, too."""
    own = blockspec.__version__
    return own if package == "blockspec" else importlib.metadata.version(package)


def _markdown(table: pd.DataFrame) -> list[str]:
    frame = table.reset_index() if table.index.name else table
    header = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    return header + [
        "| " + " | ".join(_cell(value) for value in row) + " |"
        for row in frame.itertuples(index=False)
    ]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
