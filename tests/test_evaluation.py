"""Evaluations leave a model as they find it, and the value is that of the function
differentiated.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import tiny_llama
from torch import nn

from blockspec import Objective, landscape, losses, partition
from blockspec.model.evaluation import SMALL, evaluation
from blockspec.products.curvature import Products


class Counting(nn.Module):
    """Writes to buffers of every kind whenever it is called."""

    def __init__(self, big=SMALL + 1):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("silent", torch.zeros(2))
        self.register_buffer("last", torch.full((big,), torch.nan))
        self.register_buffer("replaced", torch.ones(1))
        self.register_buffer("undefined", torch.tensor([torch.nan, 1.0]))
        self.length = 0

    def forward(self, x):
        self.calls += 1
        self.silent.data.add_(1)
        self.last.fill_(x.detach().mean())
        self.replaced = self.replaced + 1
        self.length = len(x)
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(3))
        return self.linear(x * self.cache)


def state(model):
    tensors = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    return tensors, model.length, len(model.state_dict())


def test_buffers_of_every_kind_are_left_as_found():
    torch.manual_seed(0)
    model = Counting().double()
    batch = (torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0]))
    before = state(model)
    objective = Objective(model, [batch], losses.classification)
    (block,) = partition(model, "model")
    found = []
    for _ in range(2):
        objective.check()
        objective.value()
        objective.gradient()
        found += Products(objective).sweep([(block, torch.ones(8, dtype=torch.float64))] * 2)
        torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)
    assert not hasattr(model, "cache")
    for product in found[1:]:
        torch.testing.assert_close(product, found[0], rtol=0, atol=0)
    model.last.fill_(3)  # by the user: what is found next time
    objective.value()
    assert float(model.last[0]) == 3


def test_evaluations_within_evaluations():
    model = Counting().double()
    before = state(model)
    batch = (torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))
    objective = Objective(model, [batch], losses.classification)
    with objective.prepared():
        model(torch.ones(2, 3, dtype=torch.float64))
        inside = int(model.calls)
        objective.value()
        assert int(model.calls) == inside == 1
    torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)


def test_buffers_come_back_when_something_raises():
    model = Counting().double()
    before = state(model)

    def loss(model, batch):
        model(batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Objective(model, [torch.ones(1, 3)], loss).value()
    torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)


def test_buffers_that_nobody_writes_to_are_not_touched():
    """A graph that is kept from sweep to sweep would be spoilt by that."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    objective = Objective(
        model, [(torch.ones(3, 2), torch.tensor([0, 1, 0]))], losses.classification
    )
    versions = [b._version for b in model.buffers()]
    objective.value()
    objective.gradient()
    assert [b._version for b in model.buffers()] == versions


def test_buffers_that_cannot_be_compared():
    model = nn.Linear(2, 2)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with torch.inference_mode():
        model.register_buffer("inferred", torch.ones(2))
    before = dict(model.named_buffers())
    batch = (torch.ones(3, 2), torch.tensor([0, 1, 0]))
    Objective(model, [batch], losses.classification).value()
    assert all(b is before[name] for name, b in model.named_buffers())


def test_large_buffers_are_copied_once():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(SMALL + 1))
    objective = Objective(
        model, [(torch.ones(3, 2), torch.tensor([0, 1, 0]))], losses.classification
    )
    objective.value()
    copies = [entries for _, _, entries in objective._copies.values()]
    objective.gradient()
    assert [entries for _, _, entries in objective._copies.values()] == copies
    assert len(copies) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_of_dynamic_length(kind):
    """The second evaluation is the first one again: frequencies, and the length they are for."""
    extra = {"long_factor": [2.0, 3.0], "short_factor": [1.0, 1.0]} if kind == "longrope" else {}
    scaling = {"rope_type": kind, "factor": 2.0, "rope_theta": 100.0, **extra}
    if kind == "longrope":
        scaling["original_max_position_embeddings"] = 4
    model = tiny_llama(layers=1, max_position_embeddings=8, rope_parameters=scaling)
    rotary = model.model.rotary_emb
    before = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    batches = [
        {"input_ids": torch.randint(32, (1, n), generator=torch.Generator().manual_seed(n))}
        for n in (12, 3)
    ]
    objective = Objective(model, batches, losses.next_token)
    values = [objective.value() for _ in range(2)]
    assert values[0] == values[1]
    length = rotary.max_seq_len_cached
    assert length == 8
    after = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class Tokens(nn.Module):
    def __init__(self, max_norm):
        super().__init__()
        self.embedding = nn.Embedding(6, 4, max_norm=max_norm, dtype=torch.float64)
        self.head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_an_embedding_with_a_largest_norm(max_norm):
    """Its value is the model's own, which shrinks rows; the weights stay; products are of one
    function.
    """
    torch.manual_seed(0)
    model = Tokens(max_norm)
    batch = (torch.tensor([0, 2, 4]), torch.tensor([1, 2, 0]))
    weight = model.embedding.weight.detach().clone()
    shrunk = copy.deepcopy(model)
    with torch.no_grad():
        shrunk.embedding(torch.arange(6))
        expected = F.cross_entropy(shrunk(batch[0]), batch[1])
    shrunk.embedding.max_norm = None
    objective = Objective(model, [batch], losses.classification)
    assert objective.value() == pytest.approx(expected.item(), rel=1e-12)
    (block,) = partition(model, "model")
    products = Products(objective)
    vector = torch.linspace(-1, 1, block.numel, dtype=torch.float64)
    found = [products.sweep([(block, vector)])[0] for _ in range(2)]
    other = Objective(shrunk, [batch], losses.classification)
    (whole,) = Products(other).sweep([(partition(shrunk, "model")[0], vector)])
    for product in found:
        torch.testing.assert_close(product, whole)
    torch.testing.assert_close(model.embedding.weight.detach(), weight, rtol=0, atol=0)
    assert model.embedding.max_norm == max_norm


def test_a_bag_with_a_largest_norm():
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(6, 4, max_norm=0.5, dtype=torch.float64)
    batch = (torch.tensor([[0, 1], [4, 5]]), torch.tensor([1, 2]))
    before = bag.weight.detach().clone()
    objective = Objective(bag, [batch], losses.classification)
    value, gradient = objective.value(), objective.gradient()["weight"]
    torch.testing.assert_close(bag.weight.detach(), before, rtol=0, atol=0)
    expected = F.cross_entropy(bag(batch[0]), batch[1])
    (slope,) = torch.autograd.grad(expected, bag.weight)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, slope)


def test_a_function_that_shrinks_weights_is_refused():
    model = nn.Linear(4, 6).double()

    def loss(model, batch):
        rows = F.embedding(batch, model.weight, max_norm=0.1)
        return rows.square().sum(), len(batch)

    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"max_norm.*changes the weights"):
        Objective(model, [torch.tensor([0, 1])], loss).value()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_two_evaluations_that_end_in_the_order_in_which_they_began():
    """As those of two threads do: what all threads share is as it was when both have ended."""
    before = torch.embedding_renorm_, torch.backends.mha.get_fastpath_enabled()
    first, second = (evaluation(nn.Linear(2, 2), batch_norm="eval", copies={}) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.embedding_renorm_ is not before[0]
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert (torch.embedding_renorm_, torch.backends.mha.get_fastpath_enabled()) == before


class Encoder(nn.Module):
    """Pools over all places, so that what padded ones hold matters."""

    def __init__(self, frozen):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2).requires_grad_(not frozen)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        padded = torch.arange(x.shape[1])[None] >= torch.tensor([2, 4])[:, None]
        return self.head(self.encoder(x, src_key_padding_mask=padded).mean(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_value_of_an_encoder_with_padding_is_that_of_the_function_differentiated(frozen):
    torch.manual_seed(0)
    model = Encoder(frozen).double()
    batch = (torch.randn(2, 4, 8, dtype=torch.float64), torch.tensor([0, 2]))
    objective = Objective(model, [batch], losses.classification)
    with objective.prepared():
        total, count = objective.loss_sum(batch)
    assert objective.value() == pytest.approx(total.item() / count, rel=1e-12)
    (block,) = partition(model, include="head.bias")
    direction = torch.ones(3, dtype=torch.float64)
    scape = landscape(objective, block, [direction * 1e-3], points=3)
    slope = objective.gradient()["head.bias"].sum().item()
    assert (scape.losses[2] - scape.losses[0]) / 2e-3 == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert torch.backends.mha.get_fastpath_enabled()


class OnlyWithGradients(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if torch.is_grad_enabled() else 1)


def test_the_value_is_computed_with_gradients_enabled():
    model = OnlyWithGradients(2, 2).double()
    batch = (torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1]))
    expected = F.cross_entropy(model(batch[0]), batch[1]).item()
    objective = Objective(model, [batch], losses.classification)
    with torch.no_grad():
        assert objective.value() == pytest.approx(expected, rel=1e-12)


def test_the_value_keeps_nothing_for_a_backward_pass():
    kept = []

    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            out = self.linear(x).exp()
            kept.append(out.grad_fn)
            return out

    objective = Objective(
        Recorded(), [(torch.ones(3, 2), torch.tensor([0, 1, 0]))], losses.classification
    )
    objective.value()
    with pytest.raises(RuntimeError, match="dropped"):
        _ = kept[0]._saved_result
    objective.gradient()
