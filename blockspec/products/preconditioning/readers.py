"""What each optimizer keeps of its preconditioner: the table from class to reader of its state.

A reader gives P^-1 of one parameter as the optimizer holds it now. ``lr P^-1 m`` is the next step,
where m is the momentum, with its bias correction. So the correction of the second moment and
epsilon belong to P, each where that optimizer has it. What does not belong to P is left out: weight
decay, clipping, and what scales the steps of a whole tensor (the learning rate, Muon's factor for
the shape, Adafactor's size of the parameter).

Numbers are read in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockspec.products.preconditioning.scalings import (
    Diagonal,
    Factor,
    Kronecker,
    Rotated,
    Scaling,
)

State = Mapping[str, Any]


@dataclass(frozen=True)
class Held:
    """What an optimizer holds of one parameter.

    Args:
        state: Its state.
        group: The settings of its group.
        shape: Of the parameter.
        settings: Of the whole optimizer, where they are not in its groups; empty if it is known
            from a file alone.
    """

    state: State
    group: Mapping[str, Any]
    shape: torch.Size
    settings: Mapping[str, Any]

    def number(self, name: str) -> float:
        """A number of the state, or of the group."""
        return float(self.state[name] if name in self.state else self.group[name])

    def wide(self, name: str) -> Tensor:
        """A tensor of the state, in float64."""
        return self.state[name].detach().double()

    def bias(self, beta: float, steps: float | None = None) -> float:
        """What a mean that began at 0 has reached of its value."""
        return 1.0 - beta ** (self.number("step") if steps is None else steps)


Reader = Callable[[Held], Scaling]


def _identity(held: Held) -> Scaling:
    return Diagonal(torch.ones((), dtype=torch.float64).expand(held.shape))


def _adam(held: Held) -> Scaling:
    name = "max_exp_avg_sq" if held.group.get("amsgrad") else "exp_avg_sq"
    square = held.wide(name) / held.bias(held.group["betas"][1])
    return _over(square.sqrt() + held.group["eps"])


def _adamax(held: Held) -> Scaling:
    return _over(held.wide("exp_inf"))  # epsilon is in it already


def _rmsprop(held: Held) -> Scaling:
    square = held.wide("square_avg")
    if held.group["centered"]:
        square = square - held.wide("grad_avg").square()
    return _over(square.clamp(min=0).sqrt() + held.group["eps"])


def _adagrad(held: Held) -> Scaling:
    return _over(held.wide("sum").sqrt() + held.group["eps"])


def _adafactor(held: Held) -> Scaling:
    smallest = held.group["eps"][0]
    if smallest is None:
        smallest = torch.finfo(held.state.get("row_var", held.state.get("variance")).dtype).eps
    if "variance" in held.state:
        square = held.wide("variance")
    else:
        row, column = held.wide("row_var"), held.wide("col_var")
        square = row @ column / row.mean(dim=-2, keepdim=True).clamp(min=smallest)
    return _over(square.clamp(min=smallest**2).sqrt())


def _adafactor_of_transformers(held: Held) -> Scaling:
    if "exp_avg_sq" in held.state:
        return _over(held.wide("exp_avg_sq").sqrt())
    row, column = held.wide("exp_avg_sq_row"), held.wide("exp_avg_sq_col")
    rows = (row / row.mean(dim=-1, keepdim=True)).unsqueeze(-1)
    return _over((rows * column.unsqueeze(-2)).sqrt())


def _adahessian(held: Held) -> Scaling:
    square = held.wide("exp_hessian_diag_sq") / held.bias(held.group["betas"][1])
    return _over(square.pow(held.group["hessian_power"] / 2) + held.group["eps"])


def _adam_mini(held: Held) -> Scaling:
    """One number a block: ``m`` is laid out so that numbers and blocks stand at the same places."""
    name = next(name for name in ("v", "vmean", "v_mean") if name in held.state)
    root = (held.wide(name) / held.bias(held.group["betas"][1])).sqrt() + held.group["eps"]
    layout = held.state["m"].shape
    while root.ndim < len(layout):
        root = root.unsqueeze(-1)
    return _over(root.expand(layout).reshape(held.shape))


def _muon(held: Held) -> Scaling:
    """(M M')^(-1/2) on the shorter side, of the momentum M.

    Newton-Schulz iterations come near to it. Where M has no part, the optimizer does not move, and
    P^-1 is taken as 0.
    """
    momentum = held.wide("momentum_buffer")
    side = 0 if momentum.shape[0] <= momentum.shape[1] else 1
    left, sizes, _ = torch.linalg.svd(momentum if side == 0 else momentum.T, full_matrices=False)
    rounding = torch.finfo(held.state["momentum_buffer"].dtype).eps * max(momentum.shape)
    there = sizes > rounding * sizes.max()
    factor = Factor(left[:, there], 1 / sizes[there])
    factors = (factor, None) if side == 0 else (None, factor)
    return Kronecker(factors, tuple(held.shape))


def _shampoo(prefix: str) -> Reader:
    """The inverse root of each axis's statistics, as it was last computed."""

    def read(held: Held) -> Scaling:
        factors = []
        for axis in range(len(held.shape)):
            matrix = held.wide(f"{prefix}_{axis}")
            if not matrix.any():
                raise NotReady("its roots have not been computed; take more steps")
            values, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
            factors.append(Factor(basis, values.clamp(min=0)))
        return Kronecker(tuple(factors), tuple(held.shape))

    return read


def _soap(held: Held) -> Scaling:
    """Adam in the basis of Shampoo's eigenvectors.

    pytorch_optimizer counts the steps of a group, of which the first one only measures.
    """
    steps = held.state.get("step", float(held.group.get("step", 0)) - 1)
    corrected = held.group.get("correct_bias", held.settings.get("correct_bias", True))
    if steps < 1:
        raise NotReady("its first step only measures; take another one")
    square = held.wide("exp_avg_sq")
    bases = _soaps_bases(held)
    turned = [b.detach().double() if torch.is_tensor(b) and b.numel() else None for b in bases]
    if held.group.get("merge_dims"):
        square = square.reshape(_merged(turned, square))
    bias = held.bias(held.group["betas"][1], steps) if corrected else 1.0
    values = 1 / _soaps_denominator(held, square, bias)
    return Rotated(tuple(turned), values, values.shape == held.shape)


def _soaps_bases(held: Held) -> Sequence[Any]:
    """One for each axis; NVIDIA's package keeps those of a matrix under a name each."""
    if "Q_L" in held.state:
        return [held.state["Q_L"], held.state["Q_R"]]
    return held.state["Q"]


def _soaps_denominator(held: Held, square: Tensor, bias: float) -> Tensor:
    """pytorch_optimizer corrects the whole denominator, NVIDIA's package the square alone."""
    if "step" in held.state:
        return (square / bias).sqrt() + held.group["eps"]
    return (square.sqrt() + held.group["eps"]) / math.sqrt(bias)


def _merged(bases: Sequence[Tensor | None], square: Tensor) -> list[int]:
    """The shape with merged axes, from the sizes of the bases; what has none takes the rest."""
    sizes = [-1 if b is None else len(b) for b in bases]
    if sizes.count(-1) > 1:
        raise NotReady("its merged axes cannot be told from its state: take merge_dims=False")
    return sizes if bases else list(square.shape)


def _heavyball_soap(held: Held) -> Scaling:
    """Its state is that of views of the parameter; the number of its place in a chain ends each
    name.
    """
    views = [value for value in held.state.values() if isinstance(value, Mapping)]
    state = {str(name).rsplit("_", 1)[0]: value for name, value in views[0].items()}
    square = state["scale_by_soap_exp_avg_sq"].detach().double()
    if len(views) > 1 or len(square) != 1:
        raise NotReady("it was split into several tensors: take split=False")
    bases = [None if b is None else b[0].double() for b in state["scale_by_soap_Q"]]
    values = 1 / square[0].sqrt().clamp(min=held.group["eps"])
    return Rotated(tuple(bases), values, values.shape == held.shape)


class NotReady(Exception):
    """The state has no preconditioner that could be read; the text says why."""


def _over(denominators: Tensor) -> Diagonal:
    return Diagonal(1 / denominators)


READERS: dict[tuple[str, str], Reader] = {
    ("torch", "SGD"): _identity,
    ("torch", "Adam"): _adam,
    ("torch", "AdamW"): _adam,
    ("torch", "NAdam"): _adam,
    ("torch", "Adamax"): _adamax,
    ("torch", "RMSprop"): _rmsprop,
    ("torch", "Adagrad"): _adagrad,
    ("torch", "Adafactor"): _adafactor,
    ("torch", "Muon"): _muon,
    ("transformers", "Adafactor"): _adafactor_of_transformers,
    ("blockspec", "AdaHessian"): _adahessian,
    ("adam_mini", "Adam_mini"): _adam_mini,
    ("pytorch_optimizer", "AdamMini"): _adam_mini,
    ("pytorch_optimizer", "Shampoo"): _shampoo("inv_pre_cond"),
    ("pytorch_optimizer", "SOAP"): _soap,
    ("torch_optimizer", "Shampoo"): _shampoo("inv_precond"),
    ("emerging_optimizers", "SOAP"): _soap,
    ("heavyball", "SOAP"): _heavyball_soap,
}
"""(first name of the package, class) -> reader. A line more is an optimizer more."""

STATELESS = frozenset({("torch", "SGD")})
"""Those whose preconditioner is known without a state."""
