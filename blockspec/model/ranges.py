"""Data that a model cannot take: numbers of tokens and classes beyond its tables, and streams
without an end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.examples import leaves
from blockspec.numerics import memory

MOST_BATCHES = 10_000  # of what has no length; a list may be as long as it likes
SAID = ("index out of range in self", "is out of bounds")  # by PyTorch, of embeddings and of labels


def read(batches: Iterable[Any]) -> list[Any]:
    """The list of what an iterator gives.

    Raises:
        ValueError: It has no end, as far as one can tell.
    """
    found, size, room = [], 0, memory.total(torch.device("cpu")) // 2
    for batch in bounded(batches):
        found.append(batch)
        size += sum(tensor.nbytes for _, tensor in leaves(batch))
        if size > room:
            raise ValueError(_endless(f"{len(found)} batches, {memory.readable(size)}"))
    return found


def bounded(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of what has no length, as long as there may be an end to them.

    Raises:
        ValueError: There are more than ``MOST_BATCHES``.
    """
    for number, batch in enumerate(batches):
        if number == MOST_BATCHES:
            raise ValueError(_endless(f"{MOST_BATCHES:,} batches"))
        yield batch


def _endless(seen: str) -> str:
    return (
        f"the batches have not ended after {seen}: a stream without an end? Pass a list of some of "
        "them, such as "
        "list(itertools.islice(batches, 100))"
    )


def out_of_range(model: nn.Module, batches: Iterable[Any], error: Exception) -> str | None:
    """What PyTorch's error means, with batch, value and bound; None where it is about something
    else.
    """
    if not any(text in str(error) for text in SAID):
        return None
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)][:1]
    is_label = SAID[1] in str(error)
    bound = max(outputs[-1:] or tables if is_label else tables, default=0)  # words come first
    for number, batch in enumerate(batches):
        for path, tensor in leaves(batch):
            if (value := _beyond(tensor, bound, negative=not is_label)) is not None:
                name = "/".join(map(str, path)) or "tensor"
                takes = "outputs allow" if is_label else "embedding allows"
                return (
                    f"batch {number} holds {value} in {name!r}, and the model's {takes} "
                    f"0 to {bound - 1}: is the data of another tokenizer, or of other classes?"
                )
    return None


def _beyond(tensor: Tensor, bound: int, *, negative: bool) -> int | None:
    if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
        return None
    low, high = (int(end) for end in tensor.aminmax())
    if high >= bound:
        return high
    return low if negative and low < 0 and low != -100 else None
