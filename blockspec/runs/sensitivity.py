"""``blockspec sensitivity``: which matrices survive few bits, and how to deal bits out under a
budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from blockspec.runs.printing import print_frame

SHOWN = 40  # rows of the printed table


@dataclass(frozen=True)
class SensitivitySettings:
    """What is quantised, and how.

    Args:
        model: A factory module:function that returns (model, batches, loss), or a Hugging Face name
            or folder.
        model_args: Keyword arguments of the factory. Set one of them by --model_args.NAME value.
        by: How parameters are cut into the matrices that are quantised: by tensor, or by matrix,
            which also cuts fused query-key-value tensors into three.
        bits: Numbers of bits of a weight that are tried, separated by commas.
        group: Number of weights of an output that share one scale. If left out, all weights of an
            output share one.
        symmetric: Whether the levels lie symmetrically around zero. If false, they lie between the
            smallest and the largest weight of a group.
        budgets: Mean numbers of bits a weight for which bits are dealt out, separated by commas. If
            left out, they are those of bits.
        num_probes: Number of random vectors for the traces that the rankings are compared with.
        seed: Seed of all random vectors, a whole number.
        curvature: Which matrix: hessian, ggn, fisher or residual.
        device: Where the work is done: cpu, cuda, cuda:1 and so on. With auto, a GPU is taken if
            there is one.
        dtype: Convert the model to this dtype first, for example float64. If left out, the model
            stays as it was loaded.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    by: str = "matrix"
    bits: str = "2,3,4,8"
    group: int | None = None
    symmetric: bool = True
    budgets: str | None = None
    num_probes: int = 8
    seed: int = 0
    curvature: str = "hessian"
    device: str = "auto"
    dtype: str | None = None

    @property
    def widths(self) -> list[int]:
        """The bit widths as numbers."""
        return [int(number) for number in _numbers("bits", self.bits)]

    @property
    def mean_bits(self) -> list[float]:
        """The budgets as numbers."""
        return _numbers("budgets", self.budgets or self.bits)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in str(text).strip("[]").split(",")]
    except ValueError:
        raise ValueError(f"{name} is a list of numbers separated by commas, got {text!r}") from None


def run(settings: SensitivitySettings, out: Path | None) -> None:
    """Measures, prints the tables, and writes them where ``out`` names a folder."""
    from blockspec.numerics.progress import progress_bar
    from blockspec.runs.factories import find_factory
    from blockspec.runs.settings import BlockSettings, RunSettings
    from blockspec.runs.stages import Stage, prepare
    from blockspec.toolbox.sensitivity import sensitivity

    widths, budgets = settings.widths, settings.mean_bits
    blocks = BlockSettings(by=settings.by, full=False)
    model = RunSettings(
        settings.model, model_args=settings.model_args, blocks=blocks, dtype=settings.dtype
    )
    stage = Stage(0, dict(settings.model_args))
    objective, chosen = prepare(model, stage, find_factory(settings.model), settings.device)
    with progress_bar("matrices") as progress:
        found = sensitivity(
            objective,
            chosen,
            widths,
            group=settings.group,
            symmetric=settings.symmetric,
            num_probes=settings.num_probes,
            seed=settings.seed,
            curvature=settings.curvature,
            progress=progress,
        )
    allocations = {budget: found.allocate(budget) for budget in budgets}
    outcome = pd.DataFrame(
        [_outcome(found, budget, bits) for budget, bits in allocations.items()]
    ).set_index("mean_bits")
    show(found.table, found.correlations(), outcome, allocations)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.table.to_csv(out / "sensitivity.csv")
        found.correlations().to_csv(out / "rankings.csv")
        outcome.to_csv(out / "budgets.csv")
        pd.DataFrame(allocations).to_csv(out / "allocations.csv")


def _outcome(found: Any, budget: float, bits: pd.Series) -> dict[str, float]:
    """Predicted and measured damage under a budget, beside the largest uniform width that fits into
    it.
    """
    predicted = found.table["predicted"]
    widths = [width for width in found.errors if width <= budget]
    uniform = bits.map(lambda _: max(widths))
    return {
        "mean_bits": budget,
        "predicted": sum(predicted[(name, width)] for name, width in bits.items()),
        "measured": found.measure(bits),
        "uniform_bits": max(widths),
        "uniform_measured": found.measure(uniform),
    }


def show(
    table: pd.DataFrame,
    correlations: pd.Series,
    outcome: pd.DataFrame,
    allocations: dict[float, pd.Series],
) -> None:
    """Prints damage by matrix, the rankings, and the budgets."""
    console = Console()
    width = table.index.get_level_values("bits").min()
    worst = pd.DataFrame(table.xs(width, level="bits")).sort_values("measured", ascending=False)
    columns = ["predicted", "measured", "curvature", "trace", "largest", "mse"]
    title = f"damage of {width} bits, the worst matrices first (unit: of the loss)"
    print_frame(console, _cells(worst[columns].head(SHOWN)), title)
    title = "Spearman correlation with the measured damage, all matrices and widths"
    print_frame(console, _cells(correlations.to_frame()), title)
    print_frame(console, _cells(outcome), "bits dealt out under a budget, beside uniform bits")
    dealt = _cells(pd.DataFrame(allocations).head(SHOWN))
    print_frame(console, dealt, "bits of each matrix, by budget")


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.map(_written)


def _written(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (float, np.floating)) else str(value)
