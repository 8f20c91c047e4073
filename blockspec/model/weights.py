"""Weights that stay where they are, while a layer at a time is computed with elsewhere.

A model may lie on the CPU, or in files that are mapped into memory, in a type of half the width,
and be computed with on another device and in another type. While the model is at work, what lies
around its layers is brought over once. A layer is brought over for each of its calls: its
parameters and buffers are swapped for copies, and put back when the call returns. The copies live
as long as a graph holds them, so that a product a layer at a time never has the whole model beside
itself.

The same holds for a model that FSDP2 has spread over processes (``fully_shard``): a layer is
gathered from all of them for each of its calls, in the type of its parameters, whatever FSDP's
policy of mixed precision says. FSDP's own hooks, which would gather it too and wait for a backward
pass that never comes, are taken off meanwhile. All processes have to call the layers equally often:
see :meth:`Weights.in_step`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blockspec.model.containers import layer_modules
from blockspec.model.gathering import whole
from blockspec.model.layer_by_layer import layer_by_layer
from blockspec.model.patching import patched
from blockspec.numerics import memory
from blockspec.numerics.ranks import gathered

T = TypeVar("T")


class Weights:
    """The weights of a model, and what stands in for them while it computes.

    Args:
        model: Its own parameters are left alone.
        device: Where it computes; None: where its first parameter is, and nothing is brought.
        dtype: In which floating point type it computes; None: that of each parameter.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        reshard(model)
        self.sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
        self.brought = device is not None or dtype is not None
        self.elsewhere = self.sharded or self.brought
        self.device = device or next(model.parameters()).device
        self.dtype = dtype
        self._model = model
        self._at_work = False
        self._around: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}

    def refuse_gradients(self) -> None:
        """Raises ValueError where the graph holds copies: a gradient by the weights themselves
        would be all zeros.
        """
        if self.elsewhere:
            raise ValueError(
                "there is no gradient of a model whose weights stay elsewhere (device=, dtype=, "
                "fully_shard): it computes with copies; leave these out, or measure a full "
                "checkpoint"
            )

    def in_step(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Each item, and whether it counts. Processes that gather layers from each other all make
        equally many passes: those that have fewer items repeat their last one.

        Raises:
            ValueError: A process has no item to repeat.
        """
        if not self.sharded:
            yield from ((item, True) for item in items)
            return
        last: list[T] = []
        rest = iter(items)
        while any(gathered(bool(found := list(islice(rest, 1))))):
            last = found or last
            if not last:
                raise ValueError("a process has no batch at all: give each at least one")
            yield last[0], bool(found)

    def everywhere(self, true: bool) -> bool:
        """Whether it is true on all processes that gather layers from each other."""
        return all(gathered(true)) if self.sharded else true

    def largest(self, numbers: list[int]) -> list[int]:
        """Each number as it is on the process where it is largest, of those that gather layers from
        each other.
        """
        found = gathered(numbers) if self.sharded else [numbers]
        return [max(each) for each in zip(*found, strict=True)]

    @contextmanager
    def let_go(self) -> Iterator[None]:
        """While this is open, what was brought for a layer goes when the next one is called: for
        passes whose value alone is wanted.
        """
        with layer_by_layer(self._model) if self.elsewhere else nullcontext():
            yield

    def stand_in(self, parameter: Tensor) -> Tensor:
        """What the latest call of the part of the model that a parameter belongs to computed with;
        the parameter itself where nothing is brought.
        """
        return self._last.get(id(parameter), parameter)

    def shape_of(self, parameter: Tensor) -> Tensor:
        """A tensor like what is brought for a parameter, that takes no memory."""
        if not self.elsewhere:
            return parameter
        dtype = self._type(parameter)
        return torch.zeros(1, dtype=dtype, device=self.device).expand(parameter.shape)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While this is open, the model computes with what is brought; once, however often it is
        opened within itself.
        """
        if not self.elsewhere or self._at_work:
            yield
            return
        layers = layer_modules(self._model)
        within = {id(m) for layer in layers.values() for m in layer.modules()}
        around = [m for m in self._model.modules() if id(m) not in within]
        changes = [
            (layer, "forward", partial(self._called, layer, layer.forward))
            for layer in layers.values()
        ]
        reshard(self._model)
        self._at_work = True
        try:
            with patched(_without_fsdp(self._model)), self._brought(around), patched(changes):
                self._around = dict(self._last)
                yield
        finally:
            self._around, self._last, self._at_work = {}, {}, False

    def _called(self, layer: nn.Module, original: Any, *arguments: Any, **named: Any) -> Any:
        """Stands in the place of the ``forward`` of a layer."""
        self._last = dict(self._around)  # what another layer was given goes before more comes
        with self._brought(layer.modules()):
            return original(*arguments, **named)

    @contextmanager
    def _brought(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Swaps parameters and buffers of modules; a tensor that several have, once."""
        swapped: list[tuple[Any, str, Tensor]] = []
        try:
            for module in modules:
                held: list[Any] = [module._parameters, module._buffers]
                swapped += [
                    (tensors, name, tensor)
                    for tensors in held
                    for name, tensor in tensors.items()
                    if tensor is not None
                ]
            copies = self._copies({id(tensor): tensor for _, _, tensor in swapped})
            for tensors, name, tensor in swapped:
                tensors[name] = copies[id(tensor)]
            self._last = {**self._around, **copies}
            yield
        finally:
            for tensors, name, tensor in swapped:
                tensors[name] = tensor
                _let_go(tensor)

    def _copies(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What stands in for tensors, by their identities."""
        fresh = {key: tensor for key, tensor in tensors.items() if key not in self._around}
        gathered_ones = whole(list(fresh.values()))
        made = {
            key: self._copy(tensor, full)
            for (key, tensor), full in zip(fresh.items(), gathered_ones, strict=True)
        }
        return {
            key: made.get(key, self._around.get(key, tensor)) for key, tensor in tensors.items()
        }

    def _copy(self, tensor: Tensor, full: Tensor) -> Tensor:
        copy = full.detach().to(self.device, self._type(tensor))
        if not isinstance(tensor, nn.Parameter):
            return copy
        return nn.Parameter(copy, requires_grad=tensor.requires_grad)

    def _type(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype


def _let_go(tensor: Tensor) -> None:
    """What was read of a file that is mapped into memory would count as in use from then on."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not hasattr(tensor, "to_local"):
        memory.let_go(tensor.data_ptr(), tensor.nbytes)


def reshard(model: nn.Module) -> None:
    """Lets go of what FSDP2 has gathered for a pass and keeps until a backward pass
    (``reshard_after_forward=False``, an evaluation in the middle of training): it may be rounded to
    another type, and belongs to no optimizer. FSDP gathers it again when it is needed.
    """
    for module in model.modules():
        if callable(again := getattr(module, "reshard", None)) and _is_spread(module):
            again()


def _is_spread(module: nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_forward")  # FSDPModule, without its slow import


def _without_fsdp(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[int, Any]]]:
    """The hooks of modules that FSDP2 has spread, without its own."""
    for module in model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, name)
            kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_fsdp(hook))
            if len(kept) < len(hooks):
                yield module, name, kept


def _is_fsdp(hook: Any) -> bool:
    """Of one module; of several that are one group, it has a function around it."""
    while hook is not None and type(getattr(hook, "__self__", None)).__name__ != "FSDPState":
        hook = getattr(hook, "__wrapped__", None)
    return hook is not None


def map_weights(model: nn.Module, folder: str | Path) -> nn.Module:
    """Gives a model the weights in the safetensors files of a folder, without reading them: each
    parameter is a part of a file that is mapped into memory.

    Args:
        model: Made without memory for its parameters, as by
            ``accelerate.init_empty_weights(include_buffers=False)``.
        folder: Of the files; the names in them are those of the model's parameters.

    Raises:
        ValueError: There are no such files, or a parameter is in none of them.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not found:
        raise ValueError(f"weights on disk are read from safetensors files; {folder} has none")
    unknown = model.load_state_dict(found, strict=False, assign=True).unexpected_keys
    if tie := getattr(model, "tie_weights", None):
        tie()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(
            f"the files in {folder} have no {missing[0]!r} ({len(missing)} parameters are missing; "
            f"names that the model does not know: {unknown[:3]}): load the model as usual, without "
            "weights on disk"
        )
    return model
