"""Adam and SGD on a perceptron that is made heterogeneous (figure 5, left)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from blockspec.engine.settings import EstimateSettings
from blockspec.figures.style import RUN_MARKERS, RUNS, styled
from blockspec.runs.run import BlockSettings, RunSettings
from paper.distances import RESOLVED, mean_distance
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.optimizers import ADAM, SGD
from paper.runs import spectra
from training.comparison import ComparisonSettings
from vision_models.compare_optimizers import compare
from vision_models.models import ModelSettings
from vision_models.sources import DataSettings

IMAGES = {  # losses are those of the training images: how well an optimizer optimizes
    "digits": DataSettings(test_split="train"),
    "mnist": DataSettings(source="hub", name="mnist", batch_size=128, test_split="train"),
}
FACTORIES = {"digits": ("digits", {}), "mnist": ("hub", {"name": "mnist"})}


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Args:
        images: digits or mnist.
        sizes: Widths of the perceptron.
        scales: c: the three layers are multiplied by c, 1 and 1 / c, their parameters divided by
            it.
        comparison: The trainings. The clip of 0 leaves the gradient as it is.
    """

    images: Literal["digits", "mnist"] = "digits"
    sizes: tuple[int, ...] = (64, 64, 64, 10)
    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    comparison: ComparisonSettings = field(
        default_factory=lambda: ComparisonSettings(
            rates={ADAM: (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), SGD: (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)},
            num_steps=200,
            warmup=10,
            clip=0.0,
            measure_every=50,
        )
    )


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    table = pd.concat(
        [_compared(settings, scale, context) for scale in settings.scales], ignore_index=True
    )
    return {"perceptrons": table}


def _compared(settings: Settings, scale: float, context: Context) -> pd.DataFrame:
    """A row an optimizer: final losses over seeds, and how different the layers' Hessians are at
    initialisation.
    """
    model = ModelSettings("mlp", {"sizes": list(settings.sizes), "scales": [scale, 1.0, 1 / scale]})
    out = context.runs / "perceptrons" / f"scale_{scale:g}"
    comparison = replace(settings.comparison, workers=context.workers, device=context.device)
    table = compare(out=str(out), model=model, data=IMAGES[settings.images], comparison=comparison)
    factory, arguments = FACTORIES[settings.images]
    run = RunSettings(
        f"vision_models.factories:{factory}",
        {
            "model": model.name,
            "settings": model.settings,
            "count": 512,
            "seed": context.seed,
            **arguments,
        },
        blocks=BlockSettings(exclude=["*.bias"], full=False),
        estimate=EstimateSettings(num_probes=4, num_steps=40),
    )
    mean = mean_distance(spectra(run, out / "spectra", device=context.device), RESOLVED)
    return table.assign(scale=scale, js0=mean.value, js0_stderr=mean.stderr)


@styled
def plot_perceptrons(table: pd.DataFrame) -> Figure:
    """Final loss by scale c, mean and standard deviation over seeds; below, the heterogeneity that
    c makes.
    """
    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, colour, marker in zip((ADAM, SGD), RUNS, RUN_MARKERS, strict=False):
        rows = table[table["optimizer"] == name]
        above.errorbar(
            rows["scale"], rows["mean"], yerr=rows["std"], color=colour, marker=marker, label=name
        )
    rows = table.drop_duplicates("scale")
    below.errorbar(rows["scale"], rows["js0"], yerr=rows["js0_stderr"], color="0.3", marker="d")
    above.set(yscale="log", ylabel="final training loss (nats)")
    above.legend(title=f"tuned; mean and s.d. of {table['count'].iloc[0]} seeds")
    below.set(xscale="log", xlabel="scale c", ylabel="JS$^0$ (nats)", ylim=(0, None))
    below.set_xticks(rows["scale"], [f"{scale:g}" for scale in rows["scale"]])
    below.xaxis.set_minor_locator(NullLocator())
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {"figure_5": plot_perceptrons(tables["perceptrons"])}


def judge(tables: Tables) -> list[Finding]:
    ratios = log_ratios(tables["perceptrons"])
    each = "; ".join(
        f"c = {row.Index:g}: {with_error(row.ratio, row.stderr)}" for row in ratios.itertuples()
    )
    growth = ratios["ratio"].iloc[-1] - ratios["ratio"].iloc[0]
    error = float(np.hypot(ratios["stderr"].iloc[-1], ratios["stderr"].iloc[0]))
    return [
        Finding(
            "the more heterogeneous the perceptron is made, the worse SGD does against Adam",
            f"log10 of SGD's final loss over Adam's: {each}; growth from the least to the largest "
            f"c {with_error(growth, error)}",
            "agrees" if growth > 2 * error else "disagrees",
            "standard errors over seeds; growth of more than two of them is needed"
            + _edges(tables["perceptrons"]),
        )
    ]


def _edges(table: pd.DataFrame) -> str:
    rows = table[table["at_edge_of_grid"]]
    named = [f"{row.optimizer} at c = {row.scale:g}" for row in rows.itertuples()]
    return f"; best rate at the edge of the grid: {', '.join(named)}" if named else ""


def log_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """By scale: log10 of the mean final loss of SGD over that of Adam, with its standard error over
    seeds.
    """
    table = table.assign(
        log=np.log10(table["mean"]),
        error=table["std"] / table["mean"] / np.sqrt(table["count"]) / np.log(10),
    )
    log, error = (
        table.pivot(index="scale", columns="optimizer", values=name) for name in ("log", "error")
    )
    return pd.DataFrame(
        {"ratio": log[SGD] - log[ADAM], "stderr": np.hypot(error[SGD], error[ADAM])}
    )


SETUP = (
    "Three layers, multiplied by c, 1 and 1/c while their parameters are divided by it: the "
    "function stays, and the layers' "
    "Hessian blocks are c², 1 and 1/c² as large. This way of scaling is ours; the paper's is not "
    "known. Adam and SGD (momentum "
    "0.9), learning rates tuned on other seeds; final losses are those of all training images."
)
EXHIBIT = Exhibit(
    name="figure_5",
    title="A perceptron made heterogeneous",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 5",
    measure=measure,
    draw=draw,
    judge=judge,
    shown=("perceptrons",),
    scales={
        "small": Scale(
            Settings(),
            f"{SETUP} Digits (8x8), 64-64-64-10, 200 steps.",
            "Three minutes on one core.",
        ),
        "paper": Scale(
            Settings(
                images="mnist",
                sizes=(784, 128, 128, 10),
                comparison=replace(
                    Settings().comparison, num_steps=4680, warmup=100, measure_every=468
                ),
            ),
            f"{SETUP} MNIST, 784-128-128-10, 10 epochs.",
            "Not run. Estimated: an hour of one GPU.",
        ),
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
