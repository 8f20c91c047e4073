"""Turns documents into token files: ``python -m language_models.data openwebtext --out
data/openwebtext``.

Writes nanoGPT's format: ``train.bin`` and ``val.bin``, tokens as uint16 in one row, and beside them
``meta.json`` and the tokenizer. Until it is done, everything is in ``<out>.partial``, and the same
command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from language_models.documents import PIECE, Documents
from language_models.tokenizer import end_token, load_tokenizer
from language_models.tokens import DTYPE, META, read_meta
from training.checkpoints import write_json
from training.command import run_command
from training.state import differences

SPLITS = ("train", "val")
STATE = "state.json"
BATCH = 500  # documents that are tokenized at once, in parallel by fast tokenizers
STATE_SECONDS = 10.0  # at most so much work is lost


@dataclass
class Count:
    """What one split has got so far."""

    documents: int = 0
    tokens: int = 0
    largest: int = 0  # the largest token


@dataclass
class State:
    """How far the preparation is: written every few seconds, between documents."""

    settings: dict[str, Any]
    counts: dict[str, Count] = field(default_factory=lambda: {split: Count() for split in SPLITS})
    position: dict[str, Any] | None = None  # of the documents

    @property
    def documents(self) -> int:
        return sum(count.documents for count in self.counts.values())

    @property
    def tokens(self) -> int:
        return sum(count.tokens for count in self.counts.values())

    def write(self, folder: Path) -> None:
        write_json(folder / STATE, dataclasses.asdict(self))


def prepare(
    source: str,
    *,
    out: str | None = None,
    subset: str | None = None,
    split: str = "train",
    field: str = "text",
    tokenizer: str = "openai-community/gpt2",
    num_documents: int | None = None,
    num_tokens: int | None = None,
    val_share: float = 0.01,
) -> Path:
    """Tokenizes documents into train.bin and val.bin.

    Args:
        source: openwebtext; embedded; a .txt, .md, .parquet, .json, .jsonl or .csv file; a folder
            of such files or one that save_to_disk wrote; or the name of a data set on the Hugging
            Face hub.
        out: Folder to write; None takes data/ and the source's name.
        subset: Configuration of a hub data set, where it has several.
        split: Split of a hub or saved data set.
        field: Column that holds the text.
        tokenizer: Hub name or folder of a tokenizer, or embedded.
        num_documents: Stop after this many documents.
        num_tokens: Stop at the document that reaches this many tokens.
        val_share: Share of the documents that go to val.bin, spread evenly; the second document is
            the first of them. nanoGPT's OpenWebText has 0.0005.

    Returns:
        The folder.
    """
    folder = Path(out or f"data/{Path(source).stem}")
    settings = {
        "source": str(Path(source).resolve()) if Path(source).exists() else source,
        "subset": subset,
        "split": split,
        "field": field,
        "tokenizer": tokenizer,
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "val_share": val_share,
    }
    if (folder / META).is_file():
        _refuse_others(folder, read_meta(str(folder)), settings)
        return folder
    _check_limits(num_documents, num_tokens, val_share)
    encoder = load_tokenizer(tokenizer)
    documents = Documents(source, subset=subset, split=split, field=field)
    partial = folder.with_name(folder.name + ".partial")
    state = _resume(partial, settings)
    if state.position is not None:
        documents.load_state_dict(state.position)
    _tokenize(documents, encoder, partial, state)
    _finish(partial, state, encoder)
    partial.rename(folder)
    (folder / STATE).unlink()
    return folder


def _check_limits(num_documents: int | None, num_tokens: int | None, val_share: float) -> None:
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share}; it must lie between 0 and 1")
    if any(limit is not None and limit < 1 for limit in (num_documents, num_tokens)):
        raise ValueError(
            f"num_documents is {num_documents}, num_tokens {num_tokens}; they must be at least 1, "
            "or left out"
        )


def _refuse_others(folder: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    changed = differences({name: stored.get(name) for name in settings}, dict(settings))
    if changed:
        raise ValueError(
            f"{folder} was made with other settings ({'; '.join(changed)}): delete it or choose "
            "another --out"
        )


def is_val(number: int, val_share: float) -> bool:
    """Whether document ``number`` (from 0) goes to val: 1, then one in ``1 / val_share``."""
    return number > 0 and (
        number == 1 or int((number - 1) * val_share) > int((number - 2) * val_share)
    )


def _resume(partial: Path, settings: dict[str, Any]) -> State:
    path = partial / STATE
    if not path.is_file():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for split in SPLITS:
            (partial / f"{split}.bin").touch()
        state = State(settings)
        state.write(partial)
        return state
    stored = json.loads(path.read_text(encoding="utf-8"))
    _refuse_others(partial, stored["settings"], settings)
    counts = {split: Count(**count) for split, count in stored["counts"].items()}
    return State(settings, counts, stored["position"])


def _wanted(state: State) -> bool:
    documents, tokens = state.settings["num_documents"], state.settings["num_tokens"]
    return (documents is None or state.documents < documents) and (
        tokens is None or state.tokens < tokens
    )


def _encode(
    texts: list[str], documents: Documents, encoder: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    end = [end_token(encoder)] if documents.ends else []
    for row in encoder(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        yield np.array(row + end, dtype=DTYPE)


def _tokenize(
    documents: Documents, encoder: PreTrainedTokenizerBase, partial: Path, state: State
) -> None:
    """Appends to both files until the documents or what is wanted of them are at an end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with (
        (partial / "train.bin").open("r+b") as train,
        (partial / "val.bin").open("r+b") as val,
        Progress(*columns) as bar,
    ):
        files = {"train": train, "val": val}
        for name, file in files.items():  # what was written after the last state is written again
            file.truncate(state.counts[name].tokens * DTYPE.itemsize)
            file.seek(0, 2)
        task = bar.add_task(
            "tokens", total=state.settings["num_tokens"] or state.settings["num_documents"]
        )
        texts, written = iter(documents), time.monotonic()
        while _wanted(state) and (batch := list(itertools.islice(texts, _batch_size(state)))):
            _append(batch, documents, encoder, files, state)
            if time.monotonic() - written > STATE_SECONDS:
                _store(documents, files, partial, state)
                written = time.monotonic()
            done = state.tokens if state.settings["num_tokens"] else state.documents
            bar.update(
                task,
                completed=done,
                description=f"{state.documents:,} documents, {state.tokens:,} tokens",
            )
        _store(documents, files, partial, state)


def _batch_size(state: State) -> int:
    wanted = state.settings["num_documents"]
    return BATCH if wanted is None else min(BATCH, wanted - state.documents)


def _append(
    texts: list[str],
    documents: Documents,
    encoder: PreTrainedTokenizerBase,
    files: Mapping[str, BinaryIO],
    state: State,
) -> None:
    for row in _encode(texts, documents, encoder):
        if not _wanted(state):
            return
        split = "val" if is_val(state.documents, state.settings["val_share"]) else "train"
        files[split].write(row.tobytes())
        count = state.counts[split]
        count.documents += 1
        count.tokens += len(row)
        count.largest = max(count.largest, int(row.max(initial=0)))


def _store(
    documents: Documents, files: Mapping[str, BinaryIO], partial: Path, state: State
) -> None:
    for file in files.values():
        file.flush()
    state.position = documents.state_dict()
    state.write(partial)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(partial: Path, state: State, encoder: PreTrainedTokenizerBase) -> None:
    """Adds what tells the reader what the files hold."""
    for split, count in state.counts.items():
        if not count.tokens:
            raise ValueError(
                f"{state.settings['source']} has {state.documents} documents and leaves "
                f"{split}.bin empty; "
                f"there must be two at least (a text file counts one per {PIECE:,} characters)"
            )
    encoder.save_pretrained(partial / "tokenizer")
    splits = {
        split: {**dataclasses.asdict(count), "sha256": checksum(partial / f"{split}.bin")}
        for split, count in state.counts.items()
    }
    meta = {
        **state.settings,
        "vocabulary": len(encoder),
        "end_token": end_token(encoder),
        "mask_token": encoder.mask_token_id,
        "splits": splits,
        "datasets": datasets.__version__,
    }
    write_json(partial / META, meta)


if __name__ == "__main__":
    run_command(prepare)
