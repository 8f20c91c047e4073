"""A copy of a model in float64, for checks that want the numbers and not the speed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})


def twin_of(model: nn.Module, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """A copy of the model in eval mode, its floating point numbers in ``dtype`` (None: as they
    are).

    Hooks are copied too, also those of parameters, which ``copy.deepcopy`` leaves out: they may
    change gradients. So are functions that stand in a module and hold a part of the model, such as
    a ``forward`` that somebody has put around the module's own.
    """
    modules = list(model.modules())
    memo: dict[int, Any] = {
        id(value): value.detach()
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf  # such as the weight of a weight norm
    }
    functions = _functions(modules)
    memo |= {id(function): _without_content(function) for function in functions}
    twin = copy.deepcopy(model, memo)
    for function in functions:
        _fill(memo[id(function)], function, memo)
    if dtype is not None:
        twin.to(dtype)
    for own, others in zip(model.parameters(), twin.parameters(), strict=True):
        for hook in (own._backward_hooks or {}).values():
            others.register_hook(hook)
    return twin.eval()


def _functions(modules: list[nn.Module]) -> list[FunctionType]:
    """Those that stand in modules, and those that they hold."""
    found: dict[int, FunctionType] = {}
    standing: list[Any] = [
        entry
        for module in modules
        for value in vars(module).values()
        for entry in (value.values() if isinstance(value, dict) else [value])
    ]
    while standing:
        value = standing.pop()
        if isinstance(value, partial):
            standing += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, FunctionType) and id(value) not in found:
            found[id(value)] = value
            standing += _held(value)
    return list(found.values())


def _held(function: FunctionType) -> Iterator[Any]:
    """What a function's cells and defaults hold."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _without_content(function: FunctionType) -> FunctionType:
    """A copy with cells of its own, which are empty: what belongs there may not be copied yet."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    empty = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    vars(empty).update(vars(function))
    return empty


def _fill(made: FunctionType, function: FunctionType, memo: dict[int, Any]) -> None:
    """Gives a copied function what the function holds, the copies in the place of the parts of the
    model.
    """

    def own(value: Any) -> Any:
        if isinstance(value, MethodType):
            return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
        return memo.get(id(value), value)

    for cell, before in zip(made.__closure__ or (), function.__closure__ or (), strict=True):
        try:
            cell.cell_contents = own(before.cell_contents)
        except ValueError:  # it is empty
            continue
    made.__defaults__ = function.__defaults__ and tuple(map(own, function.__defaults__))
    named = function.__kwdefaults__
    made.__kwdefaults__ = named and {name: own(value) for name, value in named.items()}


class Doubles(TorchFunctionMode):
    """While this is open, everything that torch computes is in float64, whatever dtype a model
    casts to on the way.

    Llama's norms cast to float32, masks and rotary tables are made in float32: with these digits
    alone, differences of gradients are too coarse to see anything.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in CASTS:
            return args[0].double()
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") or name in ("__set__", "__setitem__")
        given = args[:1] + _wide(args[1:]) if in_place else _wide(args)
        return _wide(function(*given, **_wide(kwargs or {})))


def _wide(value: Any) -> Any:
    """The same nest of tuples, lists and dictionaries with float64 in the place of less; itself
    where nothing changes.
    """
    if isinstance(value, Tensor):
        return value.double() if value.dtype in NARROW else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in NARROW else value
    if isinstance(value, (tuple, list)):
        parts = [_wide(part) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else _rebuilt(value, parts)
    if isinstance(value, dict):
        return {key: _wide(part) for key, part in value.items()}
    return value


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return type(value)(parts)
