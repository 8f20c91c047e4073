"""What can be seen of batches and of a loss's value before anything expensive: whether they are the
same twice, and whether there is something to differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from blockspec.numerics.content import fingerprint


def check_repeatable(batches: Callable[[], Iterable[Any]]) -> list[str]:
    """The fingerprints of batches; ValueError for batches that are others when they are read
    again.
    """
    first = [fingerprint(batch) for batch in batches()]
    for _ in as_before(batches(), first):
        pass
    return first


def as_before(batches: Iterable[Any], known: Sequence[str] | None) -> Iterator[Any]:
    """The batches, each compared with its fingerprint, where these are known.

    Raises:
        ValueError: A batch is another one, or there are fewer or more of them.
    """
    if known is None:
        yield from batches
        return
    number = -1
    for number, batch in enumerate(batches):
        if number >= len(known) or fingerprint(batch) != known[number]:
            _refuse_others(number)
        yield batch
    if number + 1 < len(known):
        _refuse_others(number + 1)


def _refuse_others(number: int) -> NoReturn:
    raise ValueError(
        f"the batches are not the same when they are read again (batch {number} differs): the data "
        "is shuffled or drawn anew. Pass a list, or a DataLoader with shuffle=False and without "
        "random augmentation: list(loader) keeps one drawing of it"
    )


def misfit(batch: Any, error: Exception) -> str | None:
    """What is wrong with a batch that made the loss fail; None where nothing can be seen."""
    entries = batch.items() if isinstance(batch, Mapping) else enumerate(_sequence(batch))
    for name, value in entries:
        raw = isinstance(value, (list, tuple)) and isinstance(_innermost(value), (int, float))
        if raw or isinstance(value, np.ndarray):
            kind = "numpy array" if isinstance(value, np.ndarray) else "list of numbers"
            return (
                f"{name!r} of the batch is a {kind}, not a tensor ({error}): torch.as_tensor makes "
                "one, and so does dataset.with_format('torch') of Hugging Face"
            )
        if name == "input_ids" and isinstance(value, Tensor) and value.dim() == 1:
            return (
                f"'input_ids' of the batch has the shape {tuple(value.shape)}, which is one "
                f"example without a dimension for examples ({error}): batches come from "
                "DataLoader(dataset, batch_size=4), or as {'input_ids': ids[None]}"
            )
    return None


def _sequence(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, (list, tuple)) else ()


def _innermost(value: Any) -> Any:
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
    return value


def check_loss(total: Tensor, count: float) -> None:
    """Raises ValueError for a loss without terms, without a graph, or that is not finite; TypeError
    for what is no scalar.
    """
    if not isinstance(total, Tensor) or total.numel() != 1:
        raise TypeError(f"the loss must give a scalar tensor and a count; it gave {total!r}")
    if count <= 0:
        raise ValueError(
            f"the loss has {count:g} terms on all of the batches; it needs at least one (all "
            "labels -100?)"
        )
    if not total.requires_grad:
        raise ValueError(
            "the loss has no graph: it does not depend on a parameter that requires gradients (a "
            "frozen model, "
            "torch.no_grad, .detach() or .item() in the loss); call model.requires_grad_(True) or "
            "mend the loss"
        )
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss is {total.item()} on the first batch; curvature needs a finite one: check "
            "the checkpoint"
        )


def check_deterministic(model: nn.Module, first: Tensor, second: Tensor) -> None:
    """Raises ValueError where the same batch gave two values."""
    if torch.equal(first, second):
        return
    raise ValueError(
        f"the objective is not deterministic: the same batch gave {first.item()!r} and then "
        f"{second.item()!r}, with {type(model).__name__} in eval mode. Something still draws "
        "random numbers: dropout that ignores eval mode (F.dropout without "
        "training=self.training, a module that overrides train()), or a loss or augmentation with "
        "random numbers; or a state goes from one call to the next (a module that keeps what it "
        "saw, a loss that changes its batch in place)"
    )
