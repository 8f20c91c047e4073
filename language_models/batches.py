"""Batches of token windows. A batch is a pure function of the seed and its number, so no order has to be stored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from language_models.tokens import Tokens

Batch = dict[str, Tensor]
IGNORED = -100


def random_windows(tokens: Tokens, index: int, *, batch_size: int, window: int, seed: int) -> np.ndarray:
    """Batch number ``index`` of windows that start anywhere: (B, T)."""
    starts = np.random.default_rng([seed, index]).integers(0, tokens.length - window + 1, batch_size)
    return tokens.windows(starts, window)


def spread_windows(tokens: Tokens, *, num_batches: int, batch_size: int, window: int) -> list[np.ndarray]:
    """Fixed windows, spread evenly over the whole row: ``num_batches`` arrays (B, T)."""
    count = num_batches * batch_size
    if count < 1:
        raise ValueError(f"num_batches is {num_batches} and batch_size is {batch_size}; both must be at least 1")
    starts = np.linspace(0, tokens.length - window, count).astype(np.int64)
    return [tokens.windows(part, window) for part in starts.reshape(num_batches, batch_size)]


def causal_batch(windows: np.ndarray) -> Batch:
    """(B, T) tokens -> a batch for a causal model: T - 1 loss terms a window."""
    return {"input_ids": torch.from_numpy(windows)}


def masked_batch(windows: np.ndarray, *, mask_token: int, vocabulary: int, seed: int, index: int) -> Batch:
    """(B, T) tokens -> a batch for a masked model, after BERT.

    15 % of the tokens are to be predicted (one at least); of these 80 % are replaced by the mask, 10 % by a random token
    and 10 % stay (Devlin et al. 2018, section 3.1). The labels of all others are -100.
    """
    rng = np.random.default_rng([seed, index, 1])
    chosen = rng.random(windows.shape) < 0.15
    chosen[0, 0] |= not chosen.any()
    how = rng.random(windows.shape)
    inputs = np.where(chosen & (how < 0.8), mask_token, windows)
    inputs = np.where(chosen & (how >= 0.9), rng.integers(0, vocabulary, windows.shape), inputs)
    return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(np.where(chosen, windows, IGNORED))}


def to_device(batches: list[Batch], device: str) -> list[Batch]:
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]
