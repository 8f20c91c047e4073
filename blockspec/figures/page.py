"""What figures are drawn for: the width of a paper's column, its font size, a scale of the axis.

The settings hold for every figure that is drawn within ``with drawn_for(...)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

COLUMN, GUTTER = 3.35, 0.25  # inches: a column of a paper, and what is between two
FONT_SIZE = 8.0  # points, of figures without settings


@dataclass(frozen=True)
class PageSettings:
    """How figures are drawn.

    Args:
        columns: Width of every figure in columns of a paper, of 3.35 inches each; 1 or 2. If left
            out, each figure has the width that suits it.
        font_size: Size of the largest text in points, 5 to 14; the smallest is somewhat smaller.
        axis: Scale of the eigenvalues in densities: symlog is linear around zero and logarithmic
            beyond; log has the positive side alone. Tail counts are always logarithmic.
    """

    columns: int | None = None
    font_size: float = FONT_SIZE
    axis: Literal["symlog", "linear", "log"] = "symlog"

    def __post_init__(self) -> None:
        if self.columns not in (None, 1, 2):
            raise ValueError(f"columns is 1 or 2, or left out, got {self.columns}")
        if not 5 <= self.font_size <= 14:
            raise ValueError(f"font_size is between 5 and 14 points, got {self.font_size}")


_page: ContextVar[PageSettings] = ContextVar("page", default=PageSettings())  # noqa: B039 (frozen)


@contextmanager
def drawn_for(settings: PageSettings) -> Iterator[None]:
    """Figures that are drawn, or saved, within have these settings."""
    token = _page.set(settings)
    try:
        yield
    finally:
        _page.reset(token)


def page() -> PageSettings:
    """The settings that hold now."""
    return _page.get()


def inches(columns: float) -> float:
    """Width of so many columns of a paper."""
    return columns * COLUMN + (columns - 1) * GUTTER


def width_of(natural: float) -> float:
    """Width of a figure in inches: that of the columns, or the one that suits it."""
    columns = page().columns
    return natural if columns is None else inches(columns)


def points(size: float) -> float:
    """What is so large with the usual font size, with that of the page."""
    return size * page().font_size / FONT_SIZE
