"""What traces, coupling and eigenpairs cost: ``python -m benchmarks.toolbox``.

Traces and coupling of the 49 weight matrices of a GPT-2 against products of the full matrix, in
products and in time (both take turns, medians of the ratios of each turn); eigenpairs against
ARPACK and LOBPCG of scipy in products.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

import blockspec
from benchmarks.record import PACKAGES, clock, write
from benchmarks.sweep import Size, matrices, objective_of
from blockspec.model.blocks import Block
from blockspec.numerics.algorithms import run
from blockspec.numerics.restarts import Search
from blockspec.products.curvature import Products
from blockspec.toolbox.eigenpairs import ORDERS

SCIPY = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}


def seconds(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def trace_ratio(
    objective: blockspec.Objective, blocks: list[Block], turns: int, num_probes: int
) -> list[float]:
    """Time of the traces of all blocks over that of the trace of the full matrix, turn by turn."""
    (full,) = blockspec.partition(objective.model, "model")
    ratios = []
    for _ in range(turns + 1):
        before = seconds(lambda: blockspec.trace(objective, full, num_probes=num_probes))
        many = seconds(lambda: blockspec.trace(objective, blocks, num_probes=num_probes))
        after = seconds(lambda: blockspec.trace(objective, full, num_probes=num_probes))
        ratios.append(2 * many / (before + after))
    return ratios[1:]  # the first one allocates


def coupling_ratio(objective: blockspec.Objective, blocks: list[Block], turns: int) -> list[float]:
    """Time of the coupling of all blocks with one probe over that of one full product."""
    (full,) = blockspec.partition(objective.model, "model")
    products = Products(objective)
    vector = torch.randn(full.numel)
    ratios = []
    for _ in range(turns + 1):
        one = seconds(lambda: products.sweep([(full, vector)]))
        ratios.append(seconds(lambda: blockspec.coupling(objective, blocks, 1)) / one)
    return ratios[1:]


class Counted:
    """A symmetric product that counts; rows in, rows out."""

    def __init__(self, product: Callable[[torch.Tensor], torch.Tensor], size: int) -> None:
        self.product, self.size, self.count = product, size, 0

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        self.count += len(rows)
        return self.product(rows)

    def operator(self) -> LinearOperator:
        def columns(matrix: np.ndarray) -> np.ndarray:
            return (
                self.rows(torch.from_numpy(np.ascontiguousarray(matrix.reshape(self.size, -1).T)))
                .numpy()
                .T
            )

        return LinearOperator(
            (self.size, self.size),
            matvec=lambda v: columns(v)[:, 0],
            matmat=columns,
            dtype=np.float64,
        )


def operators() -> dict[str, Counted]:
    """The whole Hessian of a tiny GPT-2, and matrices with clusters and with repeated
    eigenvalues.
    """
    objective = objective_of(Size(1, 64, 4, 256, 1, 64))
    objective.model.double()
    (full,) = blockspec.partition(objective.model, "model")
    products = Products(objective)
    found = {
        "Hessian of GPT-2, P = 70,000": Counted(
            lambda rows: torch.stack(products.sweep([(full, v) for v in rows])), full.numel
        )
    }
    bulk = torch.linspace(-0.1, 0.1, 490, dtype=torch.float64)
    tops = {
        "two clusters of 5, width 4e-4": [1.2 + 1e-4 * i for i in range(5)]
        + [1 + 1e-4 * i for i in range(5)],
        "1 and 2, 5 times each": [1.0] * 5 + [2.0] * 5,
    }
    for name, top in tops.items():
        values = torch.cat([bulk, torch.tensor(top, dtype=torch.float64)])
        basis, _ = torch.linalg.qr(torch.randn(500, 500, dtype=torch.float64))
        matrix = basis @ torch.diag(values) @ basis.T
        found[name] = Counted(partial(torch.matmul, other=matrix), 500)
    return found


def ours(it: Counted, k: int, which: str, tolerance: float) -> tuple[np.ndarray, int]:
    it.count = 0
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> torch.Tensor:
        return torch.randn(it.size, generator=generator, dtype=torch.float64)

    search = Search(
        draw, k, ORDERS[which], tolerance=tolerance, basis=max(2 * k + 1, 20), max_products=2000
    )
    found = run(search.run(), it.rows)
    return np.sort(found.values), it.count


def arpack(it: Counted, k: int, which: str, tolerance: float) -> tuple[np.ndarray, int]:
    it.count = 0
    start = np.random.default_rng(0).normal(size=it.size)
    values = eigsh(
        it.operator(), k=k, which=SCIPY[which], tol=tolerance, v0=start, return_eigenvectors=False
    )
    return np.sort(values), it.count


def locally_optimal(
    it: Counted, k: int, which: str, tolerance: float, norm: float
) -> tuple[np.ndarray, int]:
    it.count = 0
    start = np.random.default_rng(0).normal(size=(it.size, k))
    values, _ = lobpcg(
        it.operator(), start, largest=which != "smallest", tol=tolerance * norm, maxiter=200
    )
    return np.sort(values), it.count


def eigenpairs_table(k: int, tolerance: float) -> pd.DataFrame:
    rows = []
    for name, it in operators().items():
        norm = float(np.abs(ours(it, 1, "magnitude", tolerance)[0]).max())
        for which in ("largest", "smallest"):
            values, count = ours(it, k, which, tolerance)
            others, arpack_count = arpack(it, k, which, tolerance)
            lobpcg_values, lobpcg_count = locally_optimal(it, k, which, tolerance, norm)
            differences = [
                float(np.abs(values - other).max() / norm) for other in (others, lobpcg_values)
            ]
            rows.append((name, f"{which} {k}", count, arpack_count, lobpcg_count, *differences))
    columns = [
        "matrix",
        "which",
        "ours",
        "ARPACK",
        "LOBPCG",
        "ARPACK's difference",
        "LOBPCG's difference",
    ]
    return pd.DataFrame(rows, columns=columns)


def sharing_table(
    objective: blockspec.Objective, blocks: list[Block], turns: int, probes: int
) -> pd.DataFrame:
    (full,) = blockspec.partition(objective.model, "model")
    traced, whole = (
        blockspec.trace(objective, some, num_probes=probes).cost.products for some in (blocks, full)
    )
    coupled = blockspec.coupling(objective, blocks, 1).cost.products
    ratios = {
        f"traces, {probes} probes": (traced, whole, trace_ratio(objective, blocks, turns, probes)),
        "coupling, 1 probe": (coupled, 1, coupling_ratio(objective, blocks, turns)),
    }
    columns = [
        "what",
        "full products",
        "of the full matrix alone",
        "times as long",
        "lower quartile",
        "upper quartile",
    ]
    rows = []
    for name, (products, alone, times) in ratios.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rows.append((name, products, alone, middle, low, high))
    return pd.DataFrame(rows, columns=columns)


def main(layers: int = 12, turns: int = 9, k: int = 8, tolerance: float = 1e-3) -> None:
    """Costs of the toolbox on a tiny GPT-2 (D=64, V=256, T=64).

    Args:
        layers: Layers of the model whose matrices are traced and coupled: 4 each, and the
            embedding.
        turns: Measurements of each time.
        k: Eigenpairs.
        tolerance: Relative residual of the eigenpairs.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # LOBPCG says when it has not converged
    objective = objective_of(Size(layers, 64, 4, 256, 4, 64))
    blocks = matrices(objective)
    tables = {
        f"{len(blocks)} blocks: {layers} layers, D=64, V=256, B=4, T=64": sharing_table(
            objective, blocks, turns, probes=8
        ),
        f"Products for {k} eigenpairs to a relative residual of {tolerance:g}": eigenpairs_table(
            k, tolerance
        ),
    }
    notes = (
        "ARPACK takes its tolerance relative to each eigenvalue, the others relative to the norm; "
        "ours includes the search for "
        "missing copies. Differences: of their values (LOBPCG: at most 200 rounds) to ours, "
        "relative to the norm. The Hessian is "
        "that of a GPT-2 of one layer, D=64, V=256, T=64. Ratios are of CPU time."
    )
    write("toolbox", tables, notes=notes, packages=(*PACKAGES, "scipy"))


if __name__ == "__main__":
    CLI(main)
