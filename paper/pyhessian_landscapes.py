"""The loss around trained residual networks, with and without batch norm and shortcuts (PyHessian's
3-D surfaces).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import blockspec
from blockspec.figures.style import styled
from blockspec.runs.settings import find_device
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.pyhessian_traces import folder_of
from training.checkpoints import last_checkpoint
from vision_models import factories
from vision_models.ablation import Network


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        points: Along each of the two directions.
        radius: The largest step along an eigenvector of length 1, in units of the parameters.
        count: Training images.
        batch_size: Images in a batch.
    """

    points: int = 15
    radius: float = 0.5
    count: int = 128
    batch_size: int = 128


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    trained = context.needed["pyhessian_traces"]["traces"][
        ["depth", "variant", "seed"]
    ].drop_duplicates()
    tables = []
    for row in trained.to_dict("records"):
        folder = folder_of(context, row["seed"]) / Network(row["depth"], row["variant"], {}).folder
        tables.append(_landscape(last_checkpoint(folder), settings, context).assign(**row))
    return {"landscapes": pd.concat(tables, ignore_index=True)}


def _landscape(checkpoint: Path | None, settings: Settings, context: Context) -> pd.DataFrame:
    """A row a point of the plane: steps along the two eigenvectors, and the loss."""
    model, batches, loss = factories.checkpoint(
        str(checkpoint), count=settings.count, batch_size=settings.batch_size
    )
    objective = blockspec.Objective(model.to(find_device(context.device)), batches, loss)
    (whole,) = blockspec.partition(model, "model")
    found = blockspec.landscape(
        objective, whole, radius=settings.radius, points=settings.points, seed=context.seed
    )
    first, second = (axis.ravel() for axis in np.meshgrid(*found.steps, indexing="ij"))
    return pd.DataFrame({"first": first, "second": second, "loss": found.losses.ravel()})


@styled
def plot_surfaces(table: pd.DataFrame) -> Figure:
    """The loss in the plane of the top two eigenvectors: a row a depth, a column a variant, all on
    one logarithmic scale.
    """
    depths, variants = (list(table[name].unique()) for name in ("depth", "variant"))
    heights = np.log10(table["loss"].where(np.isfinite(table["loss"])))
    norm = Normalize(heights.min(), heights.max())
    figure = Figure(figsize=(1.9 * len(variants), 1.95 * len(depths) + 0.2), layout="constrained")
    for i, depth in enumerate(depths):
        for j, variant in enumerate(variants):
            place: Any = figure.add_subplot(
                len(depths), len(variants), i * len(variants) + j + 1, projection="3d"
            )
            rows = table[(table["depth"] == depth) & (table["variant"] == variant)]
            surface = rows.assign(height=heights[rows.index]).pivot(
                index="first", columns="second", values="height"
            )
            across, along = np.meshgrid(surface.index, surface.columns, indexing="ij")
            place.plot_surface(
                across,
                along,
                surface.to_numpy(),
                cmap="viridis",
                norm=norm,
                rstride=1,
                cstride=1,
                linewidth=0,
            )
            place.set_zlim(norm.vmin, norm.vmax)
            place.set_title(f"depth {depth}, {variant}", pad=-4)
            place.tick_params(pad=-3, labelsize=5.5)
            for axis in (place.xaxis, place.yaxis, place.zaxis):
                axis.set_major_locator(MaxNLocator(4))
            place.view_init(elev=28, azim=-60)
            place.set_box_aspect(None, zoom=0.86)
    figure.suptitle(
        "log10 of the loss by steps along the eigenvectors of the two largest eigenvalues"
    )
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    table = tables["landscapes"]
    return {"pyhessian_landscapes": plot_surfaces(table[table["seed"] == table["seed"].min()])}


def rises(table: pd.DataFrame) -> pd.Series:
    """By depth, variant and seed: the mean rise of the loss from the parameters to the edge of the
    plane.
    """

    def rise(plane: pd.DataFrame) -> float:
        edge = (plane[["first", "second"]].abs() == plane[["first", "second"]].abs().max()).any(
            axis=1
        )
        centre = plane.loc[plane[["first", "second"]].abs().sum(axis=1).idxmin(), "loss"]
        return float(plane.loc[edge, "loss"].mean() - centre)

    return table.groupby(["depth", "variant", "seed"])[["first", "second", "loss"]].apply(rise)


def judge(tables: Tables) -> list[Finding]:
    found = rises(tables["landscapes"])
    return [_smoother(found, int(depth)) for depth in found.index.unique("depth")] + [
        _residual(found)
    ]


def _ratio(found: pd.Series, depth: int, variant: str) -> tuple[float, float]:
    """Mean and standard error over seeds of log10 of a variant's rise over that of the whole
    network.
    """
    ratio = np.log10(found[depth, variant] / found[depth, "all"])
    return float(ratio.mean()), float(ratio.sem())


def _smoother(found: pd.Series, depth: int) -> Finding:
    value, error = _ratio(found, depth, "no batch norm")
    return Finding(
        f"ResNet{depth}: batch norm does not necessarily make the loss landscape smoother, least "
        "in shallow networks",
        "log10 of the rise to the edge of the plane without batch norm over that with it: "
        f"{with_error(value, error)}",
        "agrees" if value < 2 * error else "disagrees",
        "disagrees where the rise without batch norm is larger by more than two standard errors "
        "over seeds",
    )


def _residual(found: pd.Series) -> Finding:
    each = {depth: _ratio(found, depth, "no residual") for depth in found.index.unique("depth")}
    return Finding(
        "shortcuts make the loss landscape smoother (what had been claimed, and the paper tests)",
        "log10 of the rise without shortcuts over that with them: "
        + "; ".join(f"depth {depth}: {with_error(*pair)}" for depth, pair in each.items()),
        "agrees" if all(value > 2 * error for value, error in each.values()) else "disagrees",
        "agrees where the rise without shortcuts is larger by more than two standard errors over "
        "seeds, at every depth",
    )


SETUP = (
    "The loss of the trained networks of the traces in the plane of the eigenvectors of the two "
    "largest eigenvalues, 0.5 to "
    "either side of the parameters."
)
EXHIBIT = Exhibit(
    name="pyhessian_landscapes",
    title="Loss landscapes without batch norm and shortcuts",
    source="PyHessian (arXiv 1912.07145)",
    measure=measure,
    draw=draw,
    judge=judge,
    needs=("pyhessian_traces",),
    scales={
        "small": Scale(
            Settings(), f"{SETUP} 128 digits.", "Three minutes on one core, after the traces."
        ),
        "paper": Scale(
            Settings(points=41, count=4096, batch_size=1024),
            f"{SETUP} 4,096 images of CIFAR-10.",
            "Not run. Estimated: an hour of one GPU, after the traces.",
        ),
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
