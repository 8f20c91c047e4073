"""How long a page of ``blockspec report`` takes to open: ``python -m benchmarks.page report.html``.

In a headless Chromium. Seconds on the clock until there is something to read, until sentences and
tables are complete, and until all figures in view are drawn; and the processor time that the page's
thread took for it, which a busy machine changes less.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pandas as pd

from benchmarks import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # with the driver of the browser
ROUNDS = 3


def opened(path: Path) -> dict[str, float]:
    """Of one page, in a browser of its own."""
    with import_module("browser").chromium() as browser:
        browser.size(1400, 1000)
        browser._call("Performance.enable", timeDomain="threadTicks")
        browser.open(path)
        figures = browser.run("performance.now()")
        paint = browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        tables = browser.run("performance.getEntriesByName('tables')[0].startTime")
        metrics = browser._call("Performance.getMetrics")["metrics"]
    busy = next(one["value"] for one in metrics if one["name"] == "TaskDuration")
    seconds = {"first paint": paint, "sentences and tables": tables, "figures in view": figures}
    return {name: value / 1000 for name, value in seconds.items()} | {"processor time": busy}


def main() -> None:
    """The best of some rounds for each page of the command line."""
    rows = {}
    for path in map(Path, sys.argv[1:]):
        best = pd.DataFrame([opened(path) for _ in range(ROUNDS)]).min()
        rows[f"{path.stem}, {path.stat().st_size / 1e6:.2f} MB"] = best
    table = pd.DataFrame(rows).T.rename_axis("page, seconds")
    record.write("page", {"opening": table}, packages=("blockspec", "plotly"))


if __name__ == "__main__":
    main()
