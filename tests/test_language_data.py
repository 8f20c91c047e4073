"""Token files: what is written is what a plain loop over the documents gives, however the work was
interrupted.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants

from language_models import data, embedded, tokenizer
from language_models.batches import (
    fixed_batches,
    masked_batch,
    pair_batches,
    random_windows,
    spread_windows,
)
from language_models.data import is_val, prepare
from language_models.documents import Documents
from language_models.tokenizer import load_tokenizer
from language_models.tokens import Tokens, largest_token, open_tokens, read_meta
from training.hub import hub_reachable

TEXTS = [
    f"Document number {i}: " + "naïve words, 中文, and code(); " * (1 + i % 5) for i in range(40)
]
ROOT = Path(__file__).parent.parent


def write_bin(path: Path, tokens) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array(tokens, dtype=np.uint16).tofile(path)
    return path.parent


def expected_tokens(texts: list[str], *, val_share: float) -> dict[str, list[int]]:
    """The plain loop: every ``1 / val_share``-th document from the second on is val, each ends in
    token 0.
    """
    found: dict[str, list[int]] = {"train": [], "val": []}
    every = round(1 / val_share)
    for number, text in enumerate(texts):
        split = "val" if number % every == 1 % every else "train"
        found[split] += [*embedded.tokenizer()(text)["input_ids"], 0]
    return found


def read_splits(folder: Path) -> dict[str, list[int]]:
    return {
        split: np.fromfile(folder / f"{split}.bin", dtype=np.uint16).tolist()
        for split in ("train", "val")
    }


def parquet(folder: Path) -> Path:
    pd.DataFrame({"text": TEXTS, "other": range(40)}).to_parquet(folder / "documents.parquet")
    return folder / "documents.parquet"


def json_lines(folder: Path) -> Path:
    pd.DataFrame({"text": TEXTS}).to_json(folder / "documents.jsonl", orient="records", lines=True)
    return folder / "documents.jsonl"


def csv(folder: Path) -> Path:
    pd.DataFrame({"text": TEXTS}).to_csv(folder / "documents.csv", index=False)
    return folder / "documents.csv"


def parquet_folder(folder: Path) -> Path:
    (folder / "shards").mkdir()
    for shard in range(4):
        frame = pd.DataFrame({"text": TEXTS[10 * shard : 10 * (shard + 1)]})
        frame.to_parquet(folder / f"shards/part-{shard}.parquet")
    return folder / "shards"


def text_folder(folder: Path) -> Path:
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"texts/{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder / "texts"


def saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    splits = {
        "train": datasets.Dataset.from_dict({"text": TEXTS}),
        "test": datasets.Dataset.from_dict({"text": ["no"]}),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


SOURCES = [parquet, json_lines, csv, parquet_folder, text_folder, saved, saved_splits]


@pytest.mark.parametrize("make", SOURCES)
def test_every_kind_of_source_gives_the_same_tokens(make, tmp_path):
    out = prepare(
        str(make(tmp_path)), out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.2
    )
    expected = expected_tokens(TEXTS, val_share=0.2)
    assert read_splits(out) == expected
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["vocabulary"], meta["end_token"], meta["mask_token"]) == (512, 0, 1)
    assert meta["splits"]["val"]["documents"] == 8
    for split, tokens in expected.items():
        assert meta["splits"][split]["tokens"] == len(tokens)
        assert (
            meta["splits"][split]["largest"] == max(tokens) == largest_token(out / f"{split}.bin")
        )
        digest = subprocess.run(
            ["sha256sum", out / f"{split}.bin"], capture_output=True, text=True, check=True
        ).stdout
        assert digest.split()[0] == meta["splits"][split]["sha256"]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_a_text_file_comes_in_pieces_of_whole_lines_and_nothing_is_lost(tmp_path):
    text = (
        "\n".join(f"line {i} of a text {'with more words ' * (i % 7)}" for i in range(400))
        + "\nlast, without end"
    )
    (tmp_path / "a.txt").write_text(text)
    documents = Documents(str(tmp_path / "a.txt"))
    pieces = list(documents)
    assert "".join(pieces) == text
    assert not documents.ends
    assert all(piece.endswith("\n") and 4000 <= len(piece) < 4200 for piece in pieces[:-1])
    out = prepare(str(tmp_path / "a.txt"), out=str(tmp_path / "out"), tokenizer="embedded")
    assert embedded.tokenizer().decode(read_splits(out)["val"]) == pieces[1]
    assert embedded.tokenizer().decode(read_splits(out)["train"]) == "".join(
        [pieces[0], *pieces[2:]]
    )


def test_embedded_text_is_a_source_too(tmp_path):
    out = prepare("embedded", out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.5)
    assert (
        read_splits(out)["val"][:100]
        == embedded.tokenizer()(embedded.topics()[1])["input_ids"][:100]
    )


@pytest.mark.parametrize("limit", [{"num_documents": 7}, {"num_tokens": 200}])
def test_limits(limit, tmp_path):
    out = prepare(
        str(parquet(tmp_path)),
        out=str(tmp_path / "out"),
        tokenizer="embedded",
        val_share=0.5,
        **limit,
    )
    lengths = [len(embedded.tokenizer()(text)["input_ids"]) + 1 for text in TEXTS]
    total = list(itertools.accumulate(lengths))
    kept = limit.get("num_documents") or next(i + 1 for i, sum_ in enumerate(total) if sum_ >= 200)
    assert read_splits(out) == expected_tokens(TEXTS[:kept], val_share=0.5)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.01, 0.0005])
def test_share_of_val(share):
    chosen = [number for number in range(20_000) if is_val(number, share)]
    assert chosen[0] == 1
    assert len(chosen) == round(20_000 * share)
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


class Killed(Exception):
    pass


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # datasets leaves a CSV file open
@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("stop", [1, 15, 37])
def test_interrupted_preparation_goes_on_where_it_stopped(make, stop, tmp_path, monkeypatch):
    source = str(make(tmp_path))
    monkeypatch.setattr(data, "BATCH", 3)
    monkeypatch.setattr(data, "STATE_SECONDS", 0.0)
    plain, encoded = data._encode, []

    def breaking(texts, *rest):
        if len(encoded) + len(texts) > stop:
            raise Killed
        encoded.extend(texts)
        yield from plain(texts, *rest)

    monkeypatch.setattr(data, "_encode", breaking)
    with pytest.raises(Killed):
        prepare(source, out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.2)
    assert not (tmp_path / "out").exists()
    with (tmp_path / "out.partial/train.bin").open("ab") as file:
        file.write(b"what a kill left of a write")
    again = []
    monkeypatch.setattr(
        data, "_encode", lambda texts, *rest: again.extend(texts) or plain(texts, *rest)
    )
    out = prepare(source, out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.2)
    assert encoded + again == TEXTS  # nothing twice
    assert read_splits(out) == expected_tokens(TEXTS, val_share=0.2)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_killed_preparation_goes_on(tmp_path):
    program = f"""
        import os, signal
        from language_models import data
        data.BATCH, data.STATE_SECONDS = 1, 0.0
        plain, count = data._encode, iter(range(40))
        def killing(texts, *rest):
            if next(count) == 17:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(texts, *rest)
        data._encode = killing
        data.prepare({str(parquet(tmp_path))!r}, out={str(tmp_path / "out")!r}, tokenizer="embedded", val_share=0.2)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (
        json.loads((tmp_path / "out.partial/state.json").read_text())["counts"]["train"][
            "documents"
        ]
        == 14 - 1
    )
    out = prepare(
        str(tmp_path / "documents.parquet"),
        out=str(tmp_path / "out"),
        tokenizer="embedded",
        val_share=0.2,
    )
    assert read_splits(out) == expected_tokens(TEXTS, val_share=0.2)


def test_other_settings_do_not_go_on(tmp_path, monkeypatch):
    source = str(parquet(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(data, "_encode", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(source, out=str(tmp_path / "out"), tokenizer="embedded")
    with pytest.raises(ValueError, match=r"made with other settings \(val_share: 0.01 -> 0.5\)"):
        prepare(source, out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.5)


def test_complete_data_are_left_alone(tmp_path, monkeypatch):
    source = str(parquet(tmp_path))
    out = prepare(source, out=str(tmp_path / "out"), tokenizer="embedded")
    monkeypatch.setattr(data, "load_tokenizer", None)  # nothing is loaded, nor fetched
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    assert prepare(source, out=str(tmp_path / "out"), tokenizer="embedded") == out
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before
    with pytest.raises(ValueError, match=r"made with other settings \(num_documents: None -> 3\)"):
        prepare(source, out=str(tmp_path / "out"), tokenizer="embedded", num_documents=3)


def test_killed_while_finishing(tmp_path, monkeypatch):
    """Everything is tokenized and hours are not to be lost."""
    source = str(parquet(tmp_path))
    finish = data._finish

    def finish_and_die(*arguments):
        finish(*arguments)
        raise Killed

    monkeypatch.setattr(data, "_finish", finish_and_die)
    with pytest.raises(Killed):
        prepare(source, out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.2)
    monkeypatch.setattr(data, "_finish", finish)
    monkeypatch.setattr(data, "_encode", None)
    out = prepare(source, out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.2)
    assert read_splits(out) == expected_tokens(TEXTS, val_share=0.2)
    assert sorted(path.name for path in out.iterdir()) == [
        "meta.json",
        "tokenizer",
        "train.bin",
        "val.bin",
    ]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("./absent", {}, FileNotFoundError, "does not exist"),
        ("absent.txt", {}, FileNotFoundError, "does not exist"),
        ("{tmp}", {}, ValueError, r"files of one kind .* it has none"),
        ("{parquet}", {"field": "body"}, ValueError, r"no column 'body'; it has text, other"),
        ("{saved_splits}", {"split": "dev"}, ValueError, r"no split 'dev'; it has train, test"),
        ("{parquet}", {"val_share": 0.0}, ValueError, r"val_share is 0.0"),
        ("{parquet}", {"num_documents": 1}, ValueError, r"leaves val.bin empty"),
        ("{parquet}", {"num_documents": 0}, ValueError, r"num_documents is 0"),
    ],
)
def test_wrong_sources(source, options, error, message, tmp_path):
    made = {
        make.__name__: make(tmp_path)
        for make in (parquet, saved_splits)
        if f"{{{make.__name__}}}" in source
    }
    with pytest.raises(error, match=message):
        prepare(
            source.format(tmp=tmp_path, **made),
            out=str(tmp_path / "out"),
            tokenizer="embedded",
            **options,
        )


def test_mixed_folders_are_refused(tmp_path):
    json_lines(tmp_path), csv(tmp_path)
    with pytest.raises(ValueError, match="it has 1 csv, 1 json"):
        Documents(str(tmp_path))


def test_tokenizer_from_a_folder_and_too_large_ones(tmp_path, monkeypatch):
    embedded.tokenizer().save_pretrained(tmp_path / "own")
    assert (
        load_tokenizer(str(tmp_path / "own"))(TEXTS[0])["input_ids"]
        == embedded.tokenizer()(TEXTS[0])["input_ids"]
    )
    monkeypatch.setattr(tokenizer, "LARGEST", 510)
    with pytest.raises(ValueError, match=r"has 512 tokens; token files are uint16: 511 at most"):
        load_tokenizer(str(tmp_path / "own"))


@pytest.fixture
def unreachable(monkeypatch):
    """A hub that refuses connections, on any machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "call",
    [
        lambda: Documents("openwebtext"),
        lambda: Documents("no/such-set"),
        lambda: load_tokenizer("nobody/absent"),
    ],
)
def test_without_a_network_names_fail_within_seconds(call, unreachable):
    start = time.monotonic()
    with pytest.raises(
        OSError, match=r"cannot be reached and this machine has no copy: give a local"
    ) as error:
        call()
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)
    assert not constants.HF_HUB_OFFLINE
    assert not hub_reachable()


def test_odd_length(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\0" * 201)
    with pytest.raises(ValueError, match="201 bytes, an odd number"):
        open_tokens(str(tmp_path), "train", window=4)


def test_tokens_outside_the_vocabulary(tmp_path):
    write_bin(tmp_path / "train.bin", [1, 2, 300, 3])
    assert open_tokens(str(tmp_path), "train", window=4, vocabulary=301).length == 4
    with pytest.raises(ValueError, match="token 300, the vocabulary ends at 299"):
        open_tokens(str(tmp_path), "train", window=4, vocabulary=300)
    write_bin(tmp_path / "val.bin", [50256, 50257])
    with pytest.raises(
        ValueError, match="token 50257, the vocabulary ends at 50256"
    ):  # GPT-2's, where nothing is stated
        open_tokens(str(tmp_path), "val", window=2)


@pytest.mark.parametrize(("length", "window"), [(0, 2), (7, 8)])
def test_too_short(length, window, tmp_path):
    write_bin(tmp_path / "train.bin", range(length))
    with pytest.raises(ValueError, match=f"has {length} tokens, one window needs {window}"):
        open_tokens(str(tmp_path), "train", window=window)


def test_missing_file_and_wrong_split(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"prepare it with 'python -m language_models.data'"
    ):
        open_tokens(str(tmp_path), "train", window=4)
    with pytest.raises(ValueError, match="choose train or val"):
        open_tokens("embedded", "test", window=4)


def test_files_changed_after_the_preparation_are_checked_anew(tmp_path):
    out = prepare(
        str(parquet(tmp_path)), out=str(tmp_path / "out"), tokenizer="embedded", val_share=0.5
    )
    assert open_tokens(str(out), "train", window=8).vocabulary == 512
    whole = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(whole[:-2] + b"\xff\xff")
    with pytest.raises(ValueError, match="token 65535"):
        open_tokens(str(out), "train", window=8)
    (out / "train.bin").write_bytes(whole[:-4])
    os.utime(out / "train.bin", (0, 0))
    with pytest.raises(ValueError, match=r"meta.json says \d+ tokens: it is cut short"):
        open_tokens(str(out), "train", window=8)


def test_windows_of_a_nanogpt_file(tmp_path):
    row = np.random.default_rng(0).permutation(1000)
    folder = write_bin(tmp_path / "owt/train.bin", row)
    tokens = open_tokens(str(folder), "train", window=16)
    windows = random_windows(tokens, 3, batch_size=400, window=16, seed=5)
    places = [int(np.flatnonzero(row[:-15] == window[0])[0]) for window in windows]
    assert all(
        (row[place : place + 16] == window).all()
        for place, window in zip(places, windows, strict=True)
    )
    assert min(places) < 20
    assert max(places) > 965
    assert (windows == random_windows(tokens, 3, batch_size=400, window=16, seed=5)).all()
    assert not (windows == random_windows(tokens, 4, batch_size=400, window=16, seed=5)).all()
    assert not (windows == random_windows(tokens, 3, batch_size=400, window=16, seed=6)).all()


def test_fixed_windows_span_the_row():
    row = np.arange(1000)
    tokens = Tokens("row", row, 1000, 1000)
    windows = np.concatenate(spread_windows(tokens, num_batches=2, batch_size=3, window=10))
    assert windows[:, 0].tolist() == [0, 198, 396, 594, 792, 990]
    with pytest.raises(ValueError, match="num_batches is 0"):
        spread_windows(tokens, num_batches=0, batch_size=3, window=10)
    x, y = pair_batches(tokens, num_batches=1, batch_size=2, window=10)[0]
    assert (x + 1 == y).all()
    assert x.shape == y.shape == (2, 10)


def test_masks_are_those_of_bert():
    windows = np.random.default_rng(0).integers(2, 512, (200, 100))
    batch = masked_batch(windows, 0, mask=1, vocabulary=512, seed=0)
    inputs, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    chosen = labels != -100
    assert (labels[chosen] == windows[chosen]).all()
    assert (inputs[~chosen] == windows[~chosen]).all()
    assert abs(chosen.mean() - 0.15) < 0.01
    assert abs((inputs[chosen] == 1).mean() - 0.8) < 0.03
    assert abs((inputs[chosen] == windows[chosen]).mean() - 0.1) < 0.03
    again = masked_batch(windows, 0, mask=1, vocabulary=512, seed=0)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert not torch.equal(
        masked_batch(windows, 1, mask=1, vocabulary=512, seed=0)["labels"], batch["labels"]
    )
    one = masked_batch(windows[:1, :2], 3, mask=1, vocabulary=512, seed=0)
    assert (one["labels"] != -100).any()


def test_embedded_text():
    own = embedded.tokenizer()
    train, val = (embedded.token_ids(split, own) for split in ("train", "val"))
    assert 18_000 < len(val) < len(train) / 8
    assert (
        max(train.max(), val.max())
        < len(own)
        == embedded.VOCABULARY
        == read_meta("embedded")["vocabulary"]
    )
    parts = [own.decode(row).split(embedded.END)[:-1] for row in (train, val)]
    assert ["".join(both) for both in zip(*parts, strict=True)] == embedded.topics()
    code = "from language_models import embedded; print(embedded.tokenizer().backend_tokenizer.to_str())"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == own.backend_tokenizer.to_str()


def test_fixed_batches_are_numbered():
    tokens = open_tokens("embedded", "val", window=8)
    seen = []
    fixed_batches(
        tokens,
        lambda windows, index: seen.append(index) or {},
        num_batches=3,
        batch_size=2,
        window=8,
    )
    assert seen == [0, 1, 2]


@pytest.mark.slow
def test_a_large_file_costs_no_more_memory_than_a_batch(tmp_path):
    """In a process of its own, whose peak nothing else has raised."""
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(1 << 30)
    program = f"""
        import resource
        from language_models.batches import random_windows
        from language_models.tokens import open_tokens
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        tokens = open_tokens({str(tmp_path)!r}, "train", window=1024)
        for index in range(100):
            random_windows(tokens, index, batch_size=32, window=1024, seed=0)
        print(tokens.length, peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    length, growth = map(int, done.stdout.split())
    assert length == 1 << 29
    assert growth < 12_000, (
        f"{growth} KiB"
    )  # the chunk of the check, 2 MiB, and a batch with the pages around its windows
