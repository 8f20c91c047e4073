"""Compiled parts are measured as they were written, and compiled as before afterwards."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from faults import batch_of, made, network
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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


class Attention(nn.Module):
    """Of two heads, with a bias for each distance."""

    def __init__(self, attend):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3 * 4), nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 7))
        self.attend = attend

    def forward(self, x):
        q, k, v = self.inner(x).view(-1, 4, 6, 2).transpose(1, 2).chunk(3, 1)
        return self.last(self.attend(q, k, v, self.bias).transpose(1, 2).flatten(2)).mean(1)


def scores(score, batch, head, i, j, bias):
    return 2 * torch.tanh(score / 2) + bias[i - j + 3]


def flexed(q, k, v, bias, call=flex_attention):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 4, 4, device="cpu")
    modified = partial(scores, bias=bias)
    return call(q, k, v, score_mod=modified, block_mask=mask, scale=0.3, kernel_options={})


def written_out(q, k, v, bias):
    i, j = torch.arange(4)[:, None], torch.arange(4)
    weights = scores(0.3 * q @ k.mT, 0, 0, i, j, bias).masked_fill(i < j, -torch.inf)
    return weights.softmax(-1) @ v


def test_flex_attention_is_differentiated_twice():
    batch = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for attend in (
        written_out,
        flexed,
        partial(flexed, call=torch.compile(flex_attention, backend="eager")),
    ):
        model = made(lambda attend=attend: Attention(attend))
        objective = Objective(model, [(batch, torch.tensor([0, 2]))], losses.classification)
        (block,) = partition(model, "model")
        found.append(torch.from_numpy(dense(objective, block)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-14)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(batch)


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
