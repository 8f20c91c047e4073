"""A run's tables: a step is added whole, and is recognised by the digest that run.json has of its
rows.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blockspec.numerics.content import Digest
from blockspec.spectra.collection import Spectra, spectra_of, write_parquet
from blockspec.spectra.groups import compared
from blockspec.spectra.heterogeneity import DEFINITIONS, js0, js_distance_errors, js_distances
from blockspec.spectra.stages import stage_label, stage_labels

logger = logging.getLogger(__name__)
SPECTRA, HETEROGENEITY = "spectra.parquet", "heterogeneity.parquet"
DATA_ERRORS = ("jensen-shannon", "wasserstein")
"""Distances that are computed again without each group of data; the others take minutes."""
Rows = dict[str, pd.DataFrame]
HASHED = {
    SPECTRA: ("block", "probe", "index", "node", "weight", "residual"),
    HETEROGENEITY: ("block", "other", "distance", "definition", "js0"),
}


def rows_of(
    spectra: Spectra, heterogeneity: pd.DataFrame | None, *, step: int, label: str | None = None
) -> Rows:
    """What a step adds to each table; heterogeneity is None for a single block."""
    rows = {SPECTRA: spectra.to_frame(step=step, label=label)}
    if heterogeneity is not None:
        rows[HETEROGENEITY] = heterogeneity.assign(label=label or stage_label(step))
    return rows


def append_rows(out: Path, rows: Rows, *, recorded: Collection[int] = ()) -> None:
    """Adds a step to the tables.

    Args:
        out: The run's folder.
        rows: From :func:`rows_of`.
        recorded: Steps that spectra.parquet must have already.

    Raises:
        ValueError: spectra.parquet has lost steps since the run was begun.
    """
    for name, table in rows.items():
        _join(table, out / name, recorded if name == SPECTRA else ())


def digests_of(rows: Rows) -> dict[str, str]:
    """By file, what is recorded of the rows of a step."""
    return {name: rows_digest(table, name) for name, table in rows.items()}


def holds(out: Path, step: int, digests: Mapping[str, str]) -> bool:
    """Whether the tables have a step as it was recorded; where they do not, what they have of it is
    removed.
    """
    tables = {name: _read(out / name) for name in (SPECTRA, HETEROGENEITY)}
    kept = {name: table for name, table in tables.items() if table is not None}
    rows = {name: table[table["step"] == step] for name, table in kept.items()}
    if all(name in rows and rows_digest(rows[name], name) == d for name, d in digests.items()):
        return True
    for name, table in kept.items():
        if len(others := table[table["step"] != step]):
            write_parquet(others, out / name)
        else:
            (out / name).unlink()
    return False


def check_tables(out: Path, stages: Sequence[dict[str, Any]]) -> tuple[list[int], bool]:
    """Compares the tables with the record of the complete stages, and mends what can be mended
    without a model.

    Args:
        out: The run's folder.
        stages: Entries of run.json.

    Returns:
        Steps that the record has and spectra.parquet lacks: they have to be measured again; and
        whether heterogeneity.parquet was mended, and with it the digests in ``stages``.

    Raises:
        ValueError: A table is damaged, or holds steps that are not this run's.
    """
    digests = {stage["step"]: stage["tables"] for stage in stages}
    tables = {name: _read(out / name) for name in (SPECTRA, HETEROGENEITY)}
    lost, without = (_compare(table, out / name, digests) for name, table in tables.items())
    mended = [step for step in without if step not in lost]
    for step in mended:
        table = tables[SPECTRA]
        assert table is not None
        part = table[table["step"] == step]
        rows = heterogeneity_of(spectra_of(part), step=step)
        assert rows is not None
        rows["label"] = stage_labels(part).get(step, stage_label(step))
        _join(rows, out / HETEROGENEITY)
        digests[step][HETEROGENEITY] = rows_digest(rows, HETEROGENEITY)
    return lost, bool(mended)


def _compare(
    table: pd.DataFrame | None,
    path: Path,
    digests: Mapping[int, Mapping[str, str]],
) -> list[int]:
    """Recorded steps that a table lacks."""
    there = [] if table is None else table["step"].unique().tolist()
    if foreign := sorted(set(there) - set(digests)):
        raise ValueError(
            f"{path} holds steps that this run has not measured ({foreign[:5]}): it is another "
            "run's table; "
            "move it away, and the steps that are missing then are measured again"
        )
    lost = []
    for step, recorded in digests.items():
        if path.name not in recorded:
            continue
        if table is None or step not in there:
            lost.append(step)
        elif rows_digest(table[table["step"] == step], path.name) != recorded[path.name]:
            raise ValueError(
                f"the rows of step {step} in {path} are not those that run.json has recorded: the "
                "file was changed, or is "
                "another run's; move it away, and its steps are measured again"
            )
    if lost:
        logger.warning(
            f"{path} lacks the steps {lost} that run.json has: they are made again",
        )
    return lost


def rows_digest(rows: pd.DataFrame, file: str) -> str:
    """Of one step's rows in a table."""
    digest = Digest()
    for name in HASHED[file]:
        values = rows[name]
        digest.add(name)
        if values.dtype.kind in "iuf":
            digest.add(np.ascontiguousarray(values.to_numpy()))
        else:
            digest.add("\n".join(values.astype(str)))
    return digest.text()


def heterogeneity_of(spectra: Spectra, *, step: int) -> pd.DataFrame | None:
    """A step's part of heterogeneity.parquet; None for a single block.

    Of many blocks, groups of them are compared, which their names say; see
    :mod:`blockspec.spectra.groups`.
    """
    parts = compared(spectra.parts)
    if len(parts) < 2:
        return None
    tables = [heterogeneity_table(parts, definition, step=step) for definition in DEFINITIONS]
    return pd.concat(tables, ignore_index=True)


def heterogeneity_table(spectra: Spectra, definition: str, *, step: int) -> pd.DataFrame:
    """Distances of all pairs of blocks as a tidy table, with their mean and its standard errors in
    every row.
    """
    quick = definition in DATA_ERRORS
    mean = js0(spectra, definition, data_errors=quick)
    distances = _melted(js_distances(spectra, definition), "distance")
    errors = js_distance_errors(spectra, definition) if quick else None
    if errors is None:
        distances["distance_data_stderr"] = np.nan
    else:
        distances = distances.merge(_melted(errors, "distance_data_stderr"), on=["block", "other"])
    return distances.assign(
        step=step,
        definition=definition,
        js0=mean.value,
        js0_stderr=mean.stderr,
        js0_data_stderr=mean.data_stderr,
    )


def _melted(table: pd.DataFrame, name: str) -> pd.DataFrame:
    rows = table.rename_axis("block").reset_index()
    return rows.melt("block", var_name="other", value_name=name)


def _join(rows: pd.DataFrame, path: Path, recorded: Collection[int] = ()) -> None:
    """Adds a step to a table on disk, in place of what is there of it."""
    before = _read(path)
    there = set() if before is None else set(before["step"].unique().tolist())
    if missing := sorted(set(recorded) - there - set(rows["step"])):
        raise ValueError(
            f"{path} has lost the steps {missing} while the run was under way: was the folder "
            "deleted or moved? "
            "The same command measures them again"
        )
    table = rows
    if before is not None:
        table = pd.concat(
            [before[~before["step"].isin(rows["step"].unique())], rows], ignore_index=True
        )
    write_parquet(table, path)


def _read(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and the same command makes it again"
        ) from error
