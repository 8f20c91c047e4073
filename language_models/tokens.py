"""Rows of tokens: nanoGPT's ``.bin`` files (uint16, no header), read a window at a time, and the embedded text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from language_models import embedded

DTYPE = np.dtype("<u2")
META = "meta.json"
GPT2_VOCABULARY = 50257
CHUNK = 8 << 20  # tokens of a file that are in memory at once while it is checked


@dataclass(frozen=True)
class Tokens:
    """A row of tokens.

    name: what the user called it.
    source: the ``.bin`` file, or the tokens themselves, uint16.
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
        row = self.source if isinstance(self.source, np.ndarray) else np.memmap(self.source, dtype=DTYPE, mode="r")
        return np.stack([row[start : start + size] for start in starts]).astype(np.int64)


def read_meta(folder: Path) -> dict:
    """What the preparation wrote beside the ``.bin`` files; nothing for nanoGPT's own."""
    path = folder / META
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def largest_token(path: Path) -> int:
    """Reads the whole file, a chunk at a time."""
    largest = 0
    with path.open("rb") as file:
        while (chunk := np.fromfile(file, dtype=DTYPE, count=CHUNK)).size:
            largest = max(largest, int(chunk.max()))
    return largest


def check_bin(path: Path, *, vocabulary: int, window: int) -> int:
    """The number of tokens in a ``.bin`` file; ValueError says why it cannot be used."""
    size = path.stat().st_size
    if size % DTYPE.itemsize:
        raise ValueError(f"{path} has {size} bytes, an odd number: tokens are uint16, so it is cut short or no token file")
    length = size // DTYPE.itemsize
    if length < window:
        raise ValueError(f"{path} has {length} tokens, one window needs {window}: prepare more text or shorten the window")
    largest = largest_token(path)
    if largest >= vocabulary:
        raise ValueError(
            f"{path} has token {largest}, the vocabulary ends at {vocabulary - 1}: it was made by another tokenizer"
        )
    return length


def open_tokens(data: str, split: str, *, window: int, vocabulary: int | None = None) -> Tokens:
    """Opens and checks one split of ``embedded`` or of a folder with ``train.bin`` and ``val.bin``.

    Args:
        data: ``embedded`` or a folder.
        split: ``train`` or ``val``.
        window: Tokens that one window takes; the split must hold one at least.
        vocabulary: Size of the vocabulary; None takes the one that ``meta.json`` states, or else GPT-2's.
    """
    if data == "embedded":
        row = embedded.token_ids(split)
        if len(row) < window:
            raise ValueError(f"the embedded text has {len(row)} tokens in {split}, one window needs {window}")
        return Tokens(f"embedded/{split}", row, len(row), vocabulary or embedded.VOCABULARY)
    path = Path(data) / f"{split}.bin"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: prepare it with 'python -m language_models.data', or give 'embedded' or a folder "
            "with train.bin and val.bin"
        )
    vocabulary = vocabulary or read_meta(path.parent).get("vocabulary", GPT2_VOCABULARY)
    return Tokens(str(path), path, check_bin(path, vocabulary=vocabulary, window=window), vocabulary)
