"""Results as HTML, for notebooks: a sentence and a table, names escaped."""

from __future__ import annotations

from html import escape

import pandas as pd

ROWS = 60  # that are shown: the first and the last half of a longer table
UNKNOWN = "not known"


def html(sentence: str, table: pd.DataFrame) -> str:
    """What a notebook shows."""
    written = table.astype(object).map(_text)
    return f"<p>{escape(sentence)}</p>{written.to_html(max_rows=ROWS)}"


def _text(value: object) -> str:
    if value is None or value is pd.NA or value != value:
        return UNKNOWN
    return f"{value:.3g}" if isinstance(value, float) else str(value)
