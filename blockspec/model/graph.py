"""What autograd recorded of one forward pass, read as a graph of products, streams and softmaxes.

The idea: every model, whatever its modules are called, leaves the same record once it has run. Each
tensor points to the operation that made it (a :class:`torch.autograd.graph.Node`), and each
operation to those that made its inputs. A *linear* is a product of which one factor comes from
parameters alone; a *product* has activations on both sides, as attention has; a *stream* is a sum
``x + f(x)``, where a layer ends. All else (views, norms, activations) lies between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

Edge = tuple[Node, int]
"""An operation and the number of the output meant."""

PRODUCTS: dict[str, tuple[int, int]] = {
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Addmm": (1, 2),
    "Baddbmm": (1, 2),
    "Addbmm": (1, 2),
    "Mv": (0, 1),
    "Linear": (0, 1),
    "GroupedMm": (0, 1),
    "Convolution": (0, 1),
}
"""Operation -> which of its inputs are the left and the right factor."""

CONVOLUTION = "Convolution"
OF_WEIGHTS = frozenset(
    {
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze"),
        *("Squeeze", "Select", "Slice", "Split", "SplitWithSizes", "Unbind", "ToCopy", "Clone"),
        *("Alias", "AsStrided", "Index", "IndexSelect", "Cat", "Stack", "Mul", "Div", "Sub", "Add"),
        *(
            "Neg",
            "WeightNormInterface",
            "Mean",
            "Sum",
            "Norm",
            "LinalgVectorNorm",
            "Var",
            "VarMean",
        ),
        *("Rsqrt", "Sqrt", "Pow", "NativeBatchNorm"),
    }
)
"""Operations between a parameter and the factor that it is in: views, and what reparametrisations
do.
"""

RESHAPES = frozenset(["View", "UnsafeView", "ReshapeAlias", "Clone", "Expand", "Alias", "ToCopy"])
NONLINEAR = frozenset(
    {
        *("Gelu", "Silu", "Relu", "Tanh", "Sigmoid", "Erf", "LeakyRelu", "Elu", "Softplus", "Mish"),
        *("Hardswish", "Threshold", "ClampMin", "Hardtanh", "Hardsigmoid", "Glu", "LogSigmoid"),
        *("Pow", "Exp", "Celu", "Selu", "Prelu", "Square", "Maximum"),
    }
)
SOFTMAXES = frozenset({"Softmax", "SafeSoftmax"})
RANKINGS = frozenset({"Topk", "Sort"})
PICKS = frozenset({"Gather", "Max", "Scatter"})
LEAF = "AccumulateGrad"


def operation(node: Node) -> str:
    """The operation that a node is of: ``Mm`` for ``MmBackward0``."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward").lstrip("_")


def is_product(node: Node) -> bool:
    """Whether a node multiplies matrices; convolutions with a kernel count as what lies between."""
    return operation(node) in PRODUCTS and operation(node) != CONVOLUTION


def shape(edge: Edge) -> tuple[int, ...]:
    """The shape of an operation's output."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)  # type: ignore[attr-defined]


@dataclass(eq=False)
class Linear:
    """A product with parameters; ``weights``: parameter -> axis that counts its outputs (None: not
    known).
    """

    node: Node
    input: Edge | None
    weights: dict[str, int | None]


@dataclass
class Behind:
    """What a walk back from an edge meets first."""

    linears: dict[Linear, bool] = field(
        default_factory=dict
    )  # -> whether a nonlinearity was between
    products: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)  # between, the nearest first
    stream: bool = False


class Graph:
    """The operations behind some tensors."""

    def __init__(self, tensors: Iterable[Tensor], model: nn.Module) -> None:
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.ends: list[Edge] = [(t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None]
        self.nodes = list(_nodes(node for node, _ in self.ends))
        self.consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        for node in self.nodes:
            for place, (source, _) in enumerate(node.next_functions):
                if source is not None:
                    self.consumers[source].append((node, place))
        self._streams: dict[Node, bool] = {}
        self.linears = {n: l for n in self.nodes if (l := self._linear(n)) is not None}

    def factors(self, node: Node) -> tuple[Edge | None, Edge | None] | None:
        """Left and right factor of a product; None for another operation."""
        places = PRODUCTS.get(operation(node))
        if places is None:
            return None
        left, right = (node.next_functions[place] for place in places)
        return _edge(left), _edge(right)

    def _linear(self, node: Node) -> Linear | None:
        factors = self.factors(node)
        if factors is None or (operation(node) == CONVOLUTION and not self._pointwise(node)):
            return None
        for side, other in ((1, 0), (0, 1)):  # F.linear has its weight on the right
            weights = self.leaves(factors[side])
            if weights:
                axes = {
                    name: self._axis(node, side, name, flips) for name, flips in weights.items()
                }
                return Linear(node, factors[other], axes)
        return None

    def _pointwise(self, node: Node) -> bool:
        """Whether a convolution is a matrix that acts on every pixel."""
        names = self.leaves(self.factors(node)[1])  # type: ignore[index]
        return any(
            len(self.shapes[name]) > 2 and set(self.shapes[name][2:]) == {1} for name in names
        )

    def _axis(self, node: Node, side: int, name: str, flips: int | None) -> int | None:
        if operation(node) == CONVOLUTION:
            return 0
        if flips is None:
            return None
        return -1 if flips % 2 != side % 2 else -2

    def leaves(self, edge: Edge | None) -> dict[str, int | None]:
        """Parameters that a factor consists of -> how often its last two axes were swapped; {} if
        it is an activation.
        """
        found: dict[str, int | None] = {}
        todo: list[tuple[Node, int | None]] = [(edge[0], 0)] if edge else []
        seen: set[Node] = set()
        while todo:
            node, flips = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if operation(node) == LEAF:
                name = self.parameters.get(id(node.variable))  # type: ignore[attr-defined]
                if name is None:
                    return {}
                found[name] = flips
            elif operation(node) not in OF_WEIGHTS or len(seen) > 60:
                return {}
            else:
                flips = _flipped(node, flips)
                todo += [(source, flips) for source, _ in node.next_functions if source is not None]
        return found

    def is_stream(self, node: Node) -> bool:
        """Whether a node is ``x + f(x)``: one of the two is made from the other."""
        if node not in self._streams:
            sources = [source for source, _ in node.next_functions if source is not None]
            self._streams[node] = (
                operation(node) == "Add"
                and len(sources) == 2
                and sources[0] is not sources[1]
                and LEAF not in map(operation, sources)
                and any(
                    self._made_from(early, late)
                    for one, late in (sources, sources[::-1])
                    for early in self._unscaled(one)
                )
            )
        return self._streams[node]

    def _unscaled(self, node: Node) -> Iterator[Node]:
        """The node, and what it is before views and scales: a residual may be scaled before it is
        added to.
        """
        for _ in range(6):
            yield node
            if node in self.linears or operation(node) not in (*RESHAPES, "Mul", "Div"):
                return
            inner = [e for e in map(_edge, node.next_functions) if e and not self.leaves(e)]
            if len(inner) != 1:
                return
            node = inner[0][0]

    def _made_from(self, early: Node, late: Node) -> bool:
        """Whether ``late`` is made from ``early`` by way of a linear; numbers grow in the order of
        the forward pass.
        """
        number = early._sequence_nr()
        todo = [(late, late in self.linears)]
        seen = set(todo)
        for node, crossed in todo:
            for source, _ in node.next_functions:
                if source is early and crossed:
                    return True
                if source is None or operation(source) == LEAF or source._sequence_nr() <= number:
                    continue
                step = (source, crossed or source in self.linears)
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
        return False

    def behind(self, edge: Edge | None, *, through_softmax: bool = True) -> Behind:
        """Walk back from an edge to the nearest linears, stopping where a layer begins."""
        found = Behind()
        todo = [(edge[0], False)] if edge else []
        seen = set(todo)
        for node, bent in todo:  # grows as it is read: breadth first
            if node in self.linears:
                found.linears[self.linears[node]] = (
                    found.linears.get(self.linears[node], False) or bent
                )
                continue
            if self.is_stream(node):
                found.stream = True
                continue
            if operation(node) in SOFTMAXES and not through_softmax:
                continue
            if is_product(node):
                found.products.append(node)
            found.nodes.append(node)
            bent = bent or operation(node) in NONLINEAR or isinstance(node, BackwardCFunction)
            for source, _ in node.next_functions:
                if source is not None and (source, bent) not in seen:
                    seen.add((source, bent))
                    todo.append((source, bent))
        return found

    def ahead(self, node: Node) -> Iterator[tuple[Node, int]]:
        """Walk forward to linears, products, streams and choices (each yielded with the place where
        it is entered).
        """
        todo, seen = [node], {node}
        for current in todo:
            for consumer, place in self.consumers[current]:
                stops = (
                    is_product(consumer)
                    or consumer in self.linears
                    or chooses(consumer)
                    or self.is_stream(consumer)
                )
                if stops:
                    yield consumer, place
                elif consumer not in seen:
                    seen.add(consumer)
                    todo.append(consumer)


def _edge(source: Any) -> Edge | None:
    return None if source[0] is None else (source[0], source[1])


def _nodes(starts: Iterable[Node]) -> Iterator[Node]:
    todo = list(dict.fromkeys(starts))
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                todo.append(source)


def signed(number: int) -> int:
    """A dimension as autograd saves it: negative ones wrap around."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _flipped(node: Node, flips: int | None) -> int | None:
    """Swaps of the last two axes so far; None once axes were mixed otherwise."""
    name = operation(node)
    if flips is None or name == "T":
        return None if flips is None else flips + 1
    if name == "Transpose":
        size = len(shape((node, 0)))
        swap = {signed(getattr(node, f"_saved_dim{i}")) % size for i in (0, 1)}
        return flips + 1 if swap == {size - 1, size - 2} else None
    if name == "Permute":
        dims = [signed(d) % len(node._saved_dims) for d in node._saved_dims]  # type: ignore[attr-defined]
        plain = list(range(len(dims)))
        if dims == plain:
            return flips
        return flips + 1 if dims == [*plain[:-2], plain[-1], plain[-2]] else None
    return flips


def swapped(path: Iterable[Node], dim: int) -> int:
    """Where dimension ``dim`` (counted from the end, negative) of the end of a path was at its
    start.
    """
    for node in path:
        name = operation(node)
        if name == "Transpose":
            size = len(shape((node, 0)))
            a, b = (signed(getattr(node, f"_saved_dim{i}")) % size - size for i in (0, 1))
            dim = {a: b, b: a}.get(dim, dim)
        elif name == "Permute":
            order = [signed(d) for d in node._saved_dims]  # type: ignore[attr-defined]
            size = len(order)
            dim = order[dim] % size - size if -size <= dim else dim
    return dim


def edge_tensor_like(edge: Edge, generator: torch.Generator) -> Tensor:
    """Random numbers of an edge's shape, dtype and device."""
    meta = edge[0]._input_metadata[edge[1]]  # type: ignore[attr-defined]
    numbers = torch.randn(tuple(meta.shape), generator=generator)
    return numbers.to(device=meta.device, dtype=meta.dtype)


def chooses(node: Node) -> bool:
    """Whether an operation chooses among features, as experts are chosen. One that picks along
    another axis puts tokens in another order, or pools them.
    """
    name = operation(node)
    if name in RANKINGS:
        return True
    if name not in PICKS or not hasattr(node, "_saved_dim"):
        return False
    sizes = getattr(node, "_saved_self_sym_sizes", None) or shape((node, 0))
    return signed(node._saved_dim) % len(sizes) == len(sizes) - 1


def mixes_tokens(node: Node) -> bool:
    """Whether an operation that is no product joins positions: a running sum, a sum over another
    axis than the last.
    """
    name = operation(node)
    if name in ("Cumsum", "Cumprod", "Stack", "FftC2C", "Roll", CONVOLUTION):
        return True
    if isinstance(node, BackwardCFunction):
        return sum(source is not None for source, _ in node.next_functions) > 2
    if name not in ("Sum", "Mean"):
        return False
    size = len(node._saved_self_sym_sizes)  # type: ignore[attr-defined]
    dims = getattr(node, "_saved_dim", None) or ()
    return not dims or any(signed(dim) % size != size - 1 for dim in dims)
