"""From which number of tokens on attention without matrices is the better one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache

import torch

LONG: Mapping[str, tuple[int, int]] = {"cpu": (512, 1024)}
"""Device -> tokens from which on :func:`blockspec.model.attention.attention` is chosen: if causal
(it skips what is hidden) and if not. Measured by ``benchmarks.attention``: shorter products are
faster with matrices, which are small.
"""
LONG_ELSEWHERE = (2048, 2048)  # not measured: memory decides, 200 MB a matrix for 12 heads


def is_long(queries: int, keys: int, device: torch.device, *, causal: bool) -> bool:
    """Whether attention of so many queries to so many keys goes without matrices."""
    if_causal, if_not = LONG.get(device.type, LONG_ELSEWHERE)
    return queries * keys >= (if_causal if causal else if_not) ** 2


@cache
def say_once(reason: str) -> None:
    """Warns that memory grows with the square of the number of tokens, and why."""
    warnings.warn(
        f"attention over many tokens keeps matrices of queries x keys, because of {reason}: "
        "memory grows with the square of the number of tokens",
        stacklevel=2,
    )
