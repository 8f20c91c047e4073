"""Compiled parts are measured as they were written, and compiled as before afterwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from faults import batch_of, made, network
from torch import nn

from blockspec import Objective, dense, losses, partition
from blockspec.model.compiled import uncompiled
from blockspec.optim import AdaHessian

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
RAN = []


class Gate(nn.Linear):
    """The compiler leaves out modules that are PyTorch's own."""

    def __init__(self):
        super().__init__(6, 6)

    def forward(self, x):
        return x * super().forward(x).sigmoid()


def backend(graph, inputs):
    def run(*arguments):
        RAN.append(graph)
        return graph(*arguments)

    return run


def layer_compiled(model):
    model[2] = torch.compile(model[2], backend=backend)


def layer_compiled_in_place(model):
    model[2].compile(backend=backend)


def forward_compiled(model):
    model[2].forward = torch.compile(model[2].forward, backend=backend)


def model_compiled_in_place(model):
    model.compile(backend=backend)


def nothing_compiled(model):
    pass


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def matrix(model, loss):
    (block,) = partition(model, "model")
    return torch.from_numpy(dense(Objective(model, [batch_of()], loss), block))


WAYS = (
    layer_compiled,
    layer_compiled_in_place,
    forward_compiled,
    model_compiled_in_place,
    nothing_compiled,
)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_is_measured_as_it_was_written(way):
    loss = losses.classification
    if way is nothing_compiled:
        loss = torch.compile(entropy, backend=backend)
    model = made(lambda: network(Gate()))
    twin = copy.deepcopy(model)
    way(model)
    RAN.clear()
    found = matrix(model, loss)
    assert not RAN
    torch.testing.assert_close(found, matrix(twin, entropy), rtol=1e-12, atol=1e-14)
    loss(model, batch_of())
    assert RAN


def test_adahessian_measures_a_compiled_model_within_second_order():
    weights = []
    for compiled in (False, True):
        model = made(network)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = AdaHessian(model.named_parameters())
        with optimizer.second_order(called):
            optimizer.backward(entropy(called, batch_of())[0])
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)


def test_a_stance_of_the_user_is_put_back():
    square = torch.compile(torch.square, backend=backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        with uncompiled():
            assert square(torch.tensor(3.0)) == 9
        with pytest.raises(RuntimeError, match="stance"):
            square(torch.ones(2, 5))
