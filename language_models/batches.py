"""Batches of token windows. A batch is a pure function of the seed and its number, so no order has
to be stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from language_models.tokens import Tokens

Batch = dict[str, Tensor]
MakeBatch = Callable[[np.ndarray, int], Batch]
IGNORED = -100
MASKED_SHARE = (
    0.15  # this, and what happens to the masked ones: BERT, Devlin et al. 2018, section 3.1
)


def random_windows(
    tokens: Tokens, index: int, *, batch_size: int, window: int, seed: int
) -> np.ndarray:
    """Batch number ``index`` of windows that start anywhere: (B, T)."""
    starts = np.random.default_rng([seed, index]).integers(
        0, tokens.length - window + 1, batch_size
    )
    return tokens.windows(starts, window)


def spread_windows(
    tokens: Tokens, *, num_batches: int, batch_size: int, window: int
) -> list[np.ndarray]:
    """Fixed windows, spread evenly over the whole row: ``num_batches`` arrays (B, T)."""
    if num_batches < 1 or batch_size < 1:
        raise ValueError(
            f"num_batches is {num_batches} and batch_size is {batch_size}; both must be at least 1"
        )
    starts = np.linspace(0, tokens.length - window, num_batches * batch_size).astype(np.int64)
    return [tokens.windows(part, window) for part in starts.reshape(num_batches, batch_size)]


def causal_batch(windows: np.ndarray, index: int = 0) -> Batch:
    """(B, T) tokens, whatever the number of the batch -> a batch for a causal model: T - 1 loss
    terms a window.
    """
    return {"input_ids": torch.from_numpy(windows)}


def masked_batch(
    windows: np.ndarray, index: int, *, mask: int, vocabulary: int, seed: int
) -> Batch:
    """(B, T) tokens and the number of the batch -> a batch for a masked model.

    15 % of the tokens are to be predicted (one at least); of these 80 % are replaced by the mask,
    10 % by a random token and 10 % stay. The labels of all others are -100.
    """
    rng = np.random.default_rng([seed, index, 1])  # 1: other numbers than those of the windows
    chosen = rng.random(windows.shape) < MASKED_SHARE
    chosen[0, 0] |= not chosen.any()
    how = rng.random(windows.shape)
    inputs = np.where(chosen & (how < 0.8), mask, windows)
    inputs = np.where(chosen & (how >= 0.9), rng.integers(0, vocabulary, windows.shape), inputs)
    return {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(np.where(chosen, windows, IGNORED)),
    }


def fixed_batches(
    tokens: Tokens, make: MakeBatch, *, num_batches: int, batch_size: int, window: int
) -> list[Batch]:
    """Batches of windows that are spread evenly over the row."""
    windows = spread_windows(tokens, num_batches=num_batches, batch_size=batch_size, window=window)
    return [make(batch, i) for i, batch in enumerate(windows)]


def pair_batches(
    tokens: Tokens, *, num_batches: int, batch_size: int, window: int
) -> list[tuple[Tensor, Tensor]]:
    """Fixed batches for nanoGPT: (x, y), both (B, T), y one token ahead."""
    windows = spread_windows(
        tokens, num_batches=num_batches, batch_size=batch_size, window=window + 1
    )
    return [
        (torch.from_numpy(batch[:, :-1].copy()), torch.from_numpy(batch[:, 1:].copy()))
        for batch in windows
    ]
