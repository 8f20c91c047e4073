"""What is compared where there are too many blocks to compare each with each.

Distances between n blocks are n (n - 1) / 2. Cut by neuron, a model has a hundred thousand blocks,
and nobody reads a map of them. So beyond some hundred blocks, the blocks of one kind in one layer
are mixed into one spectrum by number of parameters, and these are compared. Their names say of how
many blocks they are, and how many of those were looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from blockspec.model.pieces import Block
from blockspec.spectra.collection import Spectra, block_diagonal
from blockspec.spectra.pairs import MOST_COMPARED
from blockspec.spectra.spectrum import Spectrum

MOST_MIXED = 32  # blocks of a group that are looked at, spread evenly
Key = tuple[str, int | None]

LEVELS: tuple[Callable[[Block], Key], ...] = (
    lambda block: (block.kind, block.layer),
    lambda block: (block.kind, None),
)
"""How blocks are put into groups, the finest first."""


def compared(spectra: Mapping[str, Spectrum]) -> Spectra:
    """The spectra between which distances are taken.

    Args:
        spectra: Of disjoint blocks.

    Returns:
        The spectra as they are, up to ``MOST_COMPARED`` of them. Of more, one for each kind and
        layer, or, where these are still too many, one for each kind.
    """
    if len(spectra) <= MOST_COMPARED:
        return Spectra(spectra.values())
    for level in LEVELS:
        groups: dict[Key, list[Spectrum]] = {}
        for spectrum in spectra.values():
            groups.setdefault(level(spectrum.block), []).append(spectrum)
        if len(groups) <= MOST_COMPARED:
            break
    return Spectra(_mixed(key, parts) for key, parts in groups.items())


def _mixed(key: Key, parts: list[Spectrum]) -> Spectrum:
    kind, layer = key
    if len(parts) == 1:
        return parts[0]
    stride = -(-len(parts) // MOST_MIXED)
    some = parts[::stride]
    place = kind if layer is None else f"layer_{layer}.{kind}"
    looked_at = f"{len(some)} of " if len(some) < len(parts) else ""
    name = f"{place} ({looked_at}{len(parts)} blocks)"
    numel = sum(part.block.numel for part in parts)
    mixture = block_diagonal({part.block.name: part for part in some})
    return replace(mixture, block=Block(name, kind, layer, numel, role=parts[0].block.role))
