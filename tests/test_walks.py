"""A preparation walks over the modules of a model once."""

import pytest
import torch
from problems import PROBLEMS
from torch import nn

from blockspec import Objective, losses
from blockspec.model.walks import modules_of, walked


def walks(monkeypatch, model):
    """A list that grows with every walk over the modules of a model."""
    found, walk = [], nn.Module.modules

    def modules(self, *given, **named):
        if self is model:
            found.append(self)
        return walk(self, *given, **named)

    monkeypatch.setattr(nn.Module, "modules", modules)
    return found


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_a_preparation_walks_once(name, monkeypatch):
    it = PROBLEMS[name]()
    objective = it.objective()
    found = walks(monkeypatch, it.model)
    with objective.prepared():
        assert len(found) == 1
    with objective.prepared():
        pass
    assert len(found) == 2


def test_modules_are_those_of_the_innermost_walk():
    model = nn.Sequential(nn.Linear(2, 2))
    assert list(modules_of(model)) == list(model.modules())
    with walked(model):
        model.append(nn.Tanh())
        assert len(modules_of(model)) == 2
        with walked(model):
            assert len(modules_of(model)) == 3
        assert modules_of(model[0]) == (model[0],)
    assert list(modules_of(model)) == list(model.modules())


def test_training_flags_come_back_whatever_a_loss_does_with_them():
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.0)).double()
    model[1].eval()

    def loss(model, batch):
        model[1].train()
        return losses.classification(model, batch)

    batch = (torch.ones(2, 2, dtype=torch.float64), torch.tensor([0, 1]))
    Objective(model, [batch], loss).value()
    assert [module.training for module in model.modules()] == [True, True, False]
