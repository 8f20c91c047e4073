"""The settings of ``blockspec plot``."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pandas as pd

from blockspec.figures.page import PageSettings
from blockspec.spectra.collection import kept


@dataclass(frozen=True)
class PlotSettings(PageSettings):
    """Which blocks of a run are drawn, and how.

    Args:
        include: Draw the blocks whose names match one of these patterns, such as *attn*weight*. If
            left out, every block is drawn.
        exclude: Leave out the blocks whose names match one of these patterns. If left out, none is.
    """

    include: list[str] | str | None = None
    exclude: list[str] | str | None = None

    @property
    def page(self) -> PageSettings:
        return PageSettings(**{f.name: getattr(self, f.name) for f in fields(PageSettings)})

    @property
    def every_block(self) -> bool:
        return self.include is None and self.exclude is None

    def holds(self, block: str) -> bool:
        """Whether the block of this name is drawn."""
        return kept(block, self.include, self.exclude)

    def chosen(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a run's table that are of these blocks, and of no pair with another one."""
        names = table["block"].unique()
        here = {name for name in names if self.holds(name)}
        if not here:
            raise ValueError(
                f"no block matches include={self.include} and exclude={self.exclude}; the run has "
                f"{len(names)} blocks, such as {', '.join(names[:3])}"
            )
        rows = table["block"].isin(here)
        if "other" in table:
            rows &= table["other"].isin(here)
        return table[rows]
