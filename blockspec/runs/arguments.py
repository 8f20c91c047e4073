"""The words of a command line before they are parsed: lists, and names that do not exist."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Sequence

LISTS = frozenset(
    {"--checkpoints", "--blocks.include", "--blocks.exclude", "--include", "--exclude"}
)
"""Options that take several values: a flag given again adds to them, and so do values that follow
each other, as a shell leaves them of a glob without quotes.
"""

OPEN = ("--model_args.", "--blocks.by.", "--blocks.names.", "--by.", "--names.")
"""Beginnings of options whose names are a user's own."""


def gathered(arguments: Sequence[str], *, greedy: bool = True) -> list[str]:
    """The arguments with all values of a list behind its flag's first place, as one JSON list.

    Args:
        arguments: As the shell gives them.
        greedy: Take all values that follow a flag; else only one, for a command with arguments
            that have no flag.
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in LISTS:
            rest.append(word)
            continue
        if flag not in found:
            found[flag] = []
            rest += [flag, flag]  # the second is where the list goes
        values = [value] if equals else []
        while words and not words[0].startswith("--") and (greedy or not values):
            values.append(words.pop(0))
        found[flag] += [item for text in values for item in _items(text)]
    return _filled(rest, found)


def _filled(rest: Sequence[str], found: dict[str, list[str]]) -> list[str]:
    filled: list[str] = []
    for word in rest:
        if word in found and filled and filled[-1] == word:
            filled[-1:] = [word, json.dumps(found[word])] if found[word] else [word]
        else:
            filled.append(word)
    return filled


def _items(text: str) -> list[str]:
    """A list in brackets is several values: ``["a", "b"]``."""
    if text.startswith("["):
        try:
            return [str(item) for item in json.loads(text)]
        except ValueError:  # a pattern such as [qk]_proj
            return [text]
    return [text]


def check_flags(arguments: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError for an option that does not exist, with the nearest that do."""
    for word in arguments:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag.removesuffix("+") in known or flag.startswith(OPEN):
            continue
        near = difflib.get_close_matches(flag, sorted(known), n=1, cutoff=0.6)
        raise ValueError(f"there is no option {flag}{_meant(near)} --help lists them")


def check_command(word: str, known: Collection[str]) -> None:
    """Raises ValueError for a command that does not exist, with the nearest that does."""
    if word not in known:
        near = difflib.get_close_matches(word, sorted(known), n=1)
        raise ValueError(
            f"there is no command {word!r}{_meant(near)} The commands are {', '.join(known)}"
        )


def _meant(near: Sequence[str]) -> str:
    return f": did you mean {near[0]}?" if near else "."
