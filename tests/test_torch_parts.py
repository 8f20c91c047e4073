"""Parts of torch without a public name: where they are gone, the numbers stay."""

import types

import pytest
import torch
from models import tiny_gpt2

from blockspec import Objective, losses, partition
from blockspec.model import torch_parts
from blockspec.products.curvature import Products


def test_this_torch_has_all_of_them():
    assert set(torch_parts.found()) == set(torch_parts.PARTS)


def test_one_warning_says_what_is_lost():
    torch_without = types.SimpleNamespace(Tensor=torch.Tensor, _C=types.SimpleNamespace())
    with pytest.warns(UserWarning, match="The numbers stay the same") as warned:
        parts = torch_parts.found(torch_without)
    assert len(warned) == 1
    text = str(warned[0].message)
    assert "torch._C._will_engine_execute_node (products" in text
    assert "wrapper" not in text
    assert parts["will_execute"](None)
    assert not parts["transforms_active"]()
    assert parts["wrapper"] == torch.Tensor._make_wrapper_subclass


def test_products_without_them(monkeypatch):
    model = tiny_gpt2(layers=1)
    batch = {"input_ids": torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))}
    objective = Objective(model, [batch], losses.next_token)
    requests = [
        (block, torch.linspace(-1, 1, block.numel, dtype=torch.float64))
        for block in partition(model, "tensor")[:3]
    ]
    expected = Products(objective).sweep(requests)
    for name, (_, stand_in, _) in torch_parts.PARTS.items():
        monkeypatch.setattr(torch_parts, name, stand_in)
        torch.testing.assert_close(Products(objective).sweep(requests), expected)
