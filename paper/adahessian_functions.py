"""AdaHessian on functions of two variables: when one step is enough, and what its running means are
for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from blockspec.figures.style import RUN_MARKERS, RUNS, styled
from blockspec.optim import AdaHessian
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command

START = (-2.0, -1.0)
BOWL, COUPLED, NOISY = "x² + 5y²", "x² + 5y² + xy", "x² + y² + xy + ½ Σ sin²(5v)"
FUNCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    BOWL: lambda x, y: x**2 + 5 * y**2,
    COUPLED: lambda x, y: x**2 + 5 * y**2 + x * y,
    NOISY: lambda x, y: x**2 + y**2 + x * y + (torch.sin(5 * x) ** 2 + torch.sin(5 * y) ** 2) / 2,
}
WITHOUT, WITH = (0.0, 0.0), (0.9, 0.9)  # betas
REACHED = 1e-6  # value of a function, below which its minimum 0 is found


@dataclass(frozen=True)
class Settings:
    """What is run.

    Args:
        steps: On the noisy function.
        seeds: Of the random signs.
        rates: Learning rates on the noisy function.
        drawn: The one of them that is drawn.
    """

    steps: int = 200
    seeds: int = 10
    rates: tuple[float, ...] = (0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
    drawn: float = 0.5


def path(
    function: str, *, betas: tuple[float, float], lr: float, seed: int, steps: int
) -> pd.DataFrame:
    """A row a step: the point that AdaHessian is at, and the function's value there."""
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([point], lr=lr, betas=betas, eps=0.0, seed=seed)
    rows = []
    for step in range(steps + 1):
        value = FUNCTIONS[function](*point)
        rows.append((step, *point.tolist(), value.item()))
        optimizer.zero_grad()
        optimizer.backward(value)
        optimizer.step()
    return pd.DataFrame(rows, columns=["step", "x", "y", "value"]).assign(
        function=function, betas=str(betas), lr=lr, seed=seed
    )


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    seeds = range(context.seed, context.seed + settings.seeds)
    one = [
        path(name, betas=WITHOUT, lr=1.0, seed=seed, steps=1)
        for name in (BOWL, COUPLED)
        for seed in seeds
    ]
    noisy = [
        path(NOISY, betas=betas, lr=lr, seed=seed, steps=settings.steps)
        for betas in (WITHOUT, WITH)
        for lr in settings.rates
        for seed in seeds
    ]
    ends = [rows.iloc[[-1]] for rows in noisy]
    drawn = [
        rows
        for rows in noisy
        if rows["lr"].iloc[0] == settings.drawn and rows["seed"].iloc[0] == seeds[0]
    ]
    return {
        "one_step": pd.concat(one, ignore_index=True),
        "ends": pd.concat(ends),
        "paths": pd.concat(drawn),
    }


@styled
def plot_paths(tables: Tables) -> Figure:
    """Where AdaHessian goes from (-2, -1): one step on the bowls, many on the noisy function; the
    last point in red.
    """
    one = tables["one_step"].groupby("function", sort=False)
    panels = {f"{name}\none step": rows[rows["seed"] == rows["seed"].min()] for name, rows in one}
    panels |= {
        f"{NOISY}\nbetas {betas}": rows
        for betas, rows in tables["paths"].groupby("betas", sort=False)
    }
    figure = Figure(figsize=(7.4, 2.35), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for place, (title, rows) in zip(axes, panels.items(), strict=True):
        _contours(place, rows["function"].iloc[0])
        place.plot(rows["x"], rows["y"], ".-", color="tab:orange", linewidth=0.8)
        place.plot(*rows[["x", "y"]].iloc[-1], "o", color="tab:red")
        place.plot(0, 0, "x", color="black", markersize=5)
        x, y = rows[["x", "y"]].iloc[-1].round(2) + 0.0  # no negative zero
        title = f"{title}: to ({x:g}, {y:g})".replace("-", "−")
        place.set(title=title, xlabel="x", xlim=(-3, 3), ylim=(-3, 3), box_aspect=1)
    axes[0].set_ylabel("y")
    return figure


def _contours(place: Axes, function: str) -> None:
    axis = torch.linspace(-3, 3, 201, dtype=torch.float64)
    heights = FUNCTIONS[function](*torch.meshgrid(axis, axis, indexing="xy"))
    place.contourf(axis, axis, heights, levels=30, cmap="Blues_r")


@styled
def plot_rates(ends: pd.DataFrame) -> Figure:
    """The value after the last step by learning rate: median over the seeds, and every seed."""
    figure = Figure(figsize=(3.8, 2.5), layout="constrained")
    axes = figure.subplots()
    for (betas, rows), colour, marker in zip(
        ends.groupby("betas", sort=False), RUNS, RUN_MARKERS, strict=False
    ):
        median = rows.groupby("lr")["value"].median().clip(lower=REACHED)
        axes.plot(
            rows["lr"],
            rows["value"].clip(lower=REACHED),
            marker,
            color=colour,
            alpha=0.3,
            markersize=2.5,
        )
        axes.plot(median.index, median, color=colour, marker=marker, label=f"betas {betas}")
    axes.set(
        yscale="log",
        xlabel="learning rate",
        ylabel=f"last value (drawn at {REACHED:g} if below)",
        title=NOISY,
    )
    axes.legend()
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {
        "adahessian_functions": plot_paths(tables),
        "adahessian_functions_rates": plot_rates(tables["ends"]),
    }


def judge(tables: Tables) -> list[Finding]:
    one = tables["one_step"][tables["one_step"]["step"] == 1].groupby("function")["value"]
    bowl, coupled = one.get_group(BOWL), one.get_group(COUPLED)
    found = (
        (tables["ends"]["value"] < REACHED)
        .groupby([tables["ends"]["betas"], tables["ends"]["lr"]])
        .mean()
    )
    means: dict[str, Any] = {
        name: found[str(betas)] for name, betas in (("without", WITHOUT), ("with", WITH))
    }
    always = means["with"].index[means["with"] == 1]
    there = means["without"][always]
    return [
        Finding(
            f"{BOWL}: one step of learning rate 1 with betas 0 reaches the minimum",
            f"value after it at most {bowl.max():.1g} ({len(bowl)} seeds)",
            "agrees" if (bowl < 1e-28).all() else "disagrees",
            "z * Hz is the diagonal exactly where the Hessian is diagonal, whatever the signs z; "
            "eps = 0",
        ),
        Finding(
            f"{COUPLED}: no longer",
            f"value after it at least {coupled.min():.3g} ({len(coupled)} seeds)",
            "agrees" if (coupled > 1e-3).all() else "disagrees",
            "z * Hz has the off-diagonal entry with a random sign",
        ),
        Finding(
            f"{NOISY}: betas 0 stick",
            f"the minimum is found on {100 * there.mean():.0f} % of runs at learning rates at "
            "which betas 0.9 find it always, "
            f"on {100 * means['without'].mean():.0f} % at all learning rates "
            f"({_ends(means['without'])})",
            "agrees" if len(there) and not there.any() else "disagrees",
            "at the learning rates at which betas 0.9 find it always, none may",
        ),
        Finding(
            f"{NOISY}: betas 0.9 and 0.9 find the minimum",
            "on every seed at the learning rates "
            f"{', '.join(f'{lr:g}' for lr in always) or 'none'} of {_ends(means['with'])}; "
            f"on {100 * means['with'].mean():.0f} % of all runs",
            "agrees" if len(always) else "disagrees",
            "true of these learning rates, not of all: at others it sticks too",
        ),
    ]


def _ends(shares: pd.Series) -> str:
    return f"{shares.index.min():g} to {shares.index.max():g}"


SETUP = (
    "Our AdaHessian, eps 0, from (-2, -1), in float64; learning rates are ours. Both scales are "
    "the same."
)
EXHIBIT = Exhibit(
    name="adahessian_functions",
    title="AdaHessian on functions of two variables",
    source="AdaHessian (arXiv 2006.00719), as in its authors' tutorial",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        name: Scale(Settings(), SETUP, "Two minutes on one core.") for name in ("small", "paper")
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
