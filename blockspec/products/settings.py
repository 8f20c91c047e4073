"""Settings classes as keyword arguments: one definition serves a function, the command line and a
run's record.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Any, TypeVar

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
