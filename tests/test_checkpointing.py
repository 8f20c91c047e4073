"""Activation checkpointing of the reentrant kind hides parameters from autograd.grad: it is
switched off, or found.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as checkpoints

import blockspec
from blockspec import Objective, losses, partition
from blockspec.optim import AdaHessian


class Checkpointed(nn.Module):
    """Two layers, the first of which is always checkpointed, whatever the mode."""

    def __init__(self, *, checkpointed=True, inputs_need_gradients=False, reentrant=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.checkpointed, self.inputs_need_gradients = checkpointed, inputs_need_gradients
        self.reentrant = reentrant

    def forward(self, x):
        if self.inputs_need_gradients:  # as transformers' enable_input_require_grads
            x = x.detach().requires_grad_()
        layer = lambda x: self.first(x).tanh()  # noqa: E731
        if self.checkpointed:
            return self.second(checkpoints.checkpoint(layer, x, use_reentrant=self.reentrant))
        return self.second(layer(x))


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCH = (X, torch.tensor([0, 1, 1, 0, 1]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inputs_need_gradients", [False, True])
def test_the_objective_sees_the_parameters_inside(inputs_need_gradients, reentrant):
    model = Checkpointed(inputs_need_gradients=inputs_need_gradients, reentrant=reentrant)
    objective, plain = (
        Objective(m, [BATCH], losses.classification)
        for m in (model, Checkpointed(checkpointed=False))
    )
    torch.testing.assert_close(objective.gradient(), plain.gradient(), rtol=1e-14, atol=0)
    matrices = [
        blockspec.dense(o, partition(o.model, include="first.weight")[0])
        for o in (objective, plain)
    ]
    assert matrices[0].any()
    torch.testing.assert_close(*map(torch.as_tensor, matrices), rtol=1e-14, atol=0)
    assert checkpoints.CheckpointFunction.__module__ == "torch.utils.checkpoint"


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("way", ["backward", "probe", "create_graph"])
def test_adahessian_sees_them_within_second_order(way):
    trained = []
    for checkpointed in (False, True):
        model = Checkpointed(checkpointed=checkpointed, inputs_need_gradients=True)
        optimizer = AdaHessian(model.named_parameters(), lr=0.1)
        for _ in range(3):
            with optimizer.second_order(model):
                total, _ = losses.classification(model, BATCH)
                if way == "create_graph":
                    total.backward(create_graph=True)
                elif way == "backward":
                    optimizer.backward(total)
                else:
                    optimizer.probe(total).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-12, atol=1e-14)


def test_adahessian_says_so_without():
    model = Checkpointed(inputs_need_gradients=True)
    optimizer = AdaHessian(model.named_parameters(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"use_reentrant=False.*optimizer\.second_order\(model\)"
    ):
        optimizer.backward(losses.classification(model, BATCH)[0])


class CheckpointFunction(torch.autograd.Function):
    """Another library's, in short."""

    @staticmethod
    def forward(ctx, layer, x):
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient.sum(1, keepdim=True).expand(-1, 3)


def test_that_of_another_library_is_found():
    model = Checkpointed(inputs_need_gradients=True)
    model.forward = lambda x: model.second(
        CheckpointFunction.apply(model.first, x.requires_grad_())
    )
    with pytest.raises(ValueError, match=r"CheckpointFunctionBackward.*hides the parameters"):
        blockspec.estimate_spectra(
            Objective(model, [BATCH], losses.classification), partition(model), 1, 2
        )
