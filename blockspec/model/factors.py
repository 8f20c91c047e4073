"""Attention in the graph of a forward pass: which activations are query, key and value.

The idea: where attention is computed, two activations are multiplied, go through a softmax, and
multiply a third one. Those three are query, key and value, whatever the model calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from blockspec.model.graph import (
    PRODUCTS,
    RESHAPES,
    SOFTMAXES,
    Edge,
    Graph,
    Linear,
    operation,
    shape,
    signed,
    swapped,
)

PARTS = ("query", "key", "value")
SAVED = {"Bmm": ("self", "mat2"), "Baddbmm": ("batch1", "batch2"), "Mm": ("self", "mat2")}
MOST_AXES = 2  # of a factor that are tried as the heads' axis: heads and windows


@dataclass(eq=False)
class Factor:
    """Query, key or value at the kernel: the edge, and its leading axes with the number of the head
    at each place.
    """

    edge: Edge
    axes: list[tuple[int, list[int]]]
    linears: list[Linear]


@dataclass(eq=False)
class Attention:
    factors: dict[str, Factor]
    scores: Node  # the product of query and key
    output: Node  # the product with the value
    beside: list[Node]  # all products before the softmax: with positions, with other tokens


def attention(graph: Graph, softmax: Node) -> Attention | None:
    """The attention around a softmax; None if it is another softmax."""
    if operation(softmax) not in SOFTMAXES:
        return None
    output = next((step for step in graph.ahead(softmax) if step[0] not in graph.linears), None)
    if output is None or operation(output[0]) not in SAVED:
        return None
    factors = graph.factors(output[0])
    assert factors is not None
    right = output[0].next_functions[PRODUCTS[operation(output[0])][1]][0]
    value = factors[0] if _leads_to(right, softmax) else factors[1]
    scores = _scores(graph, softmax, value)
    if scores is None or value is None:
        return None
    product, turned, products = scores
    sides = graph.factors(product)
    assert sides is not None
    query, key = (sides[1], sides[0]) if turned else sides
    if query is None or key is None:
        return None
    edges = {"query": (product, query), "key": (product, key), "value": (output[0], value)}
    return Attention(
        {part: _factor(graph, part, node, edge) for part, (node, edge) in edges.items()},
        product,
        output[0],
        products,
    )


def _leads_to(node: Node | None, target: Node) -> bool:
    """Whether the way back from a factor meets the softmax before anything else is multiplied."""
    todo = [node] if node is not None else []
    for current in todo:
        if current is target:
            return True
        if operation(current) not in PRODUCTS and len(todo) < 200:
            todo += [s for s, _ in current.next_functions if s is not None and s not in todo]
    return False


def _scores(
    graph: Graph, softmax: Node, value: Edge | None
) -> tuple[Node, bool, list[Node]] | None:
    """The product of query and key before a softmax, whether the key is on its left, and all
    products there.
    """
    paths: dict[Node, list[Node]] = {softmax: [softmax]}
    todo = [softmax]
    found: list[Node] = []
    for node in todo:
        for source, _ in node.next_functions:
            if source is None or source in paths or graph.is_stream(source):
                continue
            paths[source] = [*paths[node], source]
            if source in graph.linears or operation(source) in SOFTMAXES:
                continue
            if operation(source) in SAVED:
                found.append(source)
            else:
                todo.append(source)
    inputs = {l.input[0] for l in graph.behind(value).linears if l.input}

    def fits(product: Node) -> tuple[bool, bool]:
        """Two matrices behind it, the key's reading what the value's reads: not a product with
        positions.
        """
        sides = [graph.behind(edge).linears for edge in graph.factors(product) or ()]
        keys = {l.input[0] for side in sides[1:] for l in side if l.input}
        return (not all(sides), not (keys & inputs))

    if not found:
        return None
    product = min(found, key=fits)
    dim = signed(softmax._saved_dim)  # type: ignore[attr-defined]
    dim = dim if dim < 0 else dim - len(shape((softmax, 0)))
    return product, swapped(paths[product], dim) == -2, found


def _factor(graph: Graph, part: str, product: Node, edge: Edge) -> Factor:
    """The factor before it was folded into (B H, T, d), and its axes that may count heads."""
    folded = shape(edge)
    side = [source for source, _ in product.next_functions].index(edge[0])
    side -= len(product.next_functions) - 2
    at, lead = _unfolded(edge, folded)
    sizes = shape(at)
    values = getattr(product, f"_saved_{SAVED[operation(product)][side]}")
    same = values is not None and values.numel() == math.prod(sizes)
    values = values.detach().reshape(sizes) if same else None
    axes = [axis for axis in range(lead) if sizes[axis] > 1]
    if not axes and part != "value":  # one key for all heads: they stand beside the positions
        axes = [axis for axis in _beside(sizes, lead, side, folded) if sizes[axis] > 1]
    return Factor(
        at,
        [(axis, _numbers(values, axis, sizes[axis])) for axis in axes[:MOST_AXES] or [0]],
        list(graph.behind(edge).linears),
    )


def _unfolded(edge: Edge, folded: tuple[int, ...]) -> tuple[Edge, int]:
    """The edge before the first axes were made one, and how many they were."""
    current = edge
    while operation(current[0]) in RESHAPES and len(folded) == 3:
        source, number = current[0].next_functions[0]
        if source is None:
            break
        current = (source, number)
        sizes = shape(current)
        fits = [n for n in range(len(sizes)) if math.prod(sizes[:n]) == folded[0]]
        if len(sizes) > len(folded) and fits:
            whole = [n for n in fits if math.prod(sizes[n:]) == math.prod(folded[1:])]
            if whole:
                return current, whole[-1] if math.prod(folded[:1]) > 1 else whole[0]
    return edge, len(folded) - 2


def _beside(sizes: tuple[int, ...], lead: int, side: int, folded: tuple[int, ...]) -> range:
    """The axes that are neither leading nor summed over: the summed one is last on the left, first
    on the right.
    """
    rest = range(lead, len(sizes))
    if side == 0:
        return range(lead, next((m for m in rest if math.prod(sizes[m:]) == folded[-1]), lead))
    summed = (m for m in rest if math.prod(sizes[lead : m + 1]) == folded[-2])
    return range(next(summed, len(sizes)) + 1, len(sizes))


def _numbers(values: Tensor | None, axis: int, size: int) -> list[int]:
    """The head at each place along an axis: equal ones are one head, repeated for a group of
    queries.
    """
    if values is None or not values.any():
        return list(range(size))
    heads: list[Tensor] = []
    numbers = []
    for slice_ in values.unbind(axis):
        same = next((i for i, head in enumerate(heads) if torch.equal(head, slice_)), len(heads))
        if same == len(heads):
            heads.append(slice_)
        numbers.append(same)
    return numbers
