"""The shared pass of one micro-batch, and the products that are made from it.

One forward pass and one backward pass are made with a graph that can be differentiated again. A
product then runs only through the part of that graph that lies between the direction's parameters
and the targets: ``autograd.grad(g_b, p_b, v_b)``.

Where the graph starts is left open: at the parameters of the whole model (:class:`Whole`), or at
the boundary behind its layers, see :mod:`blockspec.products.layerwise`. Both are a
:class:`Linearised`, which is all that :mod:`blockspec.products.curvature` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from blockspec.model.blocks import Block, scatter
from blockspec.model.kernels import paused
from blockspec.model.objective import Objective
from blockspec.numerics.portions import Portion
from blockspec.products.finiteness import check_terms

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Ask:
    """A product that is asked of a micro-batch.

    Args:
        block: Where the vector lies.
        vector: (P,). It is spread over the block's parameters when its turn comes, because the
            parameters of a small block may be large. Of a portion what is needed is brought
            together then.
        targets: Names of the parameters that the product is wanted for.
    """

    block: Block
    vector: Tensor | Portion
    targets: tuple[str, ...]

    def direction(
        self, parameters: Tensors, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Parameter name -> tensor, of some parameters or of all; zero elsewhere."""
        names = self.block.parameters if names is None else names
        if isinstance(self.vector, Portion):
            block, vector = self._together(self.vector, parameters, names)
        else:
            block, vector = self.block, self.vector
        found = scatter(block, vector, parameters)
        return {name: tensor for name, tensor in found.items() if name in names}

    def _together(
        self, vector: Portion, parameters: Tensors, names: Collection[str]
    ) -> tuple[Block, Tensor]:
        """The vector from the first piece of these parameters to the last one, and those pieces."""
        pieces = self.block.pieces
        ends = list(accumulate(p.size(parameters[p.parameter].shape) for p in pieces))
        places = [place for place, piece in enumerate(pieces) if piece.parameter in names]
        first, last = places[0], places[-1]
        start = ends[first - 1] if first else 0
        some = replace(self.block, pieces=pieces[first : last + 1], numel=ends[last] - start)
        return some, vector.whole(start, ends[last])


class Part(NamedTuple):
    """A part of a product: the number of its request, parameter name -> tensor, and whether it is
    the last. The parts of one request add up; absent names are zeros.
    """

    number: int
    tensors: Mapping[str, Tensor]
    last: bool


class Linearised(Protocol):
    """What the products of one micro-batch are made from; they are sums over its loss terms.

    Attributes:
        terms: The number of loss terms.
    """

    @property
    def terms(self) -> float: ...

    def products(self, asks: Sequence[Ask]) -> Iterator[Part]:
        """The parts of all products, each as soon as it is known."""
        ...

    def gradient(self) -> Iterator[Mapping[str, Tensor]]:
        """The parts of the loss's gradient, by parameter, which add up; for the Hessian alone."""
        ...


@dataclass(frozen=True, eq=False)
class End:
    """The end of a forward pass, and which curvature is taken of it.

    Args:
        outputs: A tensor with a graph: the loss, its terms, or the model's outputs.
        slope: Cotangent of ``outputs``, held fixed; the product is the derivative of the gradient
            that it gives. None: a Gauss-Newton product J' M J instead, J the Jacobian of
            ``outputs``.
        middle: M, a function of tangents of ``outputs``.
        terms: The number of loss terms.
    """

    outputs: Tensor
    slope: Tensor | None
    middle: Callable[[Tensor], Tensor] | None
    terms: float


class Linear:
    """Products with the curvature of an :class:`End` by what its graph starts from.

    Args:
        end: The end of the forward pass.
        start: Key -> tensor that the graph starts from: a parameter, or a boundary.
        wanted: Keys whose derivatives ``values`` has. A product needs the graph of a derivative and
            not its values, which take as much as all parameters do.
    """

    def __init__(self, end: End, start: Mapping[Any, Tensor], wanted: Sequence[Any] = ()) -> None:
        self._end, self._start = end, start
        dual = end.slope
        if dual is None:  # J v is the derivative of J' u by u, so that it shares a pass too
            dual = torch.zeros_like(end.outputs, requires_grad=True)
        self._dual = dual
        with paused():
            found = grad([end.outputs], start, grad_outputs=[dual], create_graph=True)
            self.values = {key: found[key].detach() for key in wanted if key in found}
            self._edges = edges(found)

    def gradient(self, keys: Sequence[Any]) -> dict[Any, Tensor]:
        """Derivatives by some keys; zero for a Gauss-Newton product."""
        wanted = {key: self._start[key] for key in keys}
        return grad([self._end.outputs], wanted, grad_outputs=[self._dual], retain_graph=True)

    def product(self, direction: Mapping[Any, Tensor], targets: Sequence[Any]) -> dict[Any, Tensor]:
        """Of the direction (zero elsewhere), by the keys in ``targets``; absent ones are zeros."""
        wanted = {key: self._start[key] for key in targets}
        if self._end.middle is None:
            return derivative(self._edges, direction, wanted)
        tangent = derivative(self._edges, direction, {"": self._dual})
        if not tangent:
            return {}
        cotangent = self._end.middle(tangent[""])
        return grad([self._end.outputs], wanted, grad_outputs=[cotangent], retain_graph=True)


class Whole:
    """The graph of the whole model, from the parameters on."""

    def __init__(self, end: End, parameters: Tensors) -> None:
        self.terms = end.terms
        self._linear, self._parameters = Linear(end, parameters), parameters

    def products(self, asks: Sequence[Ask]) -> Iterator[Part]:
        """One product after the other, each in one part."""
        for number, ask in enumerate(asks):
            direction = ask.direction(self._parameters)
            yield Part(number, self._linear.product(direction, ask.targets), True)

    def gradient(self) -> Iterator[Mapping[str, Tensor]]:
        """In one part."""
        yield self._linear.gradient(list(self._parameters))


def _hessian(objective: Objective, batch: Any) -> End:
    total, count = objective.loss_sum(batch)
    check_terms(total)
    return End(total, torch.ones_like(total), None, count)


def outputs_of(objective: Objective, batch: Any) -> Tensor:
    """The model's outputs, as the loss takes them."""
    return objective.computed(lambda: objective.loss.outputs(objective.model, batch))


def _residual(objective: Objective, batch: Any) -> End:
    outputs = outputs_of(objective, batch)
    leaf = outputs.detach().requires_grad_()
    terms = objective.loss.terms(leaf, batch)
    check_terms(terms)
    (slope,) = torch.autograd.grad(
        terms.sum(), leaf
    )  # held fixed: the outputs' own curvature is left
    return End(outputs, slope, None, float(terms.numel()))


def _ggn(objective: Objective, batch: Any) -> End:
    outputs = outputs_of(objective, batch)
    leaf = outputs.detach().requires_grad_()
    terms = objective.loss.terms(leaf, batch)
    check_terms(terms)
    (slope,) = torch.autograd.grad(terms.sum(), leaf, create_graph=True)
    bend = edges({"": slope})

    def middle(tangent: Tensor) -> Tensor:
        found = derivative(bend, {"": tangent}, {"": leaf})  # none: terms linear in the outputs
        return found[""] if found else torch.zeros_like(leaf)

    return End(outputs, None, middle, float(terms.numel()))


def _fisher(objective: Objective, batch: Any) -> End:
    terms = objective.loss.terms(outputs_of(objective, batch), batch)
    check_terms(terms)
    return End(terms, None, lambda tangent: tangent, float(terms.numel()))


ENDS: Mapping[str, Callable[[Objective, Any], End]] = {
    "hessian": _hessian,
    "ggn": _ggn,
    "fisher": _fisher,
    "residual": _residual,
}
"""Curvature -> one forward pass of a batch, up to the end that the curvature is taken of."""


def edges(gradients: Mapping[Any, Tensor]) -> dict[Any, GradientEdge]:
    """The places in the graph where gradients come out, of those that have a graph."""
    return {key: get_gradient_edge(g) for key, g in gradients.items() if g.requires_grad}


def derivative(
    gradients: Mapping[Any, GradientEdge],
    direction: Mapping[Any, Tensor],
    wanted: Mapping[Any, Tensor],
) -> dict[Any, Tensor]:
    """Derivative of <gradients, direction> by what is wanted; the graph is kept."""
    sources = [key for key in direction if key in gradients]
    return grad(
        [gradients[key] for key in sources],
        wanted,
        grad_outputs=[direction[key] for key in sources],
        retain_graph=True,
    )


def grad(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: Mapping[Any, Tensor],
    **settings: Any,
) -> dict[Any, Tensor]:
    """``torch.autograd.grad`` by name; without the inputs that the outputs do not depend on."""
    if not outputs or not inputs:
        return {}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), allow_unused=True, **settings)
    return {
        name: gradient
        for name, gradient in zip(inputs, gradients, strict=True)
        if gradient is not None
    }
