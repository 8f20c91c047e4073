"""Documents of any source, one by one: a hub data set, local files, a saved data set, the embedded
text.

All go through ``datasets`` as a stream, whose position can be stored and found again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets

from language_models import embedded
from training.hub import hub_or_cache

HUB_NAMES = {"openwebtext": "Skylion007/openwebtext"}  # shorter names of ours
READERS = {  # ending of a file: the reader of ``datasets``
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a folder
PIECE = 4_000  # characters of a single text file that count as one document: some 1,000 tokens


class Documents:
    """An iterator of texts that knows its position.

    Args:
        source: ``embedded``, ``openwebtext``, a file, a folder, or the name of a data set on the
            hub.
        subset: Which configuration of a hub data set; None where it has one only.
        split: Which split of it.
        field: The column that holds the text.

    ``ends`` tells whether a document ends after each text. A single text file is one document: it
    comes in pieces of whole lines, so that a large one needs no memory and both splits get some of
    it.
    """

    def __init__(
        self, source: str, *, subset: str | None = None, split: str = "train", field: str = "text"
    ) -> None:
        self.field = field
        self.ends = not _is_single_text(source)
        self.stream = _open(source, subset, split)
        columns = self.stream.column_names
        if columns is not None and field not in columns:
            raise ValueError(f"{source} has no column {field!r}; it has {', '.join(columns)}")

    def __iter__(self) -> Iterator[str]:
        texts = (row[self.field] for row in self.stream)
        yield from texts if self.ends else _pieces(texts)

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.stream.load_state_dict(state)


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= PIECE:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def _is_single_text(source: str) -> bool:
    return READERS.get(Path(source).suffix) == "text" and Path(source).is_file()


def _open(source: str, subset: str | None, split: str) -> datasets.IterableDataset:
    path = Path(source)
    if source == "embedded":
        return datasets.Dataset.from_dict({"text": embedded.topics()}).to_iterable_dataset()
    if path.is_file():
        return _read([path], sample_by="line")
    if path.is_dir():
        is_saved = any((path / name).is_file() for name in SAVED)
        return _saved(path, split) if is_saved else _read(_files(path), sample_by="document")
    if path.is_absolute() or source.startswith(".") or path.suffix in READERS:
        raise FileNotFoundError(f"{source} does not exist")
    return _from_hub(HUB_NAMES.get(source, source), subset, split)


def _read(files: list[Path], *, sample_by: str) -> datasets.IterableDataset:
    reader = READERS.get(files[0].suffix)
    if reader is None:
        raise ValueError(
            f"{files[0]} ends in {files[0].suffix or 'nothing'}; files end in one of "
            f"{', '.join(READERS)}"
        )
    options = {"sample_by": sample_by, "keep_linebreaks": True} if reader == "text" else {}
    names = [str(file) for file in files]
    return datasets.load_dataset(reader, data_files=names, split="train", streaming=True, **options)


def _files(folder: Path) -> list[Path]:
    """The files of the kind that the folder has; two kinds are refused, for one would be left out
    in silence.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in READERS)
    kinds = Counter(READERS[path.suffix] for path in files)
    if len(kinds) != 1:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        raise ValueError(
            f"{folder} must hold files of one kind out of {', '.join(READERS)}; it has {found}"
        )
    return files


def _saved(folder: Path, split: str) -> datasets.IterableDataset:
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset()


def _from_hub(name: str, subset: str | None, split: str) -> datasets.IterableDataset:
    with hub_or_cache():
        try:
            return datasets.load_dataset(name, subset, split=split, streaming=True)
        except RuntimeError as error:  # data sets that consist of a script
            raise ValueError(
                f"{name}: {error}; give a data set of parquet, JSON, CSV or text files"
            ) from error
