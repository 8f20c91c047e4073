"""The edge of stability: the largest curvature that an optimizer's own settings can bear.

On a quadratic of curvature s along one direction, gradient descent with learning rate lr goes
``theta <- (1 - lr s) theta`` and diverges where s passes 2 / lr. With a momentum the bound is
another, and with a preconditioner it is one on the eigenvalues of ``P^-1 H``. Training by full
batches drives the largest eigenvalue up to the bound, where it stays: Cohen et al.,
arXiv 2103.00065 (gradient descent) and 2207.14484 (adaptive optimizers).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blockspec.products.preconditioning.preconditioner import kind_of_class, unwrapped
from blockspec.products.preconditioning.states import Kind, StateDict, kind_of, load_state

Group = Mapping[str, Any]
Bound = tuple[float, str]


@dataclass(frozen=True)
class Threshold:
    """The bound of one group of parameters.

    Attributes:
        value: The largest eigenvalue that is stable; unit: 1 / learning rate.
        formula: How it comes about.
        preconditioned: Whether it bounds the eigenvalues of ``P^-1 H``, or those of H itself.
        optimizer: The class.
    """

    value: float
    formula: str
    preconditioned: bool
    optimizer: str

    @property
    def label(self) -> str:
        """For a line in a figure."""
        return f"{self.optimizer}: {self.formula} = {self.value:.3g}"


def _gradient_descent(group: Group) -> Bound:
    """torch's heavy ball, ``m <- b m + (1 - dampening) g``, and Nesterov's form of it."""
    beta = group.get("momentum", 0.0)
    if beta and group.get("nesterov"):
        return (2 + 2 * beta) / (1 + 2 * beta), "(2 + 2 b) / ((1 + 2 b) lr)"
    if beta and group.get("dampening", 0.0):
        return (2 + 2 * beta) / (1 - group["dampening"]), "(2 + 2 b) / ((1 - d) lr)"
    return (2 + 2 * beta, "(2 + 2 b) / lr") if beta else (2.0, "2 / lr")


def _averaged(group: Group) -> Bound:
    """m <- b m + (1 - b) g."""
    beta = group["betas"][0]
    return (2 + 2 * beta) / (1 - beta), "(2 + 2 b1) / ((1 - b1) lr)"


def _nadam(group: Group) -> Bound:
    """As the one before, and Nesterov's form; late, when its own b1 has come to rest."""
    beta = group["betas"][0]
    return (2 + 2 * beta) / ((1 + 2 * beta) * (1 - beta)), "(2 + 2 b1) / ((1 + 2 b1) (1 - b1) lr)"


BOUNDS: dict[Kind, Callable[[Group], Bound]] = {
    ("torch", "SGD"): _gradient_descent,
    ("torch", "RMSprop"): _gradient_descent,
    ("torch", "Adam"): _averaged,
    ("torch", "AdamW"): _averaged,
    ("torch", "NAdam"): _nadam,
    ("torch", "Adamax"): _averaged,
    ("blockspec", "AdaHessian"): _averaged,
    ("adam_mini", "Adam_mini"): _averaged,
    ("pytorch_optimizer", "AdamMini"): _averaged,
    ("pytorch_optimizer", "SOAP"): _averaged,
    ("emerging_optimizers", "SOAP"): _averaged,
    ("heavyball", "SOAP"): _averaged,
}
"""Class -> its bound times the learning rate, and the formula.

Left out are those whose P is no slow average: Muon makes it of the very momentum that it
multiplies; Adagrad, and Shampoo without a decay, add up P for ever, so that nothing settles; and
those that scale each step by the size of the parameter or of the update (Adafactor).
"""


def stability_thresholds(
    source: torch.optim.Optimizer | str | os.PathLike[str] | StateDict,
    *,
    optimizer: str | None = None,
) -> tuple[Threshold, ...]:
    """The edge of stability by the optimizer's own settings: of gradient descent 2 / lr, with a
    momentum (2 + 2 b) / lr, of Adam (2 + 2 b1) / ((1 - b1) lr), which is 38 / lr for b1 = 0.9.

    Weight decay, which moves the bound by about itself, is left out.

    Args:
        source: An optimizer, or its saved state as :meth:`Preconditioner.from_state` takes it.
        optimizer: The class, where a saved state does not tell.

    Returns:
        One threshold for each bound that differs; several where groups have other learning rates.

    Raises:
        ValueError: The optimizer has no such bound, or is not known.
    """
    if isinstance(source, (str, os.PathLike, Mapping)):
        state = load_state(source)
        kind, groups = kind_of(state, optimizer), state["param_groups"]
    else:
        inner = unwrapped(source)
        kind, groups = kind_of_class(type(inner)), inner.param_groups
    if kind not in BOUNDS:
        raise ValueError(
            f"{kind[1]} has no edge of stability that follows from its settings alone; known are "
            f"those of {sorted({name for _, name in BOUNDS})}"
        )
    found = []
    for group in groups:
        times, formula = BOUNDS[kind](group)
        found.append(Threshold(times / float(group["lr"]), formula, kind[1] != "SGD", kind[1]))
    return tuple(dict.fromkeys(found))
