"""The embedded text: Python's own reference manual (``pydoc_data.topics``), on every machine that
has Python.

Some 465,000 characters of English and Python, cut into 79 topics. They differ a little between
versions of Python: the checksum is recorded with every run.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
MASK = "<|mask|>"
# 256 bytes and 254 merges: 2.1 bytes a token, and an embedding that does not outweigh a tiny model
VOCABULARY = 512
HELD_OUT = 0.1  # the end of each topic, so that both splits hold the same kinds of text


def topics() -> list[str]:
    from pydoc_data.topics import topics as by_name

    return [by_name[name] for name in sorted(by_name)]


def checksum() -> str:
    return hashlib.sha256("\0".join(topics()).encode()).hexdigest()


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the text itself; the same on every call (0.4 s)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(topics(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, mask_token=MASK
    )


def meta() -> dict[str, Any]:
    """The same as a prepared folder's ``meta.json`` says of it."""
    own = tokenizer()
    return {
        "vocabulary": VOCABULARY,
        "end_token": own.eos_token_id,
        "mask_token": own.mask_token_id,
        "sha256": checksum(),
    }


def split_topic(text: str) -> dict[str, str]:
    """Cut at a line's end."""
    cut = text.find("\n", int(len(text) * (1 - HELD_OUT))) + 1 or len(text)
    return {"train": text[:cut], "val": text[cut:]}


@functools.lru_cache(maxsize=4)
def token_ids(split: str, encoder: PreTrainedTokenizerBase) -> np.ndarray:
    """All tokens of ``train`` or ``val`` in one row, each topic ended by the end-of-text (or
    separator) token.
    """
    end = encoder.eos_token_id if encoder.eos_token_id is not None else encoder.sep_token_id
    rows = encoder(
        [split_topic(text)[split] for text in topics()], add_special_tokens=False, verbose=False
    )["input_ids"]
    return np.array([token for row in rows for token in (*row, end)])
