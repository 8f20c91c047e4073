"""Which matrices survive few bits: predicted and measured damage of quantising each, and an
allocation of bits.

Rounding moves the weights by a known error q, so the damage to second order is ``g'q + q'Hq / 2``:
one product for each matrix and bit width. Rankings by the trace or the largest eigenvalue look at
the matrix H alone, as if q had no structure. They stand beside, and so does what really happens to
the loss, from one forward pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from blockspec.model.blocks import Block, gather
from blockspec.model.objective import Objective
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.progress import shows_progress
from blockspec.numerics.ranks import Ranks
from blockspec.numerics.restarts import Search
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, open_operator
from blockspec.products.settings import takes
from blockspec.products.sweeps import run_together
from blockspec.toolbox.by_unit import gradients_by_unit, losses_by_unit, over_units
from blockspec.toolbox.directional import restricted
from blockspec.toolbox.directions import quantised
from blockspec.toolbox.moves import joined, shifted
from blockspec.toolbox.traces import trace

RANKINGS = ("curvature", "trace", "largest", "mse")
"""What matrices are ranked by: ``q'Hq``, or the trace or largest eigenvalue of H times the mean
square of q, or that alone.
"""
LOOSE = 0.05  # relative residual of the largest eigenvalues: a ranking needs no more


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Damage by matrix and bit width.

    Attributes:
        table: A row a (block, bits): kind, layer, numel; ``mse``, the mean square of the rounding
            error q; ``gradient``, g'q; ``curvature``, q'Hq; ``predicted``, g'q + q'Hq / 2;
            ``measured``, the loss's real change, with ``measured_data_stderr``; ``trace`` and
            ``largest``: those of H_bb times ``mse``, the predictions that know nothing of q's
            structure.
        objective: Whose loss it is.
        errors: Bits -> block -> (P,) the rounding error.
    """

    table: pd.DataFrame
    objective: Objective = field(repr=False)
    errors: Mapping[int, Mapping[Block, Tensor]] = field(repr=False)

    def correlations(self, bits: Sequence[int] | None = None) -> pd.Series:
        """Spearman's correlation of each ranking with the measured damage, over all matrices and
        the bit widths given.
        """
        chosen = self.table.reset_index()
        if bits is not None:
            chosen = chosen[chosen["bits"].isin(bits)]
        ranks = chosen[[*RANKINGS, "predicted", "measured"]].rank()
        return ranks.corr()["measured"].drop("measured").rename("spearman")

    def allocate(self, mean_bits: float) -> pd.Series:
        """Bits for each matrix: the least predicted damage under a budget.

        Args:
            mean_bits: Bits a weight that all matrices together may have.

        Raises:
            ValueError: The budget is below the smallest bit width that was measured.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        damage = self.table["predicted"].unstack("bits")
        widths = damage.columns.to_numpy(dtype=float)
        sizes = self.table["numel"].unstack("bits").iloc[:, 0].to_numpy(dtype=float)
        if mean_bits < widths.min():
            raise ValueError(
                f"mean_bits is at least {widths.min():g}, the smallest width measured, got "
                f"{mean_bits}"
            )
        n, m = damage.shape
        one_each = LinearConstraint(np.kron(np.eye(n), np.ones(m)), 1, 1)
        cost = (sizes[:, None] * widths).ravel() / sizes.sum()
        budget = LinearConstraint(cost[None], 0, mean_bits * (1 + 1e-9))
        scale = np.abs(damage.to_numpy()).max() or 1.0
        solved = milp(
            damage.to_numpy().ravel() / scale,
            constraints=[one_each, budget],
            integrality=np.ones(n * m),
            bounds=Bounds(0, 1),
        )
        assert solved.success, solved.message
        places = solved.x.reshape(n, m).argmax(1)
        return pd.Series(widths[places].astype(int), damage.index, name="bits")

    def measure(self, bits: pd.Series) -> float:
        """The loss's real change when every matrix has the bits given: one forward pass."""
        parameters = self.objective.parameters()
        blocks = next(iter(self.errors.values()))
        chosen = {block: self.errors[int(bits[block.name])][block] for block in blocks}
        before, terms = losses_by_unit(self.objective)
        shapes = {n: self.objective.weights.shape_of(p) for n, p in parameters.items()}
        with shifted(parameters, joined(chosen, shapes)):
            after, _ = losses_by_unit(self.objective)
        return float((after - before).sum() / terms.sum())


@shows_progress("sensitivity", "forward passes")
@takes(settings=OperatorSettings)
def sensitivity(
    objective: Objective,
    blocks: Sequence[Block],
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    group: int | None = None,
    symmetric: bool = True,
    num_probes: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    settings: OperatorSettings,
) -> Sensitivity:
    """Damage of rounding each matrix alone, at each bit width: predicted by curvature, and
    measured.

    Args:
        objective: The loss and its data.
        blocks: Disjoint; those without matrices (norms, biases) are left out.
        bits: Bit widths.
        group: Weights that share a scale, see :func:`blockspec.toolbox.directions.quantised`.
        symmetric: Levels around zero.
        num_probes: Of the traces.
        seed: Of all random vectors.
        progress: Called with (forward passes done, forward passes in all).
        [settings]
    """
    parameters = objective.parameters()
    shapes = {name: objective.weights.shape_of(p) for name, p in parameters.items()}
    moves = {b: quantised(objective.model, b, group=group, symmetric=symmetric) for b in bits}
    names = set(moves[bits[0]])
    chosen = [block for block in blocks if names.issuperset(block.parameters)]
    if not chosen:
        raise ValueError("none of the blocks is made of matrices: there is nothing to quantise")
    errors = {width: restricted(move, shapes, chosen) for width, move in moves.items()}
    operator, _ = open_operator(objective, chosen, settings)
    slopes = _slopes(objective, chosen, errors, operator.ranks)
    traces = trace(objective, chosen, num_probes=num_probes, seed=seed, **vars(settings))
    largest = _largest(operator, chosen, seed)
    rows = []
    for row in _rows(objective, operator, errors, slopes):
        rows.append(row | {"trace": traces[row["block"]].value, "largest": largest[row["block"]]})
        if progress is not None:
            progress(len(rows), len(chosen) * len(errors))
    table = pd.DataFrame(rows).astype({"layer": "Int64", "measured_data_stderr": float})
    table["predicted"] = table["gradient"] + 0.5 * table["curvature"]
    for name in ("trace", "largest"):
        table[name] *= table["mse"]
    return Sensitivity(table.set_index(["block", "bits"]), objective, errors)


def _rows(
    objective: Objective,
    operator: Operator,
    errors: Mapping[int, Mapping[Block, Tensor]],
    slopes: Mapping[tuple[Block, int], float],
) -> Iterator[dict[str, Any]]:
    """A row a (bit width, block), from one product and one forward pass each."""
    parameters = objective.parameters()
    before, terms = losses_by_unit(objective)
    for width, error in errors.items():
        images = operator.sweep(list(error.items()))
        for (block, q), image in zip(error.items(), images, strict=True):
            with shifted(parameters, joined({block: q}, operator.parameters)):
                after, _ = losses_by_unit(objective)
            measured = over_units(after - before, terms)
            yield {
                "block": block.name,
                "bits": width,
                "kind": block.kind,
                "layer": block.layer,
                "numel": block.numel,
                "mse": float(q.double().square().mean()),
                "gradient": slopes[block, width],
                "curvature": float(q.double() @ image.double()),
                "measured": measured.value,
                "measured_data_stderr": measured.data_stderr,
            }


def _slopes(
    objective: Objective,
    blocks: Sequence[Block],
    errors: Mapping[int, Mapping[Block, Tensor]],
    ranks: Ranks,
) -> dict[tuple[Block, int], float]:
    """(block, bits) -> g'q, from one gradient of every micro-batch."""
    keys = [(block, width) for block in blocks for width in errors]

    def each(gradient: Mapping[str, Tensor]) -> list[float]:
        parts = [(block, gather(block, gradient).double()) for block in blocks]
        return [float(part @ errors[w][block].double()) for block, part in parts for w in errors]

    found = gradients_by_unit(objective, each, len(keys), ranks=ranks)
    means = found["values"].sum(0) / found["terms"].sum()
    return dict(zip(keys, means.tolist(), strict=True))


def _largest(operator: Operator, blocks: Sequence[Block], seed: int) -> dict[str, float]:
    """Block name -> its largest eigenvalue."""

    def search(block: Block) -> Search:
        dtype = block_dtype(operator.parameters, block)

        def draw(number: int) -> Tensor:
            probe = draw_probe(
                block.name, block.numel, seed=seed, probe=number, distribution="gaussian"
            )
            return probe.to(operator.device, dtype)

        return Search(draw, 1, np.positive, tolerance=LOOSE, basis=20, max_products=40)

    found = run_together({block: search(block).run() for block in blocks}, operator)
    return {block.name: float(pairs.values[0]) for block, pairs in found.items()}
