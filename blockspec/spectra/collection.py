"""Spectra of many blocks: saved, loaded, selected, mixed, summarised."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blockspec.model.pieces import FULL, Block
from blockspec.numerics.density import spacing
from blockspec.numerics.files import whole_file
from blockspec.numerics.jackknife import jackknife_error
from blockspec.spectra.data import PER_GROUP, Sample, listed, sample_of, told_of_units
from blockspec.spectra.notebook import html
from blockspec.spectra.spectrum import Spectrum, drawing
from blockspec.spectra.stages import stage_label


@dataclass(frozen=True)
class Cost:
    """What an estimate took: shared forward-and-backward passes, and products of one vector, each
    over one batch.

    Args:
        check: What is known of these products: ``passed``, ``off``, or ``unchecked`` with the
            reason; with what to bear in mind.
    """

    gradients: int
    products: int
    check: str = ""


class Spectra(Mapping[str, Spectrum]):
    """Spectra by block name, in the order of the blocks; read-only."""

    def __init__(self, spectra: Iterable[Spectrum], *, cost: Cost | None = None) -> None:
        self._spectra = {spectrum.block.name: spectrum for spectrum in spectra}
        self.cost = cost

    def __getitem__(self, name: str | int) -> Spectrum:
        """By the block's name, or by its place: ``spectra[0]``."""
        if isinstance(name, int):
            return list(self._spectra.values())[name]
        try:
            return self._spectra[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._spectra, n=3, cutoff=0.0)
            raise KeyError(
                f"no spectrum of a block {name!r}; the nearest names are {near}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def __repr__(self) -> str:
        unsure = "" if self.check in ("", "passed") else f" (products {self.check})"
        names = ", ".join(list(self)[:3]) + (", ..." if len(self) > 3 else "")
        return f"Spectra of {len(self)} blocks: {names}{unsure}; {self.data}"

    @property
    def check(self) -> str:
        """What is known of the products behind the spectra, see :class:`Cost`; "" where they were
        loaded from a table.
        """
        return self.cost.check if self.cost else ""

    @property
    def data(self) -> str:
        """Which units of data the data's errors rest on, or why there are none."""
        return told_of_units({spectrum.units for spectrum in self.values()})

    def select(
        self, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
    ) -> Spectra:
        """The spectra whose block names match a glob of ``include`` and none of ``exclude``."""
        return Spectra(s for name, s in self.items() if kept(name, include, exclude))

    def plot(self, **options: Any) -> Any:
        """A figure of the blocks; see :func:`blockspec.figures.tails.tails_by_block`."""
        return drawing("tails").tails_by_block(self.parts or self, **options)

    @property
    def parts(self) -> Spectra:
        """Without the full matrix, which is no block beside the others."""
        return Spectra(s for s in self.values() if s.block.kind != FULL)

    def to_frame(self, *, step: int = 0, label: str | None = None) -> pd.DataFrame:
        """The tidy table that :meth:`save` writes: one row per node of each probe of each block;
        ``step``, and ``label``, what a stage is called whose step is not known, are columns.
        """
        return _frame(list(self.values()), step).assign(label=label or stage_label(step))

    def to_xarray(self) -> Any:
        """Nodes, weights and residuals as a Dataset (blocks, probes, places); nan where a block has
        fewer of them. It needs xarray, which blockspec does not install.
        """
        table = self.to_frame().set_index(["block", "probe", "index"])
        return table[["node", "weight", "residual"]].to_xarray().reindex(block=list(self))

    def _repr_html_(self) -> str:
        table = self.summary().drop(columns="exact")
        layers = table["layer"].map(lambda layer: "" if pd.isna(layer) else f"{layer:.0f}")
        return html(repr(self), table.assign(layer=layers))

    def save(self, path: str | os.PathLike[str], *, step: int = 0) -> None:
        """Writes the table as parquet, whole or not at all."""
        write_parquet(self.to_frame(step=step), path)

    def summary(self) -> pd.DataFrame:
        """A row a block: extreme eigenvalues, trace, and how far to trust them."""
        return pd.DataFrame([_summary(spectrum) for spectrum in self.values()]).set_index("block")


def block_diagonal(spectra: Mapping[str, Spectrum]) -> Spectrum:
    """The mixture of the blocks' spectra by number of parameters: what the full spectrum would be
    if the matrix were block diagonal. Blocks must be disjoint: ``spectra.parts`` leaves the full
    matrix out.

    The probes of different blocks are independent, so the k-th probe of the mixture is made of the
    k-th of each block, and its spread over k is its error. Blocks that were done with different
    numbers of probes are averaged into one row, whose standard error cannot be known.
    """
    parts = list(spectra.values())
    if not parts:
        raise ValueError("no spectra to mix: the mapping is empty")
    if len(parts) > 1 and any(part.block.kind == FULL for part in parts):
        raise ValueError(
            "the full matrix ('model') overlaps the other blocks: mix disjoint ones, spectra.parts"
        )
    total = sum(part.block.numel for part in parts)
    counts = {part.num_probes for part in parts if not part.exact}
    probes = counts.pop() if len(counts) == 1 else 1
    rows = [_rows(part, probes) for part in parts]
    nodes, residuals, known, apart = (
        np.concatenate([row[i] for row in rows], axis=1) for i in (0, 2, 3, 4)
    )
    weights = np.concatenate(
        [r[1] * p.block.numel / total for r, p in zip(rows, parts, strict=True)], axis=1
    )
    order = np.argsort(nodes, axis=1)
    return replace(
        parts[0],
        block=Block(name="block_diagonal", kind="other", layer=None, numel=total),
        nodes=np.take_along_axis(nodes, order, 1),
        weights=np.take_along_axis(weights, order, 1),
        residuals=np.take_along_axis(residuals, order, 1),
        known=np.take_along_axis(known, order, 1),
        apart=np.take_along_axis(apart, order, 1),
        single=np.full(nodes.shape, False),
        steps=np.full(len(nodes), sum(int(part.steps.max()) for part in parts)),
        breakdown=np.full(len(nodes), all(part.breakdown.all() for part in parts)),
        orthogonality=np.full(len(nodes), max(part.orthogonality.max() for part in parts)),
        steps_error=np.full(
            len(nodes), sum(p.steps_error.mean() * p.block.numel for p in parts) / total
        ),
        reorthogonalized=all(part.reorthogonalized for part in parts),
        exact=all(part.exact for part in parts),
        precision_error=sum(part.precision_error * part.block.numel for part in parts) / total,
        units=parts[0].units if len({part.units for part in parts}) == 1 else 0,
        sample=_mixed_samples(parts, probes, order),
    )


def mean_data_stderr(parts: Sequence[Spectrum]) -> float | None:
    """Standard error over the data of the mean eigenvalue of several disjoint blocks; None where it
    is not known of one of them.

    Blocks share the data, so that their errors do not add like those of independent numbers; but
    those of blocks that were done with other numbers of units do.
    """
    total = sum(part.block.numel for part in parts)
    sums: dict[int, np.ndarray] = {}
    for part in parts:
        values = part.means_left_out(lambda nodes: nodes)
        if values is None:
            return None
        changes = (values - part.moment(1).value) * part.block.numel / total
        sums[part.units] = sums.get(part.units, 0.0) + changes
    errors = [jackknife_error(0.0, changes) for changes in sums.values()]
    return None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]


def _mixed_samples(parts: list[Spectrum], probes: int, order: np.ndarray) -> Sample | None:
    """Of the mixture, in the order (K, M) of its nodes; None where the parts do not have the same
    groups of data.
    """
    samples = [part.sample for part in parts]
    if len({part.units for part in parts}) > 1:
        return None
    total = sum(part.block.numel for part in parts)
    nodes, weights = [], []
    for part, sample in zip(parts, samples, strict=True):
        if sample is None:
            return None
        shape = (len(sample), probes, -1)
        if part.exact:
            own, shares = (np.repeat(a[:, :1], probes, 1) for a in (sample.nodes, sample.weights))
        else:
            own, shares = sample.nodes.reshape(shape), sample.weights.reshape(shape)
            shares = shares * probes / part.num_probes
        nodes.append(own)
        weights.append(shares * part.block.numel / total)
    found = (np.concatenate(arrays, 2) for arrays in (nodes, weights))
    return Sample(*(np.take_along_axis(array, order[None], 2) for array in found))


def _rows(part: Spectrum, probes: int) -> tuple[np.ndarray, ...]:
    """Nodes, weights, residuals, known, apart of ``probes`` rows: an exact row repeated, the probes
    themselves, or all in one.
    """
    arrays = (part.nodes, part.weights, part.residuals, part.known, _apart(part))
    if part.exact:
        return tuple(np.tile(array[:1], (probes, 1)) for array in arrays)
    if part.num_probes == probes:
        return arrays
    nodes, weights, *others = (array.reshape(1, -1) for array in arrays)
    return nodes, weights / part.num_probes, *others


def _apart(part: Spectrum) -> np.ndarray:
    return spacing(part.nodes) if part.apart is None else part.apart


def load_spectra(path: str | os.PathLike[str], *, step: int | None = None) -> Spectra:
    """The spectra of a file that :meth:`Spectra.save` wrote, or of a run's folder; ``step`` chooses
    one where it holds several.

    Raises FileNotFoundError, and ValueError for a file that is no table of spectra or a step that
    it does not hold.
    """
    table = read_table(path)
    steps = table["step"].unique().tolist()
    if step is None and len(steps) > 1:
        raise ValueError(f"{path} holds the steps {steps}: choose one with step=")
    if step is not None and step not in steps:
        raise ValueError(f"{path} has no step {step}; it holds {steps}")
    return spectra_of(table if step is None else table[table["step"] == step])


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The tidy table of a spectra file, or of a run's folder."""
    path = Path(path)
    path = path / TABLE if path.is_dir() else path
    if not path.exists():
        where = "there is no such folder" if not path.parent.is_dir() else "the folder holds none"
        raise FileNotFoundError(
            f"no table of spectra at {path}: {where}. A run's folder has {TABLE}, and "
            "Spectra.save writes one"
        )
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a parquet file of spectra ({error})") from error
    for name, value in {
        "precision_error": 0.0,
        "known": False,
        "single": False,
        "units": 0,
    }.items():  # what files, or stages, of earlier versions lack
        if name not in table:
            table[name] = value
        elif table[name].isna().any():
            table[name] = (
                table[name].astype(object).where(table[name].notna(), value).astype(type(value))
            )
    for name in PER_GROUP:
        if name not in table:
            table[name] = None
    if "label" not in table:
        table["label"] = table["step"].map(stage_label)
    if missing := set(COLUMNS) - set(table.columns):
        raise ValueError(
            f"{path} is not a table of spectra: it lacks the columns {sorted(missing)}"
        )
    return table


def spectra_of(table: pd.DataFrame) -> Spectra:
    """The spectra of one step of a tidy table."""
    codes, names = pd.factorize(table["block"])
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    # whole columns once: a table of a block's own rows costs more than its spectrum
    columns = {name: table[name].to_numpy()[order] for name in COLUMNS if name != "layer"}
    layers = table["layer"].astype(object).to_numpy()[order]
    return Spectra(
        _spectrum({name: values[start:stop] for name, values in columns.items()}, layers[start])
        for start, stop in pairwise([0, *ends.tolist()])
    )


TABLE = "spectra.parquet"
"""The table's name in a run's folder."""

PER_BLOCK = (
    "reorthogonalized",
    "exact",
    "curvature",
    "dtype",
    "distribution",
    "seed",
    "precision_error",
    "units",
)
TEXTS = ("curvature", "dtype", "distribution")  # of PER_BLOCK
PER_PROBE = ("steps", "breakdown", "orthogonality", "steps_error")
PER_NODE = {
    "node": "nodes",
    "weight": "weights",
    "residual": "residuals",
    "known": "known",
    "single": "single",
}
COLUMNS = (
    "step",
    "block",
    "kind",
    "layer",
    "numel",
    "probe",
    "index",
    *PER_NODE,
    *PER_PROBE,
    *PER_BLOCK,
    "role",
    *PER_GROUP,
)


def _frame(spectra: Sequence[Spectrum], step: int) -> pd.DataFrame:
    """Column by column for all blocks at once: a table for each would cost milliseconds."""
    blocks = [spectrum.block for spectrum in spectra]
    shapes = [spectrum.nodes.shape for spectrum in spectra]
    rows = np.array([probes * places for probes, places in shapes])

    def per_block(values: Sequence[Any]) -> np.ndarray:
        return np.repeat(np.array(values), rows)

    def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))

    columns: dict[str, Any] = {
        name: pd.Series(np.repeat(np.array([getattr(b, name) for b in blocks], object), rows))
        for name in ("kind", "role", "layer")
    }
    columns["block"] = np.repeat(np.array([block.name for block in blocks], object), rows)
    columns["step"] = step
    columns["numel"] = per_block([block.numel for block in blocks])
    columns["probe"] = joined(np.repeat(np.arange(k), m) for k, m in shapes)
    columns["index"] = joined(np.tile(np.arange(m), k) for k, m in shapes)
    for column, name in PER_NODE.items():
        columns[column] = joined(getattr(s, name).ravel() for s in spectra)
    for name in PER_PROBE:
        values = (np.repeat(getattr(s, name), s.nodes.shape[1]) for s in spectra)
        columns[name] = joined(values)
    for name in PER_BLOCK:
        columns[name] = per_block([getattr(s, name) for s in spectra])
    changes = [listed(s.sample, s.nodes.size) for s in spectra]
    for name in PER_GROUP:
        lists = list(chain.from_iterable(part[name] for part in changes))
        columns[name] = pd.Series(lists, dtype=object)
    texts = {name: "str" for name in ("block", "kind", "role", *TEXTS)}
    return pd.DataFrame(columns).astype({"layer": "Int64"} | texts)[list(COLUMNS)]


def _spectrum(rows: Mapping[str, np.ndarray], layer: Any) -> Spectrum:
    """From a block's part of every column."""
    first = {name: values[0] for name, values in rows.items()}
    probes = len(np.unique(rows["probe"]))
    arrays: dict[str, Any] = {
        name: rows[column].reshape(probes, -1) for column, name in PER_NODE.items()
    }
    arrays |= {name: rows[name].reshape(probes, -1)[:, 0] for name in PER_PROBE}
    arrays |= {
        name: first[name].item() if hasattr(first[name], "item") else first[name]
        for name in PER_BLOCK
    }
    number = None if pd.isna(layer) else int(layer)
    block = Block(
        first["block"], first["kind"], number, int(first["numel"]), role=str(first["role"])
    )
    return Spectrum(
        block=block, **arrays, sample=sample_of({name: rows[name] for name in PER_GROUP}, probes)
    )


def _summary(spectrum: Spectrum) -> dict[str, object]:
    block, trace = spectrum.block, spectrum.trace
    largest, smallest = spectrum.largest, spectrum.smallest
    error, data_error = spectrum.error, spectrum.data_error
    return {
        "block": block.name,
        "kind": block.kind,
        "layer": block.layer,
        "numel": block.numel,
        "largest": largest.value,
        "smallest": smallest.value,
        "residual": max(largest.residual, smallest.residual),
        "largest_data_stderr": largest.data_stderr,
        "smallest_data_stderr": smallest.data_stderr,
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "trace_data_stderr": trace.data_stderr,
        "error": error,
        "data_error": data_error,
        "total_error": None if data_error is None else math.hypot(error, data_error),
        "dominant": _dominant(error, data_error),
        "probes": spectrum.num_probes,
        "steps": int(spectrum.steps.max()),
        "units": spectrum.units,
        "exact": spectrum.exact,
    }


def _dominant(error: float, data_error: float | None) -> str:
    """Which part of the total error is the larger one: what to spend more on."""
    if data_error is None:
        return "unknown"
    return "data" if data_error > error else "estimate"


def kept(
    name: str, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> bool:
    def matches(patterns: str | Iterable[str]) -> bool:
        return any(
            fnmatchcase(name, pattern)
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        )

    return (include is None or matches(include)) and not (exclude is not None and matches(exclude))


def write_parquet(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Writes whole or not at all, see :func:`blockspec.numerics.files.whole_file`."""
    with whole_file(path) as partial:
        table.to_parquet(partial, index=False, compression="zstd")
