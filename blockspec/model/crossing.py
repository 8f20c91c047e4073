"""Whether attention looks at another sequence: cross-attention, told by where its inputs come from.

The idea: query and key of self-attention are made from one stream of activations, whatever norms,
pools or low-rank matrices lie between. Those of cross-attention come from two. So the walk goes
back from both to the nearest streams (``x + f(x)``), or to where the model begins, and compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.autograd.graph import Node

from blockspec.model.factors import Attention
from blockspec.model.graph import Graph, Linear, shape

MOST = 5_000  # nodes of a walk: beyond that it is not known
DATA = "data"  # what the model was given, and nothing is differentiated by
Origins = frozenset[Node | str]


class Crossing:
    """Tells cross-attention in a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._origins: dict[Linear, Origins | None] = {}

    def of(self, attention: Attention) -> bool | None:
        """Whether the keys of an attention are made from something else than its queries; None
        where that is not known: there is no matrix, or a part of the source is shared.
        """
        query = attention.factors["query"].linears
        other = self._scored(attention, query) or attention.factors["value"].linears
        here, there = self._of_all(query), self._of_all(other)
        if not here or not there:
            return None
        if len(there) > 1:
            there -= {DATA}  # of positions
        if here == there == {DATA}:  # one tensor or two: their lengths may tell
            return True if _tokens(query) != _tokens(other) else None
        if here == there:
            return False
        return None if here & there else True

    def _scored(self, attention: Attention, query: Iterable[Linear]) -> list[Linear]:
        """The matrices that queries are multiplied with: of keys, also of those of other tokens
        beside.
        """
        edges = [e for product in attention.beside for e in self.graph.factors(product) or ()]
        found = [linear for edge in edges for linear in self.graph.behind(edge).linears]
        keys = attention.factors["key"].linears
        return [x for x in dict.fromkeys([*keys, *found]) if x in keys or x not in query]

    def _of_all(self, linears: Iterable[Linear]) -> Origins | None:
        found: set[Node | str] = set()
        for linear in linears:
            if linear not in self._origins:
                self._origins[linear] = self._of(linear)
            origins = self._origins[linear]
            if origins is None:
                return None
            found |= origins
        return frozenset(found)

    def _of(self, linear: Linear) -> Origins | None:
        """The nearest streams behind a matrix's input, and what begins there."""
        if linear.input is None:
            return frozenset({DATA})
        found: set[Node | str] = set()
        todo = [linear.input[0]]
        seen = set(todo)
        for node in todo:  # grows as it is read
            if self.graph.is_stream(node):
                found.add(node)
                continue
            sources = self._activations(node)
            if not sources:
                found.add(node)
            new = [source for source in sources if source not in seen]
            seen.update(new)
            todo += new
            if len(seen) > MOST:
                return None
        return frozenset(found)

    def _activations(self, node: Node) -> list[Node]:
        """What a node is made of, without parameters."""
        if node in self.graph.linears:
            edge = self.graph.linears[node].input
            return [] if edge is None else [edge[0]]
        edges = [(source, number) for source, number in node.next_functions if source is not None]
        return [edge[0] for edge in edges if not self.graph.leaves(edge)]


def _tokens(linears: Iterable[Linear]) -> set[int]:
    """Numbers of rows that matrices multiply."""
    return {math.prod(shape((linear.node, 0))[:-1]) for linear in linears}
