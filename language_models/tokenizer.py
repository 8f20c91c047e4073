"""Tokenizers by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from language_models import embedded
from training.hub import hub_or_cache

LARGEST = int(np.iinfo(np.uint16).max)  # token files are uint16


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """``embedded``, or a tokenizer by hub name or folder; ValueError if it cannot be used for token
    files.
    """
    if name == "embedded":
        return embedded.tokenizer()
    if Path(name).is_dir():
        encoder = AutoTokenizer.from_pretrained(name, local_files_only=True)
    else:
        with hub_or_cache():
            encoder = AutoTokenizer.from_pretrained(name)
    if len(encoder) > LARGEST + 1:
        raise ValueError(
            f"the tokenizer {name} has {len(encoder)} tokens; token files are uint16: "
            f"{LARGEST + 1} at most"
        )
    if end_token(encoder) is None:
        raise ValueError(
            f"the tokenizer {name} has neither an end-of-text nor a separator token to put between "
            "documents"
        )
    return encoder


def end_token(encoder: PreTrainedTokenizerBase) -> int | None:
    """The token after each document: end of text, or BERT's separator."""
    return encoder.eos_token_id if encoder.eos_token_id is not None else encoder.sep_token_id
