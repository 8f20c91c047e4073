"""How attention is cut: some rows of queries at a time, each with all the keys that the rows
see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 64  # of queries in a strip
STRIP_ENTRIES = {"cpu": 2**18}  # scores in a strip: a few matrices of this size stay in the cache
STRIP_ENTRIES_ELSEWHERE = 2**26  # few kernels


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees and how scores are made; as in
    :func:`blockspec.model.attention.attention`.
    """

    causal: bool
    window: int | None
    softcap: float | None
    scale: float


@dataclass(frozen=True)
class Work:
    """One call's tensors. Batches and key heads are one dimension of N = B x G; the R = H / G query
    heads that share a key head lie beside each other, so that their rows make one matrix.
    """

    q: Tensor  # (N, R, T, d), times the scale
    k: Tensor  # (N, S, d)
    v: Tensor  # (N, S, e)
    sinks: Tensor | None  # (N, R, 1)
    mask: Tensor | None  # (B, G, R, T, S), any of them 1 where the mask does not depend on it
    rule: Rule
    batches: int
    dtype: torch.dtype  # of the inputs; the work is done in float32 at least

    def of_queries(self, t: Tensor) -> Tensor:
        """(B, H, T, d) -> (N, R, T, d)"""
        return t.to(self.q.dtype).reshape(*self.q.shape[:3], -1)

    def of_keys(self, t: Tensor) -> Tensor:
        """(B, G, S, d) -> (N, S, d)"""
        return t.to(self.k.dtype).reshape(*self.k.shape[:2], -1)

    def of_sinks(self, t: Tensor) -> Tensor:
        """(H,) -> (N, R, 1)"""
        return t.to(self.q.dtype).view(-1, self.q.shape[1], 1).repeat(self.batches, 1, 1)

    def result(self, t: Tensor | None) -> Tensor | None:
        """Back to (B, heads, tokens, d), in the dtype of the inputs."""
        if t is None:
            return None
        return t.reshape(self.batches, -1, *t.shape[-2:]).to(self.dtype)


def folded(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor | None, rule: Rule
) -> Work:
    """The inputs of :func:`blockspec.model.attention.attention` as :class:`Work`."""
    (batches, heads), groups = q.shape[:2], k.shape[1]
    repeats = heads // groups
    wide = torch.promote_types(q.dtype, torch.float32)
    if sinks is not None:
        sinks = sinks.to(wide).view(groups, repeats, 1).repeat(batches, 1, 1)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.unflatten(1, (groups, repeats) if mask.shape[1] > 1 else (1, 1))
    return Work(
        q=(q.to(wide) * rule.scale).reshape(-1, repeats, *q.shape[2:]),
        k=k.to(wide).reshape(-1, *k.shape[2:]),
        v=v.to(wide).reshape(-1, *v.shape[2:]),
        sinks=sinks,
        mask=mask,
        rule=rule,
        batches=batches,
        dtype=q.dtype,
    )


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Casts are made here alone."""
    return torch.autocast(t.device.type, enabled=False)


@dataclass(frozen=True)
class Strip:
    """``rows`` of queries with the ``keys`` that any of them sees, in some of the N ``heads``.

    Args:
        hides: (part of the keys, counted from the first of ``keys``; (rows, keys) True where the
            rule hides them).
        mask: Of these scores, broadcastable to (batches, G, R, rows, keys).
    """

    heads: slice
    rows: slice
    keys: slice
    hides: Sequence[tuple[slice, Tensor]]
    mask: Tensor | None

    def of_queries(self, t: Tensor) -> Tensor:
        """(N, R, T, d) -> (n, R x rows, d)"""
        return t[self.heads, :, self.rows].flatten(1, 2)

    def of_keys(self, t: Tensor) -> Tensor:
        """(N, S, d) -> (n, keys, d)"""
        return t[self.heads, self.keys]

    def of_sinks(self, t: Tensor) -> Tensor:
        """(N, R, 1) -> (n, R x rows, 1)"""
        return t[self.heads].repeat_interleave(self.rows.stop - self.rows.start, 1)

    def add_to_sinks(self, whole: Tensor, part: Tensor) -> None:
        """Adds the sum of (n, R x rows, 1) over rows to (N, R)."""
        place = whole[self.heads]
        place += part.view(*place.shape, -1).sum(-1)

    def put(self, whole: Tensor, part: Tensor | None) -> None:
        """Writes what :meth:`of_queries` reads."""
        assert part is not None
        place = whole[self.heads, :, self.rows]
        place.copy_(part.view_as(place))


def hidden(rule: Rule, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """(rows, keys) True where the rule hides a key."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)
    hides = j > i if rule.causal else (j < 0).expand(len(i), -1)
    return hides if rule.window is None else hides | ((i - j).abs() >= rule.window)


def strips(work: Work) -> Iterator[Strip]:
    """All that there is to do: rows that see no key are in none of them."""
    count, repeats, length, _ = work.q.shape
    size = max(1, min(ROWS, length))
    device = work.q.device
    first, last = _seen(work)
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        keys = slice(min(first[rows]), max(last[rows]))
        if keys.start >= keys.stop:
            continue
        hides = list(_hides(work.rule, rows, keys, device))
        entries = repeats * size * (keys.stop - keys.start)
        budget = STRIP_ENTRIES.get(device.type, STRIP_ENTRIES_ELSEWHERE)
        for heads in _heads(count, count // work.batches, budget // entries):
            yield Strip(heads, rows, keys, hides, _part(work, heads, rows, keys))


def _heads(count: int, of_batch: int, at_once: int) -> Iterator[slice]:
    """Some heads of one batch, or some whole batches."""
    if at_once >= of_batch:
        size = at_once // of_batch * of_batch
        yield from (slice(i, min(i + size, count)) for i in range(0, count, size))
        return
    size = max(1, at_once)
    for batch in range(0, count, of_batch):
        for i in range(batch, batch + of_batch, size):
            yield slice(i, min(i + size, batch + of_batch))


def _seen(work: Work) -> tuple[list[int], list[int]]:
    """For each row the first key that it can see, and one more than the last."""
    rule, length, keys = work.rule, work.q.shape[2], work.k.shape[1]
    before = length + keys if rule.window is None else rule.window - 1
    after = 0 if rule.causal else before
    first = [max(0, i - before) for i in range(length)]
    last = [min(keys, i + after + 1) for i in range(length)]
    if work.mask is not None:
        mask = work.mask if work.mask.dtype is torch.bool else work.mask != -math.inf
        mask = mask.flatten(0, 2).any(0).expand(length, keys)
        begins = mask.to(torch.uint8).argmax(-1)
        ends = keys - mask.flip(-1).to(torch.uint8).argmax(-1)
        ends = ends.where(mask.any(-1), begins)
        first = [max(pair) for pair in zip(first, begins.tolist(), strict=True)]
        last = [min(pair) for pair in zip(last, ends.tolist(), strict=True)]
    return first, last


def _hides(
    rule: Rule, rows: slice, keys: slice, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Where the edges of the rule run through a strip: behind its first row's last key, before its
    last row's first.
    """
    window = rows.stop + keys.stop if rule.window is None else rule.window
    after = 1 if rule.causal else window
    edges = [(keys.start, rows.stop - window), (rows.start + after, keys.stop)]
    for start, stop in edges:
        part = slice(max(start, keys.start), min(stop, keys.stop))
        if part.start < part.stop:
            shifted = slice(part.start - keys.start, part.stop - keys.start)
            yield shifted, hidden(rule, rows, part, device)


def _part(work: Work, heads: slice, rows: slice, keys: slice) -> Tensor | None:
    if work.mask is None:
        return None
    groups = len(work.k) // work.batches
    batches = slice(heads.start // groups, -(-heads.stop // groups))
    of_group = slice(heads.start % groups, heads.start % groups + heads.stop - heads.start)
    if heads.stop - heads.start >= groups:
        of_group = slice(0, groups)
    places = (batches, of_group, slice(None), rows, keys)
    return work.mask[
        tuple(
            place if size > 1 else slice(None)
            for place, size in zip(places, work.mask.shape, strict=True)
        )
    ]


def scores_of(work: Work, strip: Strip) -> tuple[Tensor, Tensor | None]:
    """(n, R x rows, keys) scores; with a soft cap, the hyperbolic tangent that they are made of."""
    scores = strip.of_queries(work.q) @ strip.of_keys(work.k).mT
    tanh = None
    if work.rule.softcap is not None:
        tanh = scores.div_(work.rule.softcap).tanh_()
        scores = tanh * work.rule.softcap
    n, _, keys = scores.shape
    by_row = scores.view(n, work.q.shape[1], -1, keys)
    for part, hides in strip.hides:
        by_row[..., part].masked_fill_(hides, -math.inf)
    if strip.mask is not None:
        groups = min(n, len(work.k) // work.batches)
        by_head = by_row.view(-1, groups, *by_row.shape[1:])
        if strip.mask.dtype is torch.bool:
            by_head.masked_fill_(~strip.mask, -math.inf)
        else:
            by_head.add_(strip.mask)
    return scores, tanh
