"""Tokens and classes beyond a model's tables, and streams without an end, are told with batch,
value and bound.
"""

import itertools

import pytest
import torch
from models import tiny_gpt2
from torch.utils.data import DataLoader, IterableDataset

from blockspec import Objective, losses


def batches(count=3):
    return [{"input_ids": torch.arange(6)[None] + i} for i in range(count)]


def test_a_token_out_of_range_is_told_with_its_batch():
    model, data = tiny_gpt2(layers=1, n_embd=8, n_head=2, vocab_size=13), batches()
    data[2]["input_ids"][0, 3] = 99
    with pytest.raises(ValueError, match=r"batch 2 holds 99 in 'input_ids'.* allows 0 to 12"):
        Objective(model, data, losses.next_token).value()


def test_a_label_out_of_range_is_told_with_its_batch():
    model = torch.nn.Linear(3, 4)
    data = [(torch.ones(2, 3), torch.tensor([0, label])) for label in (1, 4)]
    with pytest.raises(ValueError, match=r"batch 1 holds 4 in '1'.* allow 0 to 3"):
        Objective(model, data, losses.classification).value()


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.ones(2))


class Unsized:
    """Can be iterated again and again, and has no length."""

    def __iter__(self):
        return itertools.repeat(torch.ones(2))


@pytest.mark.parametrize("form", ["iterator", "iterable", "loader"])
def test_streams_without_an_end_are_found(form, monkeypatch):
    monkeypatch.setattr("blockspec.model.ranges.MOST_BATCHES", 20)
    stream = {
        "iterator": lambda: iter(Endless()),
        "iterable": lambda: Unsized(),
        "loader": lambda: DataLoader(Endless(), batch_size=2),
    }[form]()
    with pytest.raises(ValueError, match=r"(not ended after 20 batches|reads a stream).*islice"):
        Objective(torch.nn.Linear(2, 1), stream, losses.regression).check()
