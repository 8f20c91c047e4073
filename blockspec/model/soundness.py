"""What can be seen of batches and of a loss's value before anything expensive: whether they are the
same twice, and whether there is something to differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.numerics.content import fingerprint


def check_repeatable(batches: Callable[[], Iterable[Any]]) -> None:
    """Raises ValueError for batches that are others when they are read again."""
    first, again = ([fingerprint(batch) for batch in batches()] for _ in range(2))
    if first != again:
        number = next(
            (i for i, (a, b) in enumerate(zip(first, again, strict=False)) if a != b),
            min(len(first), len(again)),
        )
        raise ValueError(
            f"the batches are not the same the second time (batch {number} differs): the data is "
            "shuffled or drawn "
            "anew. Pass a list, or a DataLoader with shuffle=False and without random augmentation"
        )


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
