"""What a preconditioned sweep costs beside a plain one: ``python -m benchmarks.precondition``.

The same requests go to the Hessian as it is, as AdamW sees it (a diagonal), as Muon sees it (a
matrix on one side), as Shampoo sees it (on both sides) and as SOAP sees it (turned on both sides;
in the basis of its own, as spectra are made). Vectors are those of one Lanczos step of every weight
matrix and of the whole. The number of products is the same. What is added, two products with
P^(-1/2) for each vector, does not depend on the amount of data: with more batches it is a smaller
part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pandas as pd
import torch
from jsonargparse import CLI
from torch import Tensor, nn

import blockspec
from benchmarks.record import clock, in_turns, write
from benchmarks.sweep import SIZES, Size, matrices, model_of
from blockspec.products.curvature import Products
from blockspec.products.preconditioning.operator import Preconditioned, in_own_basis


def stepped(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """One step with random gradients: costs do not depend on them."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()


def adamw(model: nn.Module) -> blockspec.Preconditioner:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    stepped(model, optimizer)
    return blockspec.Preconditioner.from_optimizer(optimizer, model)


def muon(model: nn.Module) -> blockspec.Preconditioner:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.0), torch.optim.AdamW(vectors, lr=0.0)]
    stepped(model, *optimizers)
    return blockspec.Preconditioner.from_optimizer(optimizers, model)


def shampoo(model: nn.Module, most: int = 2048) -> blockspec.Preconditioner:
    """Its state, with random roots of the sides up to ``most``, without its package."""

    def root(size: int) -> Tensor:
        return torch.eye(size) + 0.1 * torch.rand(size, size) / size

    states = {
        number: {f"inv_pre_cond_{axis}": root(size) for axis, size in enumerate(p.shape)}
        for number, p in enumerate(model.parameters())
        if max(p.shape) <= most
    }
    names = [n for n, p in model.named_parameters() if max(p.shape) <= most]
    group = {"matrix_eps": 1e-6, "params": list(states)}
    state = {"state": states, "param_groups": [group]}
    return blockspec.Preconditioner.from_state(state, model, names=names)


def soap(model: nn.Module, most: int = 2048) -> blockspec.Preconditioner:
    """Its state, with random bases of the sides up to ``most``, without its package."""

    def basis(size: int) -> Tensor | list[float]:
        return torch.linalg.qr(torch.randn(size, size))[0] if size <= most else []

    states: dict[int, dict[str, Any]] = {
        number: {
            "exp_avg_sq": torch.rand_like(p),
            "GG": [],
            "Q": [basis(size) for size in p.shape] if p.ndim > 1 else [[]],
        }
        for number, p in enumerate(model.parameters())
    }
    group = {"normalize_gradient": False, "betas": (0.95, 0.95), "eps": 1e-8, "step": 9}
    state = {"state": states, "param_groups": [group | {"params": list(states)}]}
    return blockspec.Preconditioner.from_state(state, model)


MAKERS: dict[str, Callable[[nn.Module], blockspec.Preconditioner]] = {
    "AdamW (diagonal)": adamw,
    "Muon (one side)": muon,
    "Shampoo (both sides)": shampoo,
    "SOAP (both sides, turned)": soap,
}


def objective_of(size: Size, batches: int) -> blockspec.Objective:
    """Random tokens; costs do not depend on them, nor on the weights."""
    tokens = torch.randint(size.vocabulary, (batches, size.batch, size.tokens))
    data = [{"input_ids": batch} for batch in tokens]
    return blockspec.Objective(model_of(size), data, blockspec.losses.next_token)


def measure(size: Size, batches: int, rounds: int) -> pd.DataFrame:
    """A row for each preconditioner: seconds of a sweep, and over those of the plain one."""
    objective = objective_of(size, batches)
    blocks = [*matrices(objective), *blockspec.partition(objective.model, "model")]
    requests = [(block, torch.randn(block.numel)) for block in blocks]
    operators: dict[str, blockspec.Operator] = {"none": Products(objective)}
    made = {"none": 0.0}
    for name, make in MAKERS.items():
        plain = blockspec.Preconditioned(Products(objective), make(objective.model))
        operator = cast(Preconditioned, in_own_basis(plain))
        start = clock()
        for block, vector in requests:
            operator.root(block, vector)  # the roots are made once
        operators[name], made[name] = operator, clock() - start
    sweeps = {name: partial(operator.sweep, requests) for name, operator in operators.items()}
    seconds = in_turns(sweeps, rounds=rounds)
    table = pd.DataFrame({"seconds of a sweep": seconds, "roots, made once": made})
    table["more than plain, %"] = 100 * (table["seconds of a sweep"] / seconds["none"] - 1)
    table["products"] = [operators[n].products / (rounds + 1) for n in table.index]
    table.index.name = "seen by"
    return table


def run(
    *,
    sizes: tuple[str, ...] = tuple(SIZES)[:2],
    batches: tuple[int, ...] = (1, 4),
    rounds: int = 5,
) -> None:
    """Writes the table to benchmarks/results.

    Args:
        sizes: Of ``benchmarks.sweep.SIZES``.
        batches: Numbers of batches.
        rounds: The median of so many is told.
    """
    tables = {}
    for name in sizes:
        size = SIZES[name]
        for number in batches:
            tokens = number * size.batch * size.tokens
            tables[f"{name}, {tokens:,} tokens"] = measure(size, number, rounds)
    write("precondition", tables)


if __name__ == "__main__":
    CLI(run)
