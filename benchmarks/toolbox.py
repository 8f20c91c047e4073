"""What traces, coupling and eigenpairs cost: ``python -m benchmarks.toolbox``.

Traces and coupling of all matrices of a model against products of the full matrix, in products and in time (both take turns,
medians of the ratios of each turn); eigenpairs against ARPACK and LOBPCG of scipy in products. Writes a dated table into
``benchmarks/results/``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jsonargparse import CLI
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.blocks import Block
from blockspec.curvature import Products
from blockspec.eigenpairs import ORDERS
from blockspec.restarts import Search
from blockspec.sweeps import run

PACKAGES = ("blockspec", "torch", "transformers", "scipy")
SCIPY = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}


def objective_of(layers: int, batch_size: int) -> blockspec.Objective:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": layers, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))
    batch = {"input_ids": torch.randint(256, (batch_size, 64))}
    return blockspec.Objective(model, [batch], blockspec.losses.next_token)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def trace_ratio(objective: blockspec.Objective, blocks: list[Block], turns: int, num_probes: int) -> list[float]:
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
            return self.rows(torch.from_numpy(np.ascontiguousarray(matrix.reshape(self.size, -1).T))).numpy().T

        return LinearOperator((self.size, self.size), matvec=lambda v: columns(v)[:, 0], matmat=columns, dtype=np.float64)


def matrices() -> dict[str, Counted]:
    """The whole Hessian of a tiny GPT-2, and matrices with clusters and with repeated eigenvalues."""
    objective = objective_of(1, 1)
    objective.model.double()
    (full,) = blockspec.partition(objective.model, "model")
    products = Products(objective)
    found = {
        "Hessian of GPT-2, P = 70,000": Counted(lambda rows: torch.stack(products.sweep([(full, v) for v in rows])), full.numel)
    }
    bulk = torch.linspace(-0.1, 0.1, 490, dtype=torch.float64)
    tops = {
        "two clusters of 5, width 4e-4": [1.2 + 1e-4 * i for i in range(5)] + [1 + 1e-4 * i for i in range(5)],
        "1 and 2, 5 times each": [1.0] * 5 + [2.0] * 5,
    }
    for name, top in tops.items():
        values = torch.cat([bulk, torch.tensor(top, dtype=torch.float64)])
        basis, _ = torch.linalg.qr(torch.randn(500, 500, dtype=torch.float64))
        matrix = basis @ torch.diag(values) @ basis.T
        found[name] = Counted(lambda rows, matrix=matrix: rows @ matrix, 500)
    return found


def ours(it: Counted, k: int, which: str, tolerance: float) -> tuple[np.ndarray, int]:
    it.count = 0
    generator = torch.Generator().manual_seed(0)
    draw = lambda number: torch.randn(it.size, generator=generator, dtype=torch.float64)  # noqa: E731
    search = Search(draw, k, ORDERS[which], tolerance=tolerance, basis=max(2 * k + 1, 20), max_products=2000)
    found = run(search.run(), it.rows)
    return np.sort(found.values), it.count


def arpack(it: Counted, k: int, which: str, tolerance: float) -> tuple[np.ndarray, int]:
    it.count = 0
    start = np.random.default_rng(0).normal(size=it.size)
    values = eigsh(it.operator(), k=k, which=SCIPY[which], tol=tolerance, v0=start, return_eigenvectors=False)
    return np.sort(values), it.count


def locally_optimal(it: Counted, k: int, which: str, tolerance: float, norm: float) -> tuple[np.ndarray, int]:
    it.count = 0
    start = np.random.default_rng(0).normal(size=(it.size, k))
    values, _ = lobpcg(it.operator(), start, largest=which != "smallest", tol=tolerance * norm, maxiter=200)
    return np.sort(values), it.count


def eigenpairs_table(k: int, tolerance: float) -> str:
    rows = ["| matrix | which | ours | ARPACK | LOBPCG | difference |", "|---|---|---|---|---|---|"]
    for name, it in matrices().items():
        norm = float(np.abs(ours(it, 1, "magnitude", tolerance)[0]).max())
        for which in ("largest", "smallest"):
            values, count = ours(it, k, which, tolerance)
            others, arpack_count = arpack(it, k, which, tolerance)
            lobpcg_values, lobpcg_count = locally_optimal(it, k, which, tolerance, norm)
            differences = [np.abs(values - other).max() / norm for other in (others, lobpcg_values)]
            difference = " and ".join(f"{d:.0e}" for d in differences)
            rows.append(f"| {name} | {which} {k} | {count} | {arpack_count} | {lobpcg_count} | {difference} |")
    return "\n".join(rows)


def described(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def main(
    layers: int = 3, batch_size: int = 4, turns: int = 9, k: int = 8, tolerance: float = 1e-3, out: str = "benchmarks/results"
) -> None:
    """Costs of the toolbox on a tiny GPT-2 (D=64, V=256, T=64).

    Args:
        layers: Layers of the model whose blocks are traced and coupled.
        batch_size: Sequences of 64 tokens.
        turns: Measurements of each time.
        k: Eigenpairs.
        tolerance: Relative residual of the eigenpairs.
        out: Folder of the table.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # LOBPCG says when it has not converged
    objective = objective_of(layers, batch_size)
    blocks = list(blockspec.partition(objective.model, "matrix"))
    (full,) = blockspec.partition(objective.model, "model")
    probes = 8
    traces = [blockspec.trace(objective, some, num_probes=probes).cost.products for some in (blocks, full)]
    coupled = blockspec.coupling(objective, blocks, 1).cost.products
    text = (
        f"# Toolbox, {datetime.date.today()}\n\n"
        f"- Traces of {len(blocks)} blocks, {probes} probes: {traces[0]} full products; of the full matrix: {traces[1]}. "
        f"Time of the one over the other: {described(trace_ratio(objective, blocks, turns, probes))}.\n"
        f"- Coupling of {len(blocks)} blocks, 1 probe: {coupled} full products; it took as long as "
        f"{described(coupling_ratio(objective, blocks, turns))} full products one by one.\n\n"
        f"Products for {k} eigenpairs to a relative residual of {tolerance:g}. ARPACK takes its tolerance relative to each "
        "eigenvalue, the others relative to the norm; ours includes the search for missing copies. Difference: of ARPACK's and "
        f"of LOBPCG's (at most 200 rounds) values to ours, relative to the norm.\n\n{eigenpairs_table(k, tolerance)}\n\n"
        f"Tiny GPT-2: {layers} layers (eigenpairs: 1), D=64, V=256, T=64, B={batch_size}, float32, one thread; {turns} turns.\n\n"
        f"Command: `python -m benchmarks.toolbox {' '.join(sys.argv[1:])}`\n"
        f"Machine: {platform.processor() or platform.machine()}, {platform.platform()}\n"
        f"Versions: Python {platform.python_version()}, {', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES)}\n"
    )
    print(text)
    path = Path(out) / f"toolbox-{datetime.date.today()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    CLI(main)
