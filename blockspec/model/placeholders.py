"""Tokens that stand for pictures, films and sounds: they are no text, and nothing is lost where a
model does not foresee them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

PLACEHOLDERS = re.compile(
    r"(image|img|video|audio|speech|vision)(_latent|_prompt)?_token_(id|index)"
)
"""What configurations call the token that stands in the text where a patch of a picture goes.

Those at the beginning and the end of a picture are called otherwise; a model may foresee them.
"""


def placeholders_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens of a model that are no text."""
    config = getattr(getattr(model, "config", None), "__dict__", {})
    found = {value for name, value in config.items() if PLACEHOLDERS.fullmatch(name)}
    return tuple(sorted(value for value in found if type(value) is int and value >= 0))


def without_placeholders(labels: Tensor, model: nn.Module, ignored: int) -> Tensor:
    """The labels (B, T) with ``ignored`` where a placeholder is; the same tensor where there is
    none.
    """
    tokens = placeholders_of(model)
    if not tokens:
        return labels
    found = torch.isin(labels, labels.new_tensor(tokens))
    return labels.masked_fill(found, ignored) if found.any() else labels
