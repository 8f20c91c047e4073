"""Tables in a terminal of any width: numbers are whole, names fold, and columns that find no room
come in a second table below.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BORDERS = 2  # characters between columns
LEAST = 16  # characters that a name is folded to at most


def print_frame(console: Console, frame: pd.DataFrame, title: str, written: str = "{}") -> None:
    """Prints a table whose cells are text or numbers, in as many parts as the width asks for.

    Args:
        console: Where to.
        frame: The index is the first column, and stands in every part.
        title: A line above it.
        written: How a cell is written, for cells that are no text.
    """
    cells = frame.map(lambda cell: cell if isinstance(cell, str) else written.format(cell))
    console.print()
    console.print(title, highlight=False, markup=False, style="italic", soft_wrap=True)
    for part in _parts(cells, console.width):
        console.print(_table(part, console.width))


def _parts(cells: pd.DataFrame, room: int) -> Iterator[pd.DataFrame]:
    widths = [_width(str(name), cells[name]) for name in cells.columns]
    left = room - min(_index_width(cells), max(LEAST, room // 3)) - BORDERS
    chosen: list[int] = []
    used = 0
    for place, width in enumerate(widths):
        if chosen and used + width + BORDERS > left:
            yield cells.iloc[:, chosen]
            chosen, used = [], 0
        chosen.append(place)
        used += width + BORDERS
    yield cells.iloc[:, chosen]


def _width(name: str, cells: pd.Series) -> int:
    return max(len(name), *(len(cell) for cell in cells), 0)


def _index_width(cells: pd.DataFrame) -> int:
    return _width(str(cells.index.name or ""), pd.Series([str(name) for name in cells.index]))


def _table(cells: pd.DataFrame, room: int) -> Table:
    """Names fold to what the numbers leave them."""
    taken = sum(_width(str(name), cells[name]) + BORDERS for name in cells.columns)
    names = max(min(_index_width(cells), room - BORDERS - taken), 1)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(
        escape(str(cells.index.name or "")), overflow="fold", min_width=names, max_width=names
    )
    for name in cells.columns:
        table.add_column(escape(str(name)), justify="right", no_wrap=True)
    for index, row in cells.iterrows():
        table.add_row(escape(str(index)), *map(escape, row))
    return table
