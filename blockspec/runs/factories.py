"""Where a model, its data and its loss come from: ``module:function``, or a Hugging Face name or
folder.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

Factory = Callable[..., tuple[nn.Module, Any, Any]]


def find_factory(name: str) -> Factory:
    """The factory of that name; anything without a colon is a Hugging Face name or folder.

    Raises:
        ValueError: The module or the function does not exist; the message says what was found.
    """
    if ":" not in name:
        from blockspec.runs.hugging_face import hugging_face

        return _checked(partial(hugging_face, name), name)
    module_name, function_name = name.split(":", 1)
    module = _module(module_name, name)
    factory = getattr(module, function_name, None)
    if not callable(factory):
        functions = [
            n
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module_name and n[0] != "_"
        ]
        raise ValueError(
            f"module {module_name!r} has no factory {function_name!r}; it has {functions}"
        )
    return _checked(factory, name)


def _module(module_name: str, name: str) -> Any:
    if module_name.endswith(".py") or "/" in module_name:
        path = Path(module_name)
        dotted = ".".join(path.with_suffix("").parts)
        raise ValueError(
            f"{name!r} names a file; a factory is module:function, without .py and with dots for "
            f"slashes: {dotted}:{name.split(':', 1)[1]}"
        )
    if (
        str(Path.cwd()) not in sys.path
    ):  # a console script does not look in the working folder, where users' factories are
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        there = [path.stem for path in Path.cwd().glob("*.py")]
        near = difflib.get_close_matches(module_name, there, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no module {module_name!r} for the factory {name!r} ({error}); {hint}Run from the "
            "folder it is in"
        ) from error


BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _checked(factory: Callable[..., Any], name: str) -> Factory:
    """The factory, whose arguments and result are looked at before anything else is done."""

    def made(**arguments: Any) -> tuple[nn.Module, Any, Any]:
        _check_arguments(factory, name, arguments)
        try:
            found = factory(**arguments)
        except Exception as error:
            if "checkpoint" in arguments:  # of many, most often: which one does not load
                error.add_note(f"from the factory {name!r} with {arguments['checkpoint']!r}")
            raise
        return _three(found, name)

    made.__wrapped__ = factory  # type: ignore[attr-defined]
    return made


def _check_arguments(factory: Callable[..., Any], name: str, given: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
    for argument in given:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            told = "; checkpoints= needs that argument" if argument == "checkpoint" else ""
            raise ValueError(
                f"the factory {name!r} takes no argument {argument!r}, it takes {known}{hint}{told}"
            )
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in BY_NAME]
    if missing := [argument for argument in needed if argument not in given]:
        raise ValueError(
            f"the factory {name!r} needs the argument {missing[0]!r}: give it as "
            f"--model_args.{missing[0]}, or a default value in the factory"
        )


def _three(found: Any, name: str) -> tuple[nn.Module, Any, Any]:
    if isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], nn.Module):
        return found
    parts = found if isinstance(found, tuple) else (found,)
    kinds = ", ".join(type(part).__name__ for part in parts)
    raise ValueError(
        f"the factory {name!r} returned ({kinds}); a factory returns (model, batches, loss): a "
        "torch.nn.Module, a list of batches, and one of blockspec.losses or a function "
        "loss(model, batch) -> (sum of the loss terms, number of terms)"
    )


def explained(factory: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """Name, default and explanation of what ``--model_args.NAME`` may set of a factory."""
    found = inspect.getdoc(factory) or ""
    listed = found.split("Args:\n", 1)[-1].split("\n\n", 1)[0]
    told = dict(re.findall(r"^ {4}(\w+): (.*?)(?=\n {4}\w|\Z)", listed, re.DOTALL | re.MULTILINE))
    rows = []
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "checkpoint":
            text = " ".join(told.get(parameter.name, "").split())
            missing = parameter.default is parameter.empty
            default = "needed" if missing else str(parameter.default)
            rows.append((parameter.name, "left out" if default == "None" else default, text))
    return rows
