"""Shampoo in its plainest form (Gupta, Koren, Singer, arXiv 1802.09568), for small models.

Statistics of every side are running means, so that old gradients are forgotten; their inverse roots
are made anew every few steps. It keeps its state under the names of ``pytorch_optimizer``'s, by
which ``blockspec.Preconditioner`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from blockspec import Preconditioner


class Shampoo(torch.optim.Optimizer):
    """``theta -= lr * (roots on every side of the momentum)``.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: Decay of momentum and statistics.
        eps: Added to the statistics, relative to their largest eigenvalue: what the last gradients
            had no part in would be blown up without it.
        every: Steps from one computation of the roots to the next, after the first ten.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-2,
        every: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "matrix_eps": eps, "every": every})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; there is no use for a closure."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, self.state[p], group)

    def _step(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state["steps"], state["momentum"] = 0, torch.zeros_like(p)
            for axis, size in enumerate(p.shape):
                state[f"pre_cond_{axis}"] = p.new_zeros(size, size)
        state["steps"] += 1
        first, second = group["betas"]
        state["momentum"].lerp_(gradient, 1 - first)
        update = state["momentum"] / (1 - first ** state["steps"])
        for axis in range(p.ndim):
            side = gradient.movedim(axis, 0).flatten(1) if p.ndim > 1 else gradient[:, None]
            state[f"pre_cond_{axis}"].lerp_(side @ side.T, 1 - second)
            if state["steps"] <= 10 or state["steps"] % group["every"] == 0:
                mean = state[f"pre_cond_{axis}"] / (1 - second ** state["steps"])
                state[f"inv_pre_cond_{axis}"] = _inverse_root(mean, 2 * p.ndim, group["matrix_eps"])
            root = state[f"inv_pre_cond_{axis}"]
            update = torch.tensordot(root, update, dims=([1], [axis])).movedim(0, axis)
        p.sub_(group["lr"] * update)


def _inverse_root(matrix: Tensor, order: int, eps: float) -> Tensor:
    """(n, n) the matrix to the power -1 / order."""
    values, basis = torch.linalg.eigh(matrix.double())
    floor = eps * values.max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((basis * (values.clamp(min=0) + floor).pow(-1 / order)) @ basis.T).to(matrix.dtype)


def shampoo_seen(optimizer: Shampoo, model: nn.Module) -> Preconditioner:
    """P of the optimizer as it is now."""
    return Preconditioner.from_state(optimizer.state_dict(), model, optimizer="Shampoo")
