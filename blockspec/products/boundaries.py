"""A forward pass, cut where one layer ends and the next begins.

A model is a chain of calls of its layers, and what lies around them: embeddings, the head, the
loss, and whatever a model does between two layers. One pass is made in which every layer computes
with detached inputs, and gives detached outputs to what comes behind it. Two kinds of graphs
remain. The graph around the layers is held whole, but for its holes; it is small. The graphs of
the layers are dropped at once, because each can be built again from the inputs of its call.

What goes from the graph around the layers into a layer, or out of one, is a *wire*: hidden
states, and whatever layers share (position embeddings, a relative bias, the states of an encoder,
the values of the first layer), by place or by name, alone or within tuples and mappings. A tensor
that several layers take is one wire. Nothing is assumed about an architecture but this: whatever a
layer takes from others comes to it as an argument. That is checked: in the graph of a layer nothing
may be found but its own inputs and parameters, and nothing of its inside may be found in the graph
around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from blockspec.model.differentiability import leaves_of
from blockspec.model.patching import patched
from blockspec.numerics.progress import moved
from blockspec.products.top import Top

SAME = 1e-3  # of the largest entry; what a layer gives twice may differ by the order of its sums


class NoCutError(ValueError):
    """The graph cannot be cut at the layers; the message says why."""


@dataclass(frozen=True)
class Wire:
    """The place of a wire's number among the arguments of a call."""

    number: int


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    Args:
        path: Of the layer.
        module: The layer.
        arguments: Flattened; wires in the place of tensors with a graph.
        form: What the arguments were flattened from.
        inputs: Numbers of the wires among the arguments, each once.
        outputs: Place among the flattened outputs -> number of the wire.
        context: Opens the autocast that the call was made in.
    """

    path: str
    module: nn.Module
    arguments: Sequence[Any]
    form: TreeSpec
    inputs: tuple[int, ...]
    outputs: Mapping[int, int]
    context: Callable[[], AbstractContextManager[Any]]

    def again(self, leaves: Mapping[int, Tensor]) -> list[Any]:
        """The flattened outputs, with a graph from ``leaves`` (by wire) and the parameters on."""
        # Views, because counters of users that follow modules (FlopCounterMode) refuse leaves
        given = {number: leaf.view_as(leaf) for number, leaf in leaves.items()}
        flat = [given[a.number] if isinstance(a, Wire) else a for a in self.arguments]
        arguments, named = tree_unflatten(flat, self.form)
        with self.context():
            return tree_flatten(self.module.forward(*arguments, **named))[0]


@dataclass(eq=False)
class Boundaries:
    """What is kept of a forward pass that was cut.

    Attributes:
        stand_in: What a part of the model computed with last in the place of a parameter.
        top: The layers that are not cut.
        calls: Of the layers, in their order.
        wires: The tensors of the graph around the layers: leaves where they come out of a layer.
        made: For each wire the number of the call that it comes out of; None: it comes from
            elsewhere.
        inside: Identities of the leaves that stood in for inputs within layers -> path of the
            layer.
    """

    stand_in: Callable[[Tensor], Tensor] = lambda parameter: parameter
    top: Top = field(default_factory=Top)
    calls: list[Call] = field(default_factory=list)
    wires: list[Tensor] = field(default_factory=list)
    made: list[int | None] = field(default_factory=list)
    inside: dict[int, str] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _held: list[Tensor] = field(default_factory=list)
    _busy: bool = False

    def wire(self, tensor: Tensor, made: int | None) -> int:
        """The number of a tensor of the graph around the layers."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.wires)
            self.wires.append(tensor)
            self.made.append(made)
        return self._numbers[id(tensor)]

    def leaf(self, number: int) -> Tensor:
        """A new leaf with the values of a wire."""
        return self.wires[number].detach().requires_grad_()

    def check_end(self, outputs: Tensor) -> None:
        """Raises NoCutError where nothing was cut, or the end takes something out of a layer."""
        if not self.calls and not self.top.held:
            raise NoCutError("none of its layers was called with gradients enabled")
        around = [w for w, made in zip(self.wires, self.made, strict=True) if made is None]
        for leaf in leaves_of([outputs, *around]):  # what leads to a later layer counts as well
            if path := self.inside.get(id(leaf)):
                raise NoCutError(
                    f"the loss, or a part of the model outside of the layers, takes a tensor from "
                    f"the inside of layer {path!r}"
                )
        self.inside.clear()
        self._held.clear()

    def called(
        self, path: str, module: nn.Module, twice: bool, original: Any, *args: Any, **named: Any
    ) -> Any:
        """Stands in the place of the ``forward`` of a layer."""
        if self._busy or not torch.is_grad_enabled() or self.top.holds_next():
            return original(*args, **named)
        moved(0.0, f"layer {len(self.calls) + 1}, forward pass")
        self._busy = True
        try:
            return self._cut(path, module, twice, original, *tree_flatten((args, named)))
        finally:
            self._busy = False

    def _cut(
        self, path: str, module: nn.Module, twice: bool, original: Any, flat: list[Any], form: Any
    ) -> Any:
        places = [
            Wire(self.wire(a, None)) if isinstance(a, Tensor) and a.requires_grad else a
            for a in flat
        ]
        inputs = tuple(dict.fromkeys(a.number for a in places if isinstance(a, Wire)))
        leaves = self._leaves(path, inputs)
        given = [leaves[a.number] if isinstance(a, Wire) else a for a in places]
        arguments, named = tree_unflatten(given, form)
        try:
            with self.top.measured(module):
                results, shape = tree_flatten(original(*arguments, **named))
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
            raise NoCutError(f"layer {path!r} changes its input in place") from None
        graphs = {i: r for i, r in enumerate(results) if isinstance(r, Tensor) and r.requires_grad}
        self._check(path, module, graphs.values(), leaves.values())
        passed = {id(leaf): self.wires[number] for number, leaf in leaves.items()}
        number, outputs = len(self.calls), {}
        for place, result in graphs.items():
            if id(result) not in passed:
                passed[id(result)] = result.detach().requires_grad_()
            results[place] = passed[id(result)]
            wire = self.wire(results[place], number)
            if wire not in inputs:
                outputs[place] = wire
        call = Call(path, module, places, form, inputs, outputs, _context(flat))
        if twice:
            self._check_again(call, original)
        if outputs:
            self.calls.append(call)
        return tree_unflatten(results, shape)

    def _leaves(self, path: str, inputs: Sequence[int]) -> dict[int, Tensor]:
        """What stands in for wires within a layer during the pass."""
        leaves = {number: self.leaf(number) for number in inputs}
        self.inside |= {id(leaf): path for leaf in leaves.values()}
        self._held += leaves.values()  # an identity is one as long as its object lives
        return leaves

    def _check(self, path: str, module: nn.Module, outputs: Any, leaves: Any) -> None:
        """Raises NoCutError where the graph of a layer has other leaves than its inputs and its
        parameters.
        """
        own = {id(self.stand_in(p)) for p in module.parameters()} | {id(leaf) for leaf in leaves}
        foreign = [id(leaf) for leaf in leaves_of(outputs) if id(leaf) not in own]
        if foreign:
            sources = [self.inside[leaf] for leaf in foreign if leaf in self.inside]
            where = f"the inside of layer {sources[0]!r}" if sources else "outside of it"
            raise NoCutError(
                f"layer {path!r} takes a tensor from {where} that is not one of its arguments"
            )

    def _check_again(self, call: Call, original: Any) -> None:
        """Raises NoCutError for a layer that gives something else when it is called again."""
        leaves = self._leaves(call.path, call.inputs)
        flat = [leaves[a.number] if isinstance(a, Wire) else a for a in call.arguments]
        arguments, named = tree_unflatten(flat, call.form)
        again = tree_flatten(original(*arguments, **named))[0]
        check_same(self, call, again)


def check_same(boundaries: Boundaries, call: Call, outputs: Sequence[Any]) -> None:
    """Raises NoCutError where a layer's outputs are not those of the pass that was cut."""
    for place, wire in call.outputs.items():
        before, now = boundaries.wires[wire].detach(), outputs[place].detach()
        same = before.shape == now.shape and bool(
            (before - now).abs().max() <= SAME * before.abs().max() if before.numel() else True
        )
        if not same and not before.isnan().any():
            raise NoCutError(
                f"layer {call.path!r} gave something else when it was called again with the same "
                "arguments"
            )


def cut(
    layers: Mapping[str, nn.Module],
    run: Callable[[], Any],
    *,
    twice: bool,
    stand_in: Callable[[Tensor], Tensor],
    top: Top,
) -> tuple[Boundaries, Any]:
    """One pass, cut at the layers.

    Args:
        layers: Path -> module.
        run: Makes the pass, with gradients enabled.
        twice: Call every layer a second time, and compare.
        stand_in: See :class:`Boundaries`.
        top: The same.

    Raises:
        NoCutError: The graph goes around the layers; the message says where.
    """
    boundaries = Boundaries(stand_in, top)
    changes = [
        (module, "forward", partial(boundaries.called, path, module, twice, module.forward))
        for path, module in layers.items()
    ]
    top.begin()
    try:
        with patched(changes):
            end = run()
            top.end()
            return boundaries, end
    except RuntimeError as error:
        if "leaf Variable" not in str(error):
            raise
        raise NoCutError("the output of a layer is changed in place") from None


def _context(arguments: Sequence[Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Opens the autocast that is open now, on the device of the arguments."""
    device = next((a.device.type for a in arguments if isinstance(a, Tensor)), "cpu")
    return partial(
        torch.autocast,
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
    )
