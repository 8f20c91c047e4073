"""How near a dense matrix is to block diagonal: the share of its squared norm off the blocks, and
pictures.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from paper.exhibit import Finding, with_error

# share of the squared norm off the blocks, below which a matrix is called near block diagonal here
NEAR = 0.25


def off_blocks(matrix: np.ndarray, block: np.ndarray) -> float:
    """The share of the squared Frobenius norm that is off the diagonal blocks.

    matrix: (P, P). block: (P,) which block a row is in.
    """
    squares = matrix**2
    return float(squares[block[:, None] != block].sum() / squares.sum())


def shares(matrix: np.ndarray, block: np.ndarray) -> dict[str, float]:
    """That of a matrix, and that of a matrix without structure: of ones."""
    return {
        "off_blocks": off_blocks(matrix, block),
        "entries_off_blocks": off_blocks(np.ones_like(matrix), block),
    }


def tidy(matrix: np.ndarray) -> pd.DataFrame:
    """A row an entry."""
    rows, columns = np.indices(matrix.shape)
    return pd.DataFrame({"row": rows.ravel(), "column": columns.ravel(), "value": matrix.ravel()})


def square(entries: pd.DataFrame) -> np.ndarray:
    """The matrix of :func:`tidy`."""
    return entries.pivot(index="row", columns="column", values="value").to_numpy()


def finding(claim: str, found: pd.DataFrame, more: str = "") -> Finding:
    """found: ``shares`` of each training."""
    percent, entries = 100 * found["off_blocks"], 100 * found["entries_off_blocks"].iloc[0]
    mean, error = float(percent.mean()), float(percent.sem())
    undecided = abs(mean - 100 * NEAR) < 2 * error
    return Finding(
        claim,
        f"{with_error(mean, error)} % of the squared norm is off the blocks (mean and standard "
        f"error of {len(found)} trainings), "
        f"where {entries:.0f} % of the entries are{more}",
        "not comparable" if undecided else "agrees" if mean < 100 * NEAR else "disagrees",
        ("undecided: within two standard errors of the limit; " if undecided else "")
        + f"near is our word for less than {100 * NEAR:.0f} % of the squared norm; the paper shows "
        "pictures",
    )
