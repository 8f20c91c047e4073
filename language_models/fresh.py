"""A factory of models as their training begins with them: ``language_models.fresh:fresh``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from blockspec.model.losses import Loss
from language_models.batches import Batch, fixed_batches
from language_models.models import ModelSettings
from language_models.tokens import open_tokens
from language_models.train import DataSettings, make_model, make_task


def fresh(
    *,
    settings: dict[str, Any] | None = None,
    data: str = "embedded",
    split: str = "train",
    num_batches: int = 4,
    batch_size: int = 4,
    num_tokens: int = 64,
    seed: int = 0,
) -> tuple[PreTrainedModel, list[Batch], Loss]:
    """A GPT-2 or BERT with the weights of a seed, and windows of text.

    Args:
        settings: Fields of ModelSettings, such as {architecture: bert, num_layers: 6, num_heads: 6,
            width: 384}.
        data: embedded, or a folder with train.bin and val.bin.
        split: train or val.
        num_batches: Number of batches.
        batch_size: Windows in a batch.
        num_tokens: Tokens in a window, which is the model's longest context.
        seed: Of the weights and of the masks.

    Returns:
        The model, fixed batches that are spread evenly over the split, and the cross entropy of its
        task.
    """
    shape = ModelSettings(**settings or {})
    task = make_task(shape, DataSettings(source=data, num_tokens=num_tokens), seed=seed)
    tokens = open_tokens(data, split, window=num_tokens)
    size = {"num_batches": num_batches, "batch_size": batch_size, "window": num_tokens}
    return (
        make_model(shape, task, seed=seed).eval(),
        fixed_batches(tokens, task.make, **size),
        task.loss,
    )
