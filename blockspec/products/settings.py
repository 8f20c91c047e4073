"""Settings classes as keyword arguments: one definition serves a function, the command line and a
run's record.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Any, TypeVar

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective

R = TypeVar("R")


def takes(
    *, positional: Sequence[str] = (), **kinds: type
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Lets a function take the fields of settings classes as arguments of its own.

    ``@takes(settings=EstimateSettings)`` over ``def f(objective, *, settings)`` gives
    ``f(objective, num_probes=4, ...)``: the fields stand in the signature with their types and
    defaults, and the line ``[settings]`` of the docstring becomes their explanations. A new setting
    is one field and its use.

    Args:
        positional: Fields that may also be given by place, after the function's own positional
            parameters.
        kinds: Name of a parameter -> the dataclass that it is.
    """
    home = {field.name: name for name, kind in kinds.items() for field in fields(kind)}

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        signature = _signature(function, kinds, positional)
        called = function.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> R:
            _check_names(called, named, signature)
            given = signature.bind(*arguments, **named).arguments
            for name, value in given.items():
                given[name] = _of_its_type(name, value, str(signature.parameters[name].annotation))
            parts: dict[str, dict[str, Any]] = {name: {} for name in kinds}
            for name in [name for name in given if name in home]:
                parts[home[name]][name] = given.pop(name)
            made = {name: kinds[name](**values) for name, values in parts.items()}
            return function(**given, **made)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "", kinds.values())
        return call

    return decorate


def _signature(
    function: Callable[..., Any], kinds: dict[str, type], positional: Sequence[str]
) -> inspect.Signature:
    own = inspect.signature(function)
    parameters = [p for name, p in own.parameters.items() if name not in kinds]
    for kind in kinds.values():
        parameters += [_parameter(field, field.name in positional) for field in fields(kind)]
    order = {name: place for place, name in enumerate(positional)}
    parameters.sort(key=lambda p: (p.kind, order.get(p.name, -1)))  # stable: own ones come first
    return own.replace(parameters=parameters)


def _parameter(field: Field[Any], positional: bool) -> inspect.Parameter:
    kinds = inspect.Parameter
    default = field.default if field.default is not MISSING else kinds.empty
    if field.default_factory is not MISSING:
        default = field.default_factory()
    kind = kinds.POSITIONAL_OR_KEYWORD if positional else kinds.KEYWORD_ONLY
    return kinds(field.name, kind, default=default, annotation=field.type)


def _check_names(function: str, named: dict[str, Any], signature: inspect.Signature) -> None:
    for name in named:
        if name not in signature.parameters:
            near = difflib.get_close_matches(name, signature.parameters, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() takes no argument {name!r}{hint}")


def _of_its_type(name: str, value: Any, annotation: str) -> Any:
    """The argument; TypeError where another kind of thing was passed, which would fail somewhere
    inside.
    """
    if name == "objective" and not isinstance(value, Objective | None):
        raise TypeError(
            f"objective is a blockspec.Objective, got an object of type {type(value).__name__}: "
            "blockspec.Objective(model, batches, loss) makes one"
        )
    if name in ("block", "other") and not isinstance(value, Block | None):
        raise TypeError(
            f"{name} is one Block, got an object of type {type(value).__name__}: "
            "blockspec.partition gives a tuple of them; take one of it, blocks[0]"
        )
    if name == "blocks":
        _check_blocks(value)
    if annotation in ("int", "int | None") and value is not None:
        try:
            return operator.index(value)
        except TypeError:
            raise TypeError(f"{name} is a whole number, got {value!r}") from None
    return value


def _check_blocks(value: Any) -> None:
    held = [value] if isinstance(value, str) else value if isinstance(value, (tuple, list)) else []
    wrong = next((item for item in held if not isinstance(item, Block)), None)
    if wrong is not None:
        raise TypeError(
            f"blocks are what blockspec.partition gives, got {wrong!r}: partition(model, "
            "include=...) gives those of some names, with * for any part of a name"
        )


def _documented(text: str, kinds: Any) -> str:
    lines = [line for kind in kinds for line in arguments_of(kind)]
    return re.sub(
        r"^( *)\[settings\]$", lambda m: "\n".join(m[1] + x for x in lines), text, flags=re.M
    )


def arguments_of(kind: type) -> list[str]:
    """The lines under ``Args:`` in the docstring of a settings class and of the settings classes
    that it extends.
    """
    lines: list[str] = []
    for cls in reversed(kind.__mro__):
        text = inspect.cleandoc(vars(cls).get("__doc__") or "")
        if "\nArgs:\n" in text:
            body = text.split("\nArgs:\n", 1)[1].split("\n\n", 1)[0]
            lines += [line.removeprefix("    ") for line in body.splitlines()]
    return lines
