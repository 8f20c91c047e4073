"""Gradient descent and Adam on four quadratics with the same condition number (figure 8).

``w' H w / 2`` with block diagonal H: the eigenvalues are the same in cases 1 and 2, and in 3 and 4;
what differs is how they are dealt to the blocks. Adam with beta1 = 0, beta2 = 1 and v from the
first gradient is gradient descent preconditioned by D = diag |g_0|.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockspec.figures.style import RUNS, styled
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command

LARGEST = 5000.0
SPREAD = np.geomspace(1, LARGEST, 15)
CLUSTERS = np.array([1, 2, 3, 99, 100, 101, 4998, 4999, 5000.0])
CASES: Mapping[str, np.ndarray] = {  # (blocks, eigenvalues of a block)
    "1: heterogeneous, spread": SPREAD.reshape(3, -1),
    "2: homogeneous, spread": SPREAD.reshape(-1, 3).T,
    "3: heterogeneous, clusters": CLUSTERS.reshape(3, 3),
    "4: homogeneous, clusters": CLUSTERS.reshape(3, 3).T,
}
GD, ADAM = "GD", "Adam"
TOLERANCE = 0.05  # of GD's measured rate
ROUNDING = 1e-24  # of the first loss: below, float64 no longer resolves the course
QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}


@dataclass(frozen=True)
class Settings:
    """What is run.

    Args:
        starts: Random starts, each with its own random rotation of every block.
        rate_steps: Steps with the learning rates of the rule, from which the rate of convergence is
            measured.
        steps: Steps with the learning rates of the grid.
        multiples: The grid: multiples of the rule's learning rate.
    """

    starts: int = 100
    rate_steps: int = 30_000
    steps: int = 4_000
    multiples: tuple[float, ...] = (0.2, 0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1)


@dataclass(frozen=True)
class Problems:
    """A batch of quadratics with a start each.

    matrices: (S, n, n) block diagonal.
    starts: (S, n).
    scale: (S, n) |g_0|, the diagonal of Adam's preconditioner.
    """

    matrices: np.ndarray
    starts: np.ndarray
    scale: np.ndarray


def draw_problems(blocks: np.ndarray, count: int, generator: np.random.Generator) -> Problems:
    """Blocks Q diag(eigenvalues) Q' with uniform orthogonal Q, and Gaussian starts."""
    size = blocks.shape[1]
    matrices = np.zeros((count, blocks.size, blocks.size))
    for l, eigenvalues in enumerate(blocks):
        basis, triangle = np.linalg.qr(generator.standard_normal((count, size, size)))
        basis *= np.sign(np.diagonal(triangle, axis1=1, axis2=2))[
            :, None, :
        ]  # makes the distribution uniform
        place = slice(l * size, (l + 1) * size)
        matrices[:, place, place] = basis * eigenvalues @ basis.transpose(0, 2, 1)
    starts = generator.standard_normal((count, blocks.size))
    return Problems(matrices, starts, np.abs(_times(matrices, starts)))


def rule(problems: Problems, optimizer: str) -> tuple[np.ndarray, np.ndarray]:
    """(S,) learning rates 2 / (L + mu) and (S,) the asymptotic factor of the loss, ((L - mu) / (L +
    mu))^2, where L and mu are the extreme eigenvalues of H, or for Adam of D^-1/2 H D^-1/2.
    """
    matrices = problems.matrices
    if optimizer == ADAM:
        root = np.sqrt(problems.scale)
        matrices = matrices / (root[:, :, None] * root[:, None, :])
    values = np.linalg.eigvalsh(matrices)
    low, high = values[:, 0], values[:, -1]
    return 2 / (low + high), ((high - low) / (high + low)) ** 2


def adam_bound(problems: Problems, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S,) learning rates C_1 and (S,) max_l (1 - 1 / (r kappa_l)), by which Adam's loss falls in
    every step at least.

    C_1 and C_2 are the least and the largest |g_0| / (largest eigenvalue of its block), and r = C_2
    / C_1: the eigenvalues of C_1 D^-1/2 H D^-1/2 are at most 1, and those of block l at least 1 /
    (r kappa_l).
    """
    ratios = problems.scale.reshape(len(problems.scale), *blocks.shape) / blocks[:, -1:]
    least, largest = ratios.min(axis=(1, 2)), ratios.max(axis=(1, 2))
    kappa = (blocks[:, -1] / blocks[:, 0]).max()
    return least, 1 - least / (largest * kappa)


def descend(
    problems: Problems, optimizer: str, rates: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient norms, (steps + 1, S) each."""
    divisor = problems.scale if optimizer == ADAM else np.ones_like(problems.scale)
    w = problems.starts.copy()
    losses, norms = np.empty((2, steps + 1, len(w)))
    for t in range(steps + 1):
        gradient = _times(problems.matrices, w)
        losses[t] = (w * gradient).sum(axis=1) / 2
        norms[t] = np.sqrt((gradient**2).sum(axis=1))
        w -= rates[:, None] * gradient / divisor
    return losses, norms


def measured_rate(losses: np.ndarray) -> np.ndarray:
    """(S,) -log of the factor of the loss per step, over the last fifth of the steps in which it is
    above rounding.
    """
    last = (losses > ROUNDING * losses[0]).cumprod(axis=0).sum(axis=0) - 1
    first, column = 4 * last // 5, np.arange(losses.shape[1])
    return np.log(losses[first, column] / losses[last, column]) / (last - first)


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    rates, curves, bounds = [], [], []
    for number, (case, blocks) in enumerate(CASES.items()):
        problems = draw_problems(
            blocks, settings.starts, np.random.default_rng([context.seed, number])
        )
        for optimizer in (GD, ADAM):
            lr, factor = rule(problems, optimizer)
            losses, _ = descend(problems, optimizer, lr, settings.rate_steps)
            best, norms = _tuned(problems, optimizer, lr, settings)
            found = {
                "lr": lr,
                "measured_rate": measured_rate(losses),
                "theory_rate": -np.log(factor),
            }
            found |= {"tuned_multiple": best, "final_norm": norms[-1] / norms[0]}
            rates.append(
                pd.DataFrame(
                    {"case": case, "optimizer": optimizer, "start": range(settings.starts), **found}
                )
            )
            curves.append(_quantiles(norms / norms[0]).assign(case=case, optimizer=optimizer))
        lr, bound = adam_bound(problems, blocks)
        losses, _ = descend(problems, ADAM, lr, settings.steps)
        bounds.append(
            pd.DataFrame(
                {"case": case, "lr": lr, "bound": bound, "worst_factor": _worst_factor(losses)}
            )
        )
    tables = {"rates": rates, "curves": curves, "bounds": bounds}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def _worst_factor(losses: np.ndarray) -> np.ndarray:
    """(S,) the largest factor of the loss in a step, above rounding."""
    factors = losses[1:] / np.maximum(losses[:-1], np.finfo(float).tiny)
    return np.where(losses[1:] > ROUNDING * losses[0], factors, 0).max(axis=0)


def _tuned(
    problems: Problems, optimizer: str, lr: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """For each start the multiple of the rule's learning rate with the least final gradient, and
    the norms (steps + 1, S).
    """
    best, found = np.full(len(lr), np.nan), np.full((settings.steps + 1, len(lr)), np.inf)
    with np.errstate(over="ignore", invalid="ignore"):  # rates above the rule's diverge
        for multiple in settings.multiples:
            _, norms = descend(problems, optimizer, multiple * lr, settings.steps)
            better = norms[-1] < found[-1]
            best[better], found[:, better] = multiple, norms[:, better]
    return best, found


def _quantiles(norms: np.ndarray) -> pd.DataFrame:
    steps = np.unique(np.linspace(0, len(norms) - 1, 201).astype(int))
    values = np.quantile(norms[steps], list(QUANTILES.values()), axis=1)
    return pd.DataFrame({"step": steps, **dict(zip(QUANTILES, values, strict=True))})


def _times(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return (matrices @ vectors[:, :, None])[:, :, 0]


@styled
def plot_quadratics(tables: Tables) -> Figure:
    """Gradient norm by step with the best learning rate of the grid: median and 10 to 90 % of the
    starts; theory dashed.
    """
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    panels = figure.subplots(1, len(CASES), sharey=True)
    for panel, case in zip(panels, CASES, strict=True):
        parts = {name: table[table["case"] == case] for name, table in tables.items()}
        _panel(panel, parts["curves"])
        steps = np.unique(parts["curves"]["step"])
        theory = (
            parts["rates"].groupby("optimizer")["theory_rate"].median()[GD],
            -np.log(parts["bounds"]["bound"].median()),
        )
        for rate, colour, name in zip(
            theory, RUNS, ("GD: $(1 - 2/(\\kappa + 1))^t$", "Adam: bound"), strict=False
        ):
            panel.plot(
                steps, np.exp(-rate * steps / 2), "--", color=colour, linewidth=0.8, label=name
            )
        panel.set(
            yscale="log",
            ylim=(1e-15, 3),
            xlabel="step",
            title=f"case {case.replace(', ', chr(10))}",
        )
    panels[0].set_ylabel("gradient norm / that at the start")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        f"median and 10 to 90 % of {tables['rates']['start'].nunique()} starts; bound of the "
        "median start"
    )
    return figure


def _panel(panel: Axes, curves: pd.DataFrame) -> None:
    for optimizer, colour in zip((GD, ADAM), RUNS, strict=False):
        rows = curves[curves["optimizer"] == optimizer]
        panel.plot(rows["step"], rows["median"], color=colour, label=f"{optimizer}, tuned")
        panel.fill_between(
            rows["step"], rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0
        )


def draw(tables: Tables) -> dict[str, Figure]:
    return {"figure_8": plot_quadratics(tables)}


def judge(tables: Tables) -> list[Finding]:
    rates, bounds = tables["rates"], tables["bounds"]
    gd, adam = (
        rates[rates["optimizer"] == name].set_index(["case", "start"]) for name in (GD, ADAM)
    )
    off = 100 * (gd["measured_rate"] / gd["theory_rate"] - 1)
    holds = bounds["worst_factor"] <= bounds["bound"] * (1 + 1e-9)
    return [
        Finding(
            "GD's loss falls by the factor (1 - 2/(κ + 1))² a step, κ = 5000",
            f"-log of the factor is off by {off.mean():.2g} % in the mean of {len(off)} starts, "
            f"{off.abs().max():.2g} % at most",
            "agrees" if off.abs().max() < 100 * TOLERANCE else "disagrees",
            f"learning rate 2/(L + μ), slope of the log loss; {100 * TOLERANCE:.0f} % are allowed",
        ),
        *(_advantage(case, gd.loc[case], adam.loc[case]) for case in CASES),
        Finding(
            "Adam's loss falls by the factor max_l (1 - 1/(r κ_l)) a step at least",
            f"in every step on {holds.sum()} of {len(holds)} starts",
            "agrees" if holds.all() else "disagrees",
            "r is our constant, derived at adam_bound; it is large where a coordinate's gradient "
            "starts near 0",
        ),
    ]


def _advantage(case: str, gd: pd.DataFrame, adam: pd.DataFrame) -> Finding:
    """How much faster Adam is, over the starts."""
    low, median, high = (adam["measured_rate"] / gd["measured_rate"]).quantile(
        list(QUANTILES.values())
    )
    lower = int((adam["final_norm"] < gd["final_norm"]).sum())
    heterogeneous = "heterogeneous" in case
    slower = "; Adam is slower" if high < 1 else ""
    return Finding(
        f"case {case.replace(': ', ' (')}): "
        + ("GD is much worse than Adam" if heterogeneous else "GD and Adam are about equal"),
        f"Adam's rate is {median:.3g} times GD's ({low:.3g} to {high:.3g}: 10 to 90 % of {len(gd)} "
        "starts); "
        f"with the best learning rate of the grid Adam ends lower on {lower} of {len(gd)}",
        "agrees" if (low > 1 if heterogeneous else low <= 1 <= high) else "disagrees",
        f"10 to 90 % of the starts {'are to lie above' if heterogeneous else 'are to include'} a "
        f"ratio of 1{slower}; "
        "learning rates 2/(L + μ) of H, and of the preconditioned H",
    )


SETUP = (
    "Block diagonal quadratics, condition number 5000, blocks rotated at random, Gaussian starts; "
    "Adam's betas are 0 and 1. "
    "All eigenvalues are our choice, and the same in the heterogeneous and the homogeneous case. "
    "Cases 3 and 4: {1, 2, 3}, "
    "{99, 100, 101}, {4998, 4999, 5000} against {1, 99, 4998}, …; cases 1 and 2: 15 eigenvalues "
    "evenly spread on a logarithmic "
    "scale, in three blocks. Both scales are the same."
)

EXHIBIT = Exhibit(
    name="figure_8",
    title="Four quadratics: gradient descent and Adam",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 8",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={name: Scale(Settings(), SETUP, "A minute on one core.") for name in ("small", "paper")},
)

if __name__ == "__main__":
    command(EXHIBIT)
