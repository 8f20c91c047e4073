"""Algorithms that ask for products: a generator yields probes (K, P), is sent their products (K,
P), and returns its result. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from torch import Tensor

R = TypeVar("R")

Algorithm = Generator[Tensor, Tensor, R]

Progress = Callable[[float, float | None], None]
"""Told (done, in all) now and then; None where the end is not known. Within a sweep that takes
long, what is done is no whole number."""


def run(algorithm: Algorithm[R], product: Callable[[Tensor], Tensor]) -> R:
    """The result of one algorithm with ``product`` (K, P) -> (K, P): ``run(xtrace(...), lambda V: V
    @ A)``.
    """
    try:
        probes = next(algorithm)
        while True:
            probes = algorithm.send(product(probes))
    except StopIteration as stop:
        return stop.value
