"""Products a layer at a time: exact, in memory that does not grow with the graph of the model.

The idea. Cut the forward pass at the layers (:mod:`blockspec.products.boundaries`) and keep only
the tensors between them, h, and the loss's cotangents by them, c. A layer y = f(x, p) is then a
function of its own, and so is each piece of the graph around the layers. Its part of the gradient
is c_x = J_x' c_y and c_p = J_p' c_y, where J are the derivatives of f. A product with a direction v
is the derivative of that whole computation along v:

    up      u_y = J_x u_x + J_p v                  how h moves
            s_x = <derivative of c_x and c_p along x, (u_x, v)>, with c_y held fixed
    down    m_x = s_x + J_x' m_y                   how c moves
            the product by the parameters in the same way

Both u_y and s come from one backward pass through the graph of (c_x, c_p) that was made with c_y as
a leaf: the derivative of <c_x, u_x> + <c_p, v> by c_y is u_y, and by x it is s_x. So on the way up
each layer is built again once with its gradient, on the way down once more without it, and its
graph is dropped behind it. What stays is one s for each tensor between layers. A Gauss-Newton
product is the same with s = 0: up to the outputs, times the curvature of the loss, and down.

Many directions go up and down together (:data:`TOGETHER`), so that a layer which was built again
serves all that pass through it. How often that happens depends on the number of directions and not
on the number of blocks beside each other. The last layers are not cut, see
:mod:`blockspec.products.top`: their graph is a part of the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from blockspec.model.differentiability import leaves_of
from blockspec.numerics.progress import moved
from blockspec.products.boundaries import Boundaries, Call, check_same
from blockspec.products.linearisations import (
    Ask,
    End,
    Linear,
    Part,
    Tensors,
    derivative,
    edges,
    grad,
)

TOGETHER = 32  # directions; layers that are built again for 16 were seen to take 1/8 of the time
LEAST_TOGETHER = 4
BETWEEN = 2**28  # bytes of all their tensors between layers; fewer go together where there are more
Key = int | str
"""Number of a wire, or name of a parameter."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """A part of the forward pass: one call of a layer, or what lies around the layers before it.

    Args:
        inputs: Numbers of wires.
        outputs: Numbers of wires; those of a call in the order of its outputs.
        parameters: Names of those in it that products are made for.
        call: None: the graph is that around the layers.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: frozenset[str]
    call: Call | None = None


@dataclass(eq=False)
class Travel:
    """A direction on its way.

    Attributes:
        first: Number of the first stretch that holds parameters of the direction; lowest: of the
            first one that holds targets.
        tangents: u, by wire.
        cotangents: m, by wire.
    """

    number: int
    ask: Ask
    first: int
    lowest: int
    tangents: dict[int, Tensor] = field(default_factory=dict)
    cotangents: dict[int, Tensor] = field(default_factory=dict)

    def meet(self, found: Mapping[Key, Tensor]) -> dict[str, Tensor]:
        """Adds cotangents of wires to those that are known; returns what belongs to parameters."""
        for key, tensor in found.items():
            if isinstance(key, int):
                known = self.cotangents.get(key)
                self.cotangents[key] = tensor if known is None else known + tensor
        return {key: tensor for key, tensor in found.items() if isinstance(key, str)}


class Layerwise:
    """Products of one micro-batch, a layer at a time.

    Args:
        boundaries: Of the pass that was cut.
        end: Where that pass ended.
        parameters: That products are made for, as the model has them.
        like: Tensors like what the model computes with in their place.
        rebuilt: Called whenever a layer is built again.
        agreed: Of the bytes of all wires, what they are on the process that has most; processes
            that gather layers from each other have to build them again equally often.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        end: End,
        parameters: Tensors,
        like: Tensors,
        rebuilt: Callable[[], None] = lambda: None,
        agreed: Callable[[list[int]], list[int]] = lambda sizes: sizes,
    ) -> None:
        self.terms = end.terms
        self._rebuilt = rebuilt
        self._parameters, self._like = parameters, like
        self._boundaries = boundaries
        self._sizes = agreed([wire.nbytes for wire in boundaries.wires])
        self._curved = end.middle is None
        self._names = {id(p): name for name, p in parameters.items()}
        self._outer = {name: boundaries.stand_in(p) for name, p in parameters.items()}
        self._stretches = [*self._around_and_within(), self._around([end.outputs], ())]
        self._begun, self._share = 0.0, 1.0  # of a sweep, before a group and within it
        self._between = self._bytes_between()
        self._last_use = {
            wire: number for number, s in enumerate(self._stretches) for wire in s.inputs
        }
        last = self._stretches[-1]
        self._end = Linear(end, self._start(last), last.inputs if self._curved else ())
        self._cotangents = self._gradient_by_wires() if self._curved else {}

    def _around_and_within(self) -> Iterator[Stretch]:
        """The stretches up to the last layer, in their order."""
        known: set[int] = set()
        for call in self._boundaries.calls:
            fresh = [w for w in call.inputs if w not in known and self._boundaries.made[w] is None]
            known.update(fresh)
            if fresh:
                yield self._around([self._boundaries.wires[w] for w in fresh], tuple(fresh))
            held = frozenset(
                self._names[id(p)] for p in call.module.parameters() if id(p) in self._names
            )
            yield Stretch(call.inputs, tuple(call.outputs.values()), held, call)

    def _around(self, tensors: Sequence[Tensor], outputs: tuple[int, ...]) -> Stretch:
        """The graph around the layers, from its leaves to some tensors."""
        places = {id(t): w for w, t in enumerate(self._boundaries.wires)}
        leaves = [id(leaf) for leaf in leaves_of(tensors)]
        inputs = tuple(
            places[leaf]
            for leaf in leaves
            if leaf in places and self._boundaries.made[places[leaf]] is not None
        )
        names = {id(p): name for name, p in self._outer.items()}
        held = frozenset(names[leaf] for leaf in leaves if leaf in names)
        return Stretch(inputs, outputs, held)

    def _start(self, stretch: Stretch) -> dict[Key, Tensor]:
        """What the graph of a stretch around the layers starts from."""
        return {w: self._boundaries.wires[w] for w in stretch.inputs} | {
            name: self._outer[name] for name in sorted(stretch.parameters)
        }

    def _opened(self, stretch: Stretch) -> tuple[list[Tensor], dict[Key, Tensor]]:
        """The outputs with their graph, and what it starts from; a layer is built again."""
        if stretch.call is None:
            return [self._boundaries.wires[w] for w in stretch.outputs], self._start(stretch)
        self._rebuilt()
        leaves: dict[int, Tensor] = {w: self._boundaries.leaf(w) for w in stretch.inputs}
        results = stretch.call.again(leaves)
        check_same(self._boundaries, stretch.call, results)
        start: dict[Key, Tensor] = dict(leaves.items())
        start |= {
            name: self._boundaries.stand_in(self._parameters[name])
            for name in sorted(stretch.parameters)
        }
        return [results[place] for place in stretch.call.outputs], start

    def _gradient_by_wires(self) -> dict[int, Tensor]:
        """c: the loss's gradient by every wire above the lowest stretch with parameters."""
        holding = [number for number, s in enumerate(self._stretches) if s.parameters]
        lowest = min(holding, default=len(self._stretches))
        found = dict(self._end.values)
        for stretch in reversed(self._stretches[lowest + 1 : -1]):
            if stretch.inputs and any(w in found for w in stretch.outputs):
                for wire, part in self._gradient_below(stretch, found, stretch.inputs).items():
                    found[wire] = found[wire] + part if wire in found else part
        return found

    def _gradient_below(
        self, stretch: Stretch, found: Mapping[int, Tensor], wanted: Sequence[Key]
    ) -> dict[Any, Tensor]:
        """The part of the gradient by inputs or parameters of a stretch that goes through it."""
        outputs, start = self._opened(stretch)
        kept = [(o, found[w]) for o, w in zip(outputs, stretch.outputs, strict=True) if w in found]
        return grad(
            [o for o, _ in kept],
            {key: start[key] for key in wanted},
            grad_outputs=[c for _, c in kept],
            retain_graph=stretch.call is None,
        )

    def gradient(self) -> Iterator[Mapping[str, Tensor]]:
        """The parts of the loss's gradient by parameter, a stretch after the other."""
        yield self._end.gradient(sorted(self._stretches[-1].parameters))
        for stretch in reversed(self._stretches[:-1]):
            if stretch.parameters:
                yield self._gradient_below(stretch, self._cotangents, sorted(stretch.parameters))

    def products(self, asks: Sequence[Ask]) -> Iterator[Part]:
        """The parts of all products; those of one request come on its way up and on its way
        down.
        """
        travels = sorted(map(self._travel, range(len(asks)), asks), key=lambda t: t.first)
        while travels:
            size = self._together(travels)
            self._begun, self._share = 1 - len(travels) / len(asks), size / len(asks)
            group, travels = travels[:size], travels[size:]
            yield from self._up(group)
            yield from self._at_the_end(group)
            yield from self._down(group)
            for travel in group:
                yield Part(travel.number, {}, True)

    def _together(self, travels: Sequence[Travel]) -> int:
        """How many of the directions go together: in as few groups as there is room for, each of as
        many.
        """
        sizes = accumulate(self._between[travel.first] for travel in travels[:TOGETHER])
        most = max(sum(size <= BETWEEN for size in sizes), LEAST_TOGETHER)
        groups = -(-len(travels) // most)
        return -(-len(travels) // groups)

    def _bytes_between(self) -> list[int]:
        """By number of the stretch where a direction begins, bytes of its cotangents by wires."""
        sizes = [sum(self._sizes[w] for w in stretch.outputs) for stretch in self._stretches]
        return [*reversed(list(accumulate(reversed(sizes)))), 0]

    def _travel(self, number: int, ask: Ask) -> Travel:
        return Travel(number, ask, self._first(ask.block.parameters), self._first(ask.targets))

    def _first(self, names: Sequence[str]) -> int:
        """Number of the first stretch that holds one of the parameters; beyond the last if none."""
        holding = (n for n, s in enumerate(self._stretches) if not s.parameters.isdisjoint(names))
        return next(holding, len(self._stretches))

    def _up(self, group: Sequence[Travel]) -> Iterator[Part]:
        for number, stretch in enumerate(self._stretches[:-1]):
            active = [t for t in group if self._moves(t, stretch)]
            self._tell(number, number)
            if active:
                yield from self._raised(number, stretch, active)

    def _tell(self, number: int, steps: int) -> None:
        """A group has come to a stretch, after so many on its way up and down."""
        share = self._begun + self._share * steps / (2 * len(self._stretches))
        layers, top = self._boundaries.calls, self._boundaries.top
        if (call := self._stretches[number].call) is not None:
            moved(share, f"layer {layers.index(call) + 1} of {len(layers) + top.held}")

    def _moves(self, travel: Travel, stretch: Stretch) -> bool:
        return any(
            w in travel.tangents for w in stretch.inputs
        ) or not stretch.parameters.isdisjoint(travel.ask.block.parameters)

    def _raised(self, number: int, stretch: Stretch, active: Sequence[Travel]) -> Iterator[Part]:
        """Takes directions through one stretch on their way up."""
        outputs, start = self._opened(stretch)
        duals: dict[Key, Tensor] = {
            _dual(wire): self._cotangent(output, wire)
            for output, wire in zip(outputs, stretch.outputs, strict=True)
        }
        own = {n for t in active for n in t.ask.block.parameters} & stretch.parameters
        keys: list[Key] = [*stretch.inputs, *sorted(own)]
        sources = {key: start[key] for key in keys}
        gradients = edges(
            grad(outputs, sources, grad_outputs=list(duals.values()), create_graph=True)
        )
        del outputs
        for travel in active:
            direction = self._moved(travel, number, stretch)
            wanted = self._wanted(travel, number, stretch, start) if self._curved else {}
            wanted |= duals
            found = derivative(gradients, direction, wanted)
            del direction
            travel.tangents |= {
                wire: found.pop(_dual(wire)) for wire in stretch.outputs if _dual(wire) in found
            }
            if part := travel.meet(found):
                yield Part(travel.number, part, False)

    def _cotangent(self, output: Tensor, wire: int) -> Tensor:
        """A leaf with the cotangent of a wire; zeros where there is none."""
        known = self._cotangents.get(wire)
        return (torch.zeros_like(output) if known is None else known).detach().requires_grad_()

    def _moved(self, travel: Travel, number: int, stretch: Stretch) -> dict[Key, Tensor]:
        """What of a direction enters a stretch; tangents that nothing needs any more are let go."""
        moved: dict[Key, Tensor] = {}
        for wire in stretch.inputs:
            if wire in travel.tangents:
                over = self._last_use[wire] == number
                moved[wire] = travel.tangents.pop(wire) if over else travel.tangents[wire]
        if not stretch.parameters.isdisjoint(travel.ask.block.parameters):
            moved.update(travel.ask.direction(self._like, stretch.parameters))
        return moved

    def _wanted(
        self, travel: Travel, number: int, stretch: Stretch, start: Mapping[Key, Tensor]
    ) -> dict[Key, Tensor]:
        """What a product is wanted by in a stretch: its targets, and the wires that lead to others
        below.
        """
        keys: list[Key] = [name for name in travel.ask.targets if name in stretch.parameters]
        if travel.lowest < number:
            keys += stretch.inputs
        return {key: start[key] for key in keys}

    def _at_the_end(self, group: Sequence[Travel]) -> Iterator[Part]:
        number, stretch = len(self._stretches) - 1, self._stretches[-1]
        start = self._start(stretch)
        for travel in group:
            direction = self._moved(travel, number, stretch)
            wanted = self._wanted(travel, number, stretch, start)
            if part := travel.meet(self._end.product(direction, list(wanted))):
                yield Part(travel.number, part, False)

    def _down(self, group: Sequence[Travel]) -> Iterator[Part]:
        for number in reversed(range(len(self._stretches) - 1)):
            stretch = self._stretches[number]
            active = [
                t
                for t in group
                if t.lowest <= number and any(w in t.cotangents for w in stretch.outputs)
            ]
            self._tell(number, 2 * len(self._stretches) - number)
            if active:
                yield from self._lowered(number, stretch, active)

    def _lowered(self, number: int, stretch: Stretch, active: Sequence[Travel]) -> Iterator[Part]:
        """Takes directions through one stretch on their way down."""
        outputs, start = self._opened(stretch)
        for travel in active:
            pairs = [
                (output, travel.cotangents.pop(wire))
                for output, wire in zip(outputs, stretch.outputs, strict=True)
                if wire in travel.cotangents
            ]
            found = grad(
                [output for output, _ in pairs],
                self._wanted(travel, number, stretch, start),
                grad_outputs=[cotangent for _, cotangent in pairs],
                retain_graph=True,
            )
            if part := travel.meet(found):
                yield Part(travel.number, part, False)


def _dual(wire: int) -> int:
    """The key of the cotangent that an output's part of the gradient was made with."""
    return -1 - wire
