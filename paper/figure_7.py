"""JS^0 at initialisation against the gap between Adam and SGD, and how well one ranks the other
(figure 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from blockspec.figures.style import RUNS, styled
from paper.distances import DEFINITIONS, KL, PUBLISHED
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command
from paper.optimizers import gaps
from paper.table_1 import LOSSES, TRANSFORMERS

INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Settings:
    """samples: of the bootstrap."""

    samples: int = 2000


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    tables = context.needed["table_1"]
    rng = np.random.default_rng(context.seed)
    rows = []
    for loss in LOSSES:
        gap = {name: gaps(runs, loss).to_numpy() for name, runs in tables["runs"].groupby("model")}
        for definition in DEFINITIONS:
            js0 = tables["js0"][tables["js0"]["definition"] == definition]
            rows.append(
                {
                    "definition": definition,
                    "loss": loss,
                    **rank_correlation(_seeds(js0), gap, settings.samples, rng),
                }
            )
    return {"correlations": pd.DataFrame(rows), "table_1": tables["table_1"]}


def _seeds(js0: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: rows["js0"].to_numpy() for name, rows in js0.groupby("model")}


def rank_correlation(
    x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray], samples: int, rng: np.random.Generator
) -> dict[str, float]:
    """Spearman's correlation of the means of x and y over seeds, with a bootstrap interval over
    models and their seeds.

    x, y: model -> value of each seed. Returns the number of models, the correlation, the ends of
    its 95 % interval, and the probability of one as high by chance (two-sided).
    """
    names = sorted(x)
    found = spearmanr(*([np.mean(values[name]) for name in names] for values in (x, y)))
    drawn: list[float] = []
    while len(drawn) < samples:
        chosen = rng.choice(names, len(names))
        if len(set(chosen)) < 3:  # two models have a rank correlation of one, whatever they are
            continue
        means = (
            [rng.choice(values[name], len(values[name])).mean() for name in chosen]
            for values in (x, y)
        )
        drawn.append(spearmanr(*means).statistic)
    low, high = np.quantile(drawn, INTERVAL)
    return {
        "models": len(names),
        "spearman": found.statistic,
        "low": low,
        "high": high,
        "p": found.pvalue,
    }


@styled
def plot_gaps(tables: Tables) -> Figure:
    """Gap (held-out loss) by JS^0, a panel a definition; bars: deviation over seeds of JS^0,
    standard error of the gap.
    """
    table, correlations = (
        tables["table_1"],
        tables["correlations"].set_index(["loss", "definition"]),
    )
    figure = Figure(figsize=(2.2 * len(DEFINITIONS) + 1.4, 2.9), layout="constrained")
    loss = LOSSES[0]
    panels = figure.subplots(1, len(DEFINITIONS), sharey=True, squeeze=False)[0]
    markers = "osD^vP<>Xphd"
    for place, definition in zip(panels, DEFINITIONS, strict=True):
        for row, marker in zip(table.to_dict("records"), markers * 2, strict=False):
            colour = RUNS[1] if str(row["model"]).startswith(TRANSFORMERS) else RUNS[0]
            errors = {"xerr": row[f"{definition}, seeds"], "yerr": row[f"gap ({loss}), seeds"]}
            place.errorbar(
                row[definition],
                row[f"gap ({loss})"],
                **errors,
                fmt=marker,
                color=colour,
                elinewidth=0.6,
                label=row["model"],
            )
        found = correlations.loc[loss, definition]
        place.set_title(
            f"Spearman {found['spearman']:.2f} ({found['low']:.2f} to {found['high']:.2f})".replace(
                "-", "−"
            )
        )
        place.set_xlabel(f"JS$^0$ (nats):\n{definition}")
        if definition in (KL, PUBLISHED):  # unbounded
            place.set_xscale("log")
        else:
            place.locator_params(axis="x", nbins=4)
        place.axhline(0, color="0.7", linewidth=0.5, zorder=0)
    panels[0].set_ylabel("share of Adam's decrease of the\nheld-out loss that SGD does not reach")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {"figure_7": plot_gaps(tables)}


def judge(tables: Tables) -> list[Finding]:
    return [
        Finding(
            "JS^0 predicts the gap between Adam and SGD",
            f"Spearman's rank correlation {row.spearman:.2f}, 95 % interval {row.low:.2f} to "
            f"{row.high:.2f}, over {row.models} "
            f"models (JS^0: {row.definition}; gap of the {row.loss.replace('_', '-')} loss; p = "
            f"{row.p:.2g})",
            "agrees" if row.low > 0 else "disagrees",
            "agrees where the whole interval (bootstrap over models and seeds) lies above 0",
        )
        for row in tables["correlations"].itertuples()
    ]


EXHIBIT = Exhibit(
    name="figure_7",
    title="Does heterogeneity predict the gap between Adam and SGD?",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 7 and table 1",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        name: Scale(Settings(), "The models of table 1.", "Seconds after table 1.")
        for name in ("small", "paper")
    },
    needs=("table_1",),
    shown=("correlations",),
)

if __name__ == "__main__":
    command(EXHIBIT)
