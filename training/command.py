"""A function as a command: typed settings, a YAML file and overrides; errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

USER_ERRORS = (ValueError, OSError, FloatingPointError)


def run_command(function: Callable[..., Any], arguments: Sequence[str] | None = None) -> Any:
    """Calls the function with settings from the command line; exits with 1 and one line on an error
    of the user's.
    """
    parser = ArgumentParser(description=(function.__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--config", action="config", help="YAML file with settings; later arguments override it"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_function_arguments(
        function, as_positional=True
    )  # arguments without a default have no --
    settings = parser.parse_args(arguments)
    called = parser.instantiate_classes(settings).as_dict()
    debug = called.pop("debug")
    called.pop("config")
    try:
        return function(**called)
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
