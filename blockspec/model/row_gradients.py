"""Which rows of a matrix belong to which part and head, told by gradients.

The idea: number the heads at the attention kernel, send a random vector back from every head, once
as it is and once times the head's number, and stop at the matrices. A row's second gradient is its
first one times the number of its head, and zero if the row belongs to none. One gradient does this
for all layers at once, because nothing passes a matrix; query, key and value take two to three
each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from blockspec.model.factors import PARTS, Attention, Factor
from blockspec.model.graph import (
    PRODUCTS,
    Edge,
    Graph,
    Linear,
    edge_tensor_like,
    operation,
)

PRECISION = 0.05  # of a head's number, read from gradients
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What a parameter was seen to do.

    Args:
        kind: Of the whole of it, or ``qkv`` and the like where it holds several.
        axis: That counts its outputs; None where that is not known.
        parts: Kind -> rows, for a parameter that holds several kinds.
        heads: Kind -> rows of each of its heads, where rows belong to heads.
        tokens: Whether it has a row for each token of the vocabulary.
        crossed: Whether it is of attention to another sequence; None: not known.
    """

    kind: str
    axis: int | None = None
    parts: Mapping[str, Rows] = field(default_factory=dict)
    heads: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)
    tokens: bool = False
    crossed: bool | None = None


@dataclass(eq=False)
class Mlp:
    """Linears that widen, and the one that narrows; ``edges``: what the gate and the rest are seen
    at.
    """

    inputs: list[Linear]
    output: Linear
    edges: dict[str, Edge]
    gate: set[Linear]


@dataclass
class Readings:
    """Gradients, by part: the plain one, and one for each axis that may be the heads'."""

    plain: dict[str, dict[str, Tensor]]
    coded: dict[str, list[dict[str, Tensor]]]
    gates: dict[str, Tensor]  # at the attention's output
    owners: dict[str, set[str]]  # parameter -> parts that it may hold
    sizes: dict[str, torch.Size]

    def seen(self, name: str, kind: str, axis: int | None, tokens: bool, rest: str) -> Seen:
        """What the parameter holds; ``rest``: the kind of the rows that lead to no head."""
        parts: dict[str, Rows] = {}
        heads: dict[str, tuple[Rows, ...]] = {}
        if axis is None or not self.owners.get(name):
            return Seen(kind, axis, tokens=tokens)
        size = self.sizes[name][axis]
        taken: set[int] = set()
        unbent = set(self._of(name, "mlp_in", axis)[0])
        for part in (*PARTS, "attention_gate", "mlp_gate", "mlp_in"):
            rows, numbers = self._of(name, part, axis)
            rows = [row for row in rows if row not in taken]
            if part == "mlp_gate":  # x * gelu'(x) and the like: one matrix on both sides
                rows = [row for row in rows if row not in unbent]
            if not rows:
                continue
            taken.update(rows)
            parts[part] = tuple(rows)
            if numbers and all(row in numbers for row in rows):
                groups: dict[int, list[int]] = defaultdict(list)
                for row in rows:
                    groups[numbers[row]].append(row)
                if len({len(group) for group in groups.values()}) == 1:
                    heads[part] = tuple(tuple(groups[n]) for n in sorted(groups))
        if not parts:
            return Seen(kind, axis, tokens=tokens)
        left = tuple(row for row in range(size) if row not in taken)
        if not left and len(parts) == 1:
            return Seen(next(iter(parts)), axis, heads=heads, tokens=tokens)
        if not set(parts) & set(PARTS):  # an MLP: halves that are sure, or the whole
            if left or len(parts) == 1:
                return Seen(kind, axis, tokens=tokens)
        elif left:
            parts[rest] = tuple(sorted((*parts.get(rest, ()), *left)))
        return Seen(_joint(parts), axis, parts, heads, tokens)

    def _of(self, name: str, part: str, axis: int) -> tuple[list[int], dict[int, int]]:
        """Rows of the part, and the number of the head of each where every row has one."""
        if part not in self.owners[name]:
            return [], {}
        if part == "attention_gate":
            return _rows_of(self.gates.get(name), axis), {}
        source = {"mlp_gate": "query", "mlp_in": "key"}.get(part, part)
        plain = self.plain[source].get(name)
        rows = _rows_of(plain, axis)
        best: dict[int, int] = {}
        coded = [c[name] for c in self.coded[source] if c.get(name) is not None]
        if plain is None:
            return [], {}
        zero = set(rows)
        for gradient in coded:
            zero -= set(_rows_of(gradient, axis))
            numbers = _ratios(plain, gradient, rows, axis)
            if len(numbers) == len(set(rows) - zero) and len(set(numbers.values())) > len(
                set(best.values())
            ):
                best = numbers
        # Gates and MLPs have no heads: their seeds are zero in coded gradients.
        rows = [row for row in rows if (row in zero) == (part in ("mlp_gate", "mlp_in"))]
        return rows, best if part in PARTS else {}


def _joint(parts: Mapping[str, Rows]) -> str:
    """The kind of a tensor that holds several."""
    if {"mlp_in", "mlp_gate"} == set(parts):
        return "mlp_in"
    attention = [part for part in parts if part in (*PARTS, "attention_gate", "qkv")]
    return (
        attention[0] if len(set(attention) - {"attention_gate"}) == 1 and len(parts) == 2 else "qkv"
    )


def _rows_of(gradient: Tensor | None, axis: int) -> list[int]:
    if gradient is None:
        return []
    others = [a for a in range(gradient.ndim) if a != axis]
    norms = gradient.abs().amax(others) if others else gradient.abs()
    return norms.nonzero().flatten().tolist()


def _ratios(plain: Tensor, coded: Tensor, rows: Sequence[int], axis: int) -> dict[int, int]:
    """Row -> number of its head: the whole number that the two gradients differ by."""
    wide = torch.promote_types(plain.dtype, torch.float32)
    a = plain.detach().to(wide).movedim(axis, 0).flatten(1)
    b = coded.detach().to(wide).movedim(axis, 0).flatten(1)
    length = a.square().sum(1)
    ratio = (a * b).sum(1) / length
    rest = (b - ratio[:, None] * a).square().sum(1).sqrt() / length.sqrt()
    number = ratio.round()
    good = (
        ((ratio - number).abs() < PRECISION)
        & (rest < PRECISION * number.clamp(min=1))
        & (number > 0)
    )
    return {row: int(number[row]) - 1 for row in rows if good[row]}


def measure(
    graph: Graph,
    attentions: Sequence[Attention],
    mlps: Sequence[Mlp],
    gated: Mapping[Linear, Sequence[Linear]],
    parameters: Mapping[str, Tensor],
) -> Readings:
    """The gradients that tell which rows belong to which part and head: at most ten, all layers at
    once.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for found in attentions:
        for part in PARTS:
            for linear in found.factors[part].linears:
                _own(owners, linear, part)
    for linears in gated.values():
        for linear in linears:
            _own(owners, linear, "attention_gate")
    for mlp in mlps:
        for linear in mlp.inputs:
            for part in mlp.edges:
                _own(owners, linear, part)
    for names in list(owners):
        if not owners[names] & set(PARTS):
            owners[names].discard("attention_gate")  # a matrix of its own
    wanted = {name: parameters[name] for name, parts in owners.items()}
    generator = torch.Generator().manual_seed(0)
    backward = _Backward(graph, wanted)
    rows = Readings({}, {}, {}, owners, {name: p.shape for name, p in parameters.items()})
    with backward.stopped_at_linears():
        for part in PARTS:
            factors = [found.factors[part] for found in attentions]
            seeds = [(f, _chosen(edge_tensor_like(f.edge, generator), f)) for f in factors]
            also = {"query": "mlp_gate", "key": "mlp_in"}.get(part)
            extra = [
                (mlp.edges[also], edge_tensor_like(mlp.edges[also], generator))
                for mlp in mlps
                if also in mlp.edges
            ]
            rows.plain[part] = backward([(f.edge, seed) for f, seed in seeds] + extra)
            rows.coded[part] = [
                backward([(f.edge, _coded(seed, f, i)) for f, seed in seeds if i < len(f.axes)])
                for i in range(max((len(f.axes) for f in factors), default=0))
            ]
        ends = [
            (linear.input, edge_tensor_like(linear.input, generator))
            for linear in gated
            if linear.input is not None
        ]
        rows.gates = backward(ends)
    return rows


def _own(owners: dict[str, set[str]], linear: Linear, part: str) -> None:
    for name in linear.weights:
        owners[name].add(part)


def _chosen(seed: Tensor, factor: Factor) -> Tensor:
    """The seed at the first of equal heads, zero at its repetitions."""
    for axis, numbers in factor.axes:
        first = [number not in numbers[:i] for i, number in enumerate(numbers)]
        seed = seed * _along(torch.tensor(first), seed, axis)
    return seed


def _coded(seed: Tensor, factor: Factor, which: int) -> Tensor:
    axis, numbers = factor.axes[which]
    return seed * _along(torch.tensor(numbers) + 1, seed, axis)


def _along(numbers: Tensor, like: Tensor, axis: int) -> Tensor:
    sizes = [-1 if a == axis else 1 for a in range(like.ndim)]
    return numbers.to(like).view(sizes)


class _Backward:
    """Gradients by the parameters that stop at the linears' inputs."""

    def __init__(self, graph: Graph, wanted: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.wanted = wanted

    @contextmanager
    def stopped_at_linears(self) -> Iterator[None]:
        handles = []
        for linear in self.graph.linears.values():
            place = input_place(linear)
            if linear.input is not None:
                handles.append(linear.node.register_hook(_without(place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, seeds: Sequence[tuple[Edge, Tensor]]) -> dict[str, Tensor]:
        if not seeds or not self.wanted:
            return {}
        gradients = torch.autograd.grad(
            [GradientEdge(*edge) for edge, _ in seeds],
            list(self.wanted.values()),
            [seed for _, seed in seeds],
            retain_graph=True,
            allow_unused=True,
        )
        return {n: g for n, g in zip(self.wanted, gradients, strict=True) if g is not None}


def _without(place: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def hook(inputs: Sequence[Tensor | None], outputs: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if i == place else gradient for i, gradient in enumerate(inputs))

    return hook


def input_place(linear: Linear) -> int:
    places = PRODUCTS[operation(linear.node)]
    return next(
        (p for p in places if linear.input and linear.node.next_functions[p][0] is linear.input[0]),
        places[0],
    )
