"""Densities and tail counts as small numbers: what a page of a megabyte can hold of a run.

A curve is kept on a grid of its own that is even on the scale asinh(x / linear), where every node
is about equally wide. Its logarithm is kept in steps of 1/128 of a decade (1.8 %). Neighbours then
differ by small whole numbers, which deflate packs into about a byte each.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blockspec.runs.loading import Run
from blockspec.runs.page.numbers import Maps
from blockspec.spectra.resolved import resolved_density
from blockspec.spectra.spectrum import Spectrum
from blockspec.spectra.tails import SIDES, magnitudes_of, tail

ROOM = 160_000  # points of all curves of a kind, so that 50 blocks x 20 stages stay below 6 MB
FEWEST, MOST = 96, 400  # points of a curve
PER_DECADE = 128
DEEPEST = 11  # decades below the top that are kept
PER_UNIT = 50  # of relative errors, which end at MOST_ERROR
MOST_ERROR = 2.5
PER_NAT = 10_000  # of distances
UNKNOWN = -1
NOBODY = 0.1  # eigenvalues: a count below one half is none
ARRAYS = ("density", "density_error", "tail", "tail_low", "tail_high")


class Store:
    """Whole numbers of 16 bits, one after the other; the page knows the places of its arrays."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._length = 0

    def put(self, values: np.ndarray) -> int:
        """Adds an array; returns the place of its first number."""
        place = self._length
        self._parts.append(np.ascontiguousarray(values, np.int16).ravel())
        self._length += values.size
        return place

    def packed(self, described: dict[str, Any]) -> str:
        """Everything as text: length of the JSON, the JSON, and the differences of neighbours, all
        low bytes before all high ones (those are mostly equal), deflated, in base64.
        """
        numbers = np.concatenate([np.zeros(1, np.int16), *self._parts])
        differences = np.diff(numbers.astype(np.int32)).astype(np.uint16)
        text = json.dumps(described, allow_nan=False, separators=(",", ":")).encode()
        planes = [(differences & 255).astype(np.uint8), (differences >> 8).astype(np.uint8)]
        content = [len(text).to_bytes(4, "little"), text, *(plane.tobytes() for plane in planes)]
        return deflated(b"".join(content))


def deflated(content: bytes) -> str:
    """As text that the page inflates, in base64."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def points_of(runs: Iterable[Run]) -> int:
    """Points of a curve, so that all of them find room."""
    spectra = sum(len(stage) for run in runs for stage in run.stages.values())
    return int(np.clip(ROOM // max(spectra, 1), FEWEST, MOST))


def curves(run: Run, points: int, store: Store) -> dict[str, Any]:
    """Puts the curves of a run into the store.

    Returns:
        Where they are: ``number`` of the curve (blocks x stages, -1 where there is none), ``heads``
        (linear, low, high, top of each), and the places of the arrays (curves x points).
    """
    found = [
        (place, at, curve(spectra[block.name], points))
        for place, block in enumerate(run.blocks)
        for at, spectra in enumerate(run.stages.values())
        if block.name in spectra
    ]
    number = np.full((len(run.blocks), len(run.stages)), -1)
    for count, (place, at, _) in enumerate(found):
        number[place, at] = count
    arrays = {name: store.put(np.stack([one[name] for _, _, one in found])) for name in ARRAYS}
    heads = [one["head"] for _, _, one in found]
    return {"points": points, "number": number.tolist(), "heads": heads} | arrays


def curve(spectrum: Spectrum, points: int) -> dict[str, Any]:
    """Density and tail counts of one spectrum, each (points,) as whole numbers."""
    linear = spectrum.linear
    grid = spectrum.grid(points, linear=linear)
    density, error = resolved_density(spectrum, grid, linear)
    count, low, high = tails(spectrum, grid)
    top = float(density.max())
    ends = np.arcsinh(grid[[0, -1]] / linear)
    head = [float(f"{value:.7g}") for value in (linear, *ends, math.log10(top))]
    return {
        "head": head,
        "density": _logarithm(density / top, 10.0**-DEEPEST),
        "density_error": _relative(error, density),
        "tail": _logarithm(count, NOBODY),
        "tail_low": _logarithm(low, NOBODY),
        "tail_high": _logarithm(high, NOBODY),
    }


def tails(spectrum: Spectrum, grid: np.ndarray) -> np.ndarray:
    """(3, G) how many eigenvalues lie beyond each point, seen from zero: above a positive one,
    below a negative one; and the ends of the band around it. 0 where the block is not resolved.
    """
    found = np.zeros((3, len(grid)))
    least = magnitudes_of([spectrum])[0]
    for side, sign in SIDES.items():
        inside = sign * grid >= least
        if inside.any():
            beyond = tail(spectrum, np.abs(grid[inside]), side)
            found[:, inside] = beyond.count, beyond.low, beyond.high
    return found


def _logarithm(values: np.ndarray, least: float) -> np.ndarray:
    return np.round(PER_DECADE * np.log10(np.maximum(values, least))).astype(np.int16)


def _relative(error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    relative = np.divide(error, mean, out=np.zeros_like(mean), where=mean > 0)
    return np.round(PER_UNIT * np.minimum(relative, MOST_ERROR)).astype(np.int16)


def distances(maps: Mapping[str, Maps], store: Store) -> dict[str, dict[str, int]]:
    """Puts distance maps into the store: definition -> places of the arrays, lower triangles one
    stage after the other.
    """
    found = {}
    for definition, arrays in maps.items():
        places = {}
        for name, array in arrays.items():
            rows, columns = np.tril_indices(array.shape[1], -1)
            whole = np.round(PER_NAT * array[:, rows, columns])
            places[name] = store.put(np.nan_to_num(whole, nan=UNKNOWN))
        found[definition] = places
    return found
