"""Rows of tokens: nanoGPT's ``.bin`` files (uint16, no header), read a window at a time, and the
embedded text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from language_models import embedded
from language_models.tokenizer import load_tokenizer

DTYPE = np.dtype("<u2")
META = "meta.json"
GPT2_VOCABULARY = 50257
CHUNK = 1 << 20  # tokens of a file that are in memory at once while it is checked


@dataclass(frozen=True)
class Tokens:
    """A row of tokens.

    name: where it is from, for messages.
    source: the ``.bin`` file, or the tokens themselves.
    length: number of tokens.
    vocabulary: number of different tokens; every token is below it.
    """

    name: str
    source: Path | np.ndarray
    length: int
    vocabulary: int

    def windows(self, starts: np.ndarray, size: int) -> np.ndarray:
        """``size`` tokens from each start: (B,) -> (B, size) int64."""
        # a new map each time: pages of the old one would stay counted as this process's memory
        row = (
            self.source
            if isinstance(self.source, np.ndarray)
            else np.memmap(self.source, dtype=DTYPE, mode="r")
        )
        return np.stack([row[start : start + size] for start in starts]).astype(np.int64)


def read_meta(data: str) -> dict[str, Any]:
    """What is known of the data: its vocabulary and special tokens.

    Nothing for nanoGPT's own folders.
    """
    if data == "embedded":
        return embedded.meta()
    path = Path(data) / META
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def largest_token(path: Path) -> int:
    """Reads the whole file, a chunk at a time."""
    largest = 0
    with path.open("rb") as file:
        while (chunk := np.fromfile(file, dtype=DTYPE, count=CHUNK)).size:
            largest = max(largest, int(chunk.max()))
    return largest


def _known_largest(path: Path, size: int) -> int | None:
    """The largest token as the preparation counted it, unless the file was changed since."""
    meta = path.with_name(META)
    if not meta.is_file() or meta.stat().st_mtime_ns < path.stat().st_mtime_ns:
        return None
    count = json.loads(meta.read_text(encoding="utf-8"))["splits"][path.stem]
    if count["tokens"] * DTYPE.itemsize != size:
        raise ValueError(
            f"{path} has {size} bytes, {META} says {count['tokens']} tokens: it is cut short or "
            "another's"
        )
    return count["largest"]


def check_bin(path: Path, *, vocabulary: int, window: int) -> int:
    """The number of tokens in a ``.bin`` file; ValueError says why it cannot be used."""
    size = path.stat().st_size
    if size % DTYPE.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, an odd number: tokens are uint16, so it is cut short or no "
            "token file"
        )
    length = size // DTYPE.itemsize
    _check_length(str(path), length, window)
    largest = _known_largest(path, size)
    _check_largest(str(path), largest_token(path) if largest is None else largest, vocabulary)
    return length


def _check_length(name: str, length: int, window: int) -> None:
    if window < 2:
        raise ValueError(
            f"a window has {window} tokens; it needs two at least, one to predict the other from"
        )
    if length < window:
        raise ValueError(
            f"{name} has {length} tokens, one window needs {window}: prepare more text or shorten "
            "the window"
        )


def _check_largest(name: str, largest: int, vocabulary: int) -> None:
    if largest >= vocabulary:
        raise ValueError(
            f"{name} has token {largest}, the vocabulary ends at {vocabulary - 1}: it was made by "
            "another tokenizer"
        )


def open_tokens(
    data: str,
    split: str,
    *,
    window: int,
    vocabulary: int | None = None,
    encoder: PreTrainedTokenizerBase | None = None,
) -> Tokens:
    """Opens and checks one split of ``embedded`` or of a folder with ``train.bin`` and ``val.bin``.

    Args:
        data: ``embedded`` or a folder.
        split: ``train`` or ``val``.
        window: Tokens that one window takes; the split must hold one at least.
        vocabulary: Size of the vocabulary; None takes the one that ``meta.json`` states, or else
            GPT-2's.
        encoder: Tokenizer of the embedded text; None takes its own.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; choose train or val")
    vocabulary = vocabulary or read_meta(data).get("vocabulary", GPT2_VOCABULARY)
    if data == "embedded":
        row = embedded.token_ids(split, encoder or embedded.tokenizer())
        _check_length(f"embedded/{split}", len(row), window)
        _check_largest(f"embedded/{split}", int(row.max()), vocabulary)
        return Tokens(f"embedded/{split}", row, len(row), vocabulary)
    path = Path(data) / f"{split}.bin"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: prepare it with 'python -m language_models.data', or give "
            "'embedded' or a folder "
            "that has train.bin and val.bin"
        )
    return Tokens(
        str(path), path, check_bin(path, vocabulary=vocabulary, window=window), vocabulary
    )


def tokenizer_for(data: str, name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the embedded text needs; token files are cut already."""
    return load_tokenizer(name) if data == "embedded" else None


def mask_token(data: str, encoder: PreTrainedTokenizerBase | None = None) -> int:
    """The token that stands for a masked one."""
    token = encoder.mask_token_id if encoder is not None else read_meta(data).get("mask_token")
    if token is None:
        raise ValueError(
            f"the tokenizer of {data} has no mask token: prepare the data with one that has, such "
            "as BERT's"
        )
    return token


def longest_window(config: Any, window: int) -> None:
    """Refuses windows that are longer than a model's positions."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise ValueError(f"num_tokens is {window}; this model takes {longest} at most")
