"""Very many pairs of blocks: what is said before the work, what is refused, a sample instead."""

from __future__ import annotations

import math
import warnings

import numpy as np

from blockspec.spectra.spectrum import Spectrum

MOST_COMPARED = 200  # blocks; their distances take some seconds
MOST_UNSAID = 1_000  # blocks whose distances are computed without a word: half a minute
MOST_ENTRIES = 100_000_000  # of tables of distances at once, of 8 bytes each
PAIRS_A_SECOND = 30_000  # of jensen-shannon, on one thread of a machine of 2026


def some_of(parts: list[Spectrum], most: int | None) -> list[Spectrum]:
    """At most so many of the blocks, at random, in their order."""
    if most is not None and most < 3:
        raise ValueError(f"max_blocks={most} is too few: at least 3, or None for all blocks")
    if most is None or len(parts) <= most:
        say_what_comes(len(parts), "js0")
        return parts
    warnings.warn(
        f"js0 compares a random sample of {most:,} of the {len(parts):,} blocks, and its standard "
        "error holds what that changes; max_blocks= takes more of them, None all",
        stacklevel=3,
    )
    chosen = np.random.default_rng(0).choice(len(parts), most, replace=False)
    return [parts[place] for place in sorted(chosen.tolist())]


def sampling_stderr(distances: np.ndarray) -> float:
    """Standard error of the mean over pairs, from its values without each block: the blocks are a
    sample of very many.
    """
    number = len(distances)
    sums = distances.sum(0)
    left_out = (sums.sum() / 2 - sums) / ((number - 1) * (number - 2) / 2)
    return math.sqrt((number - 1) * float(left_out.var()))


def say_what_comes(number: int, name: str, tables: int = 1) -> None:
    """Says before the work what it is, where the square of the number of blocks is large."""
    pairs = number * (number - 1) // 2
    entries = number**2 * tables
    remedy = (
        "choose blocks with spectra.select(include=...), compare "
        "blockspec.spectra.groups.compared(spectra), which mixes the blocks of one kind and layer, "
        "or ask js0 for the mean over a sample"
    )
    if entries > MOST_ENTRIES:
        raise ValueError(
            f"{name} of {number:,} blocks is {pairs:,} pairs, {entries:,} numbers held at once, "
            f"and at most {MOST_ENTRIES:,} are: {remedy}"
        )
    if number > MOST_UNSAID:
        minutes = max(pairs * tables / PAIRS_A_SECOND / 60, 1)
        warnings.warn(
            f"{name} of {number:,} blocks is {pairs:,} pairs, of which jensen-shannon takes about "
            f"{minutes:,.0f} min, and the others more: {remedy}",
            stacklevel=3,
        )
