"""Masked language models to measure: factories that return ``(model, batches, loss)``."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedModel

from blockspec.model.losses import Loss, masked_token
from language_models.batches import Batch, fixed_batches, masked_batch
from language_models.loading import load_pretrained
from language_models.models import freeze_biases, trained_record
from language_models.tokens import longest_window, mask_token, open_tokens, tokenizer_for


def checkpoint(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "val",
    num_batches: int = 4,
    batch_size: int = 4,
    num_tokens: int | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, list[Batch], Loss]:
    """A BERT of ``language_models.train``, and windows of text that it was not trained on.

    Args:
        checkpoint: Folder of the checkpoint.
        data: embedded, or a folder with train.bin and val.bin; None takes the data of the training.
        split: val or train.
        num_batches: Number of batches.
        batch_size: Windows in a batch.
        num_tokens: Tokens in a window; None takes the window of the training.
        seed: Seed of the masks.

    Returns:
        The model, fixed batches that are spread evenly over the split, and the cross entropy of the
        masked tokens.
    """
    record = trained_record(checkpoint, "bert")
    model = load_pretrained(checkpoint, "masked")
    if not record["model"]["bias"]:
        freeze_biases(model)
    source = data or record["data"]["source"]
    window = num_tokens or record["data"]["num_tokens"]
    tokens = open_tokens(source, split, window=window, vocabulary=model.config.vocab_size)
    make = partial(masked_batch, mask=mask_token(source), vocabulary=tokens.vocabulary, seed=seed)
    return (
        model,
        fixed_batches(tokens, make, num_batches=num_batches, batch_size=batch_size, window=window),
        masked_token,
    )


def pretrained(
    name: str = "google-bert/bert-base-uncased",
    *,
    checkpoint: str | None = None,
    data: str = "embedded",
    split: str = "val",
    num_batches: int = 4,
    batch_size: int = 4,
    num_tokens: int = 128,
    seed: int = 0,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, list[Batch], Loss]:
    """Any masked language model of Hugging Face.

    Args:
        name: Name on the hub, or a folder.
        checkpoint: Another folder with weights of the same kind of model, taken instead; the
            tokenizer is that of name.
        data: embedded, cut by the model's own tokenizer, or a folder with train.bin and val.bin.
        split: val or train.
        num_batches: Number of batches.
        batch_size: Windows in a batch.
        num_tokens: Tokens in a window.
        seed: Seed of the masks.
        tokenizer: Name or folder of the tokenizer for the embedded text; None takes the model's.
        trust_remote_code: Run code that comes with the model. Only for sources that you trust.

    Returns:
        The model, fixed batches that are spread evenly over the split, and the cross entropy of the
        masked tokens.
    """
    model = load_pretrained(checkpoint or name, "masked", trust_remote_code=trust_remote_code)
    longest_window(model.config, num_tokens)
    encoder = tokenizer_for(data, tokenizer or name)
    tokens = open_tokens(
        data, split, window=num_tokens, vocabulary=model.config.vocab_size, encoder=encoder
    )
    make = partial(
        masked_batch, mask=mask_token(data, encoder), vocabulary=tokens.vocabulary, seed=seed
    )
    size = {"num_batches": num_batches, "batch_size": batch_size, "window": num_tokens}
    return model, fixed_batches(tokens, make, **size), masked_token
