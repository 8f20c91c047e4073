"""Batches are cut where their examples are, or not at all."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from problems import nanogpt, tokens
from torch import nn
from transformers import BatchEncoding

from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.model.examples import carriers, longest, mapped

GENERATOR = torch.Generator().manual_seed(0)
SIZE, WIDTH = 6, 4  # as many examples as positions


def drawn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


class Masked(nn.Module):
    """Self-attention with whatever mask it is given."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x, mask=None):
        hidden = self.inner(x)
        scores = hidden @ x.transpose(1, 2)
        return (scores if mask is None else scores + mask).softmax(-1) @ hidden


def squared(model, batch):
    out = model(batch["x"], batch.get("mask"))
    weights = batch.get("weights", torch.ones(()))
    return (out.square().mean((1, 2)) * batch["y"] * weights.sum()).sum(), len(batch["y"])


def batch_of(**more):
    return {"x": drawn(SIZE, SIZE, WIDTH), "y": drawn(SIZE)} | more


CAUSAL = torch.full((SIZE, SIZE), -5.0, dtype=torch.float64).triu(1)
BATCHES = {
    "nothing shared": (batch_of(), {"x", "y"}),
    "a mask (T, T)": (batch_of(mask=CAUSAL), {"x", "y"}),
    "a mask (B, T, T)": (batch_of(mask=drawn(SIZE, SIZE, SIZE)), {"x", "y", "mask"}),
    "weights (T,)": (batch_of(weights=drawn(SIZE)), {"x", "y"}),
    "two that are shared": (batch_of(mask=CAUSAL, weights=drawn(SIZE)), {"x", "y"}),
    "a mask of another length": (batch_of(mask=drawn(1, SIZE, SIZE)), {"x", "y"}),
    "a scalar": (batch_of(weights=drawn()), {"x", "y"}),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("case", BATCHES)
def test_only_tensors_that_carry_examples_are_cut(case, size):
    batch, expected = BATCHES[case]
    model = Masked()
    # Another mask, with as many positions as examples only in the second batch
    batches = [{name: t if t.dim() < 2 else t[:4] for name, t in batch_of().items()}]
    batches = [batches[0] | {"y": batches[0]["y"][:4]}, batch]
    whole, parts = (Objective(model, batches, squared, micro_batch=s) for s in (None, size))
    assert parts.value() == pytest.approx(whole.value(), rel=1e-12)
    torch.testing.assert_close(parts.gradient(), whole.gradient(), rtol=1e-10, atol=1e-12)
    found = carriers(batch, min(size, 5), lambda part: squared(model, part))
    assert {path[0] for path in found.paths} == expected
    assert found.length == SIZE
    if size < SIZE:
        assert sum(1 for _ in parts.batches()) == -(-4 // size) + -(-SIZE // size)


def test_each_batch_is_tried_once_with_few_examples():
    rows = []

    def loss(model, batch):
        rows.append(len(batch["x"]))
        return squared(model, batch)

    objective = Objective(Masked(), [batch_of(), batch_of()], loss, micro_batch=1)
    objective.value()
    assert rows == 2 * [2, 1, 1, *[1] * SIZE]
    rows.clear()
    objective.value()
    assert rows == 2 * SIZE * [1]


def test_examples_in_nested_batches_keep_their_holders():
    Pair = namedtuple("Pair", "x y")
    batch = Pair([drawn(4, 3), {"z": drawn(4)}], (drawn(4), "text", 7, None))
    found = carriers(batch, 2, lambda part: (part.x[0].sum() + part.y[0].sum(), len(part.y[0])))
    first, second = found.cut(batch, 2)
    assert isinstance(first, Pair)
    assert first.y[1:] == ("text", 7, None)
    assert torch.equal(second.x[1]["z"], batch.x[1]["z"][2:])
    assert longest(batch) == 4
    assert longest("text") == 1


def test_mappings_keep_their_class():
    """Losses may read the tensors of a tokenizer's batch by attributes."""
    batch = BatchEncoding({"x": drawn(4, 3), "more": OrderedDict(y=drawn(4))})
    placed = mapped(batch, torch.Tensor.float)
    assert isinstance(placed, BatchEncoding)
    assert isinstance(placed.more, OrderedDict)
    assert torch.equal(placed.x, batch.x.float())
    assert batch.x.dtype == torch.float64


def contrastive(model, batch):
    scores = model.inner(batch["x"][:, 0]) @ batch["x"][:, 1].T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)), reduction="sum"), len(
        scores
    )


def positions_first(model, batch):
    x = batch["x"].transpose(0, 1)  # (T, B, D)
    return model(x, CAUSAL[: x.shape[1], : x.shape[1]]).square().sum(), x.shape[0]


@pytest.mark.parametrize("loss", [contrastive, positions_first])
def test_a_loss_that_is_not_the_sum_over_examples_is_refused(loss):
    batch = {"x": drawn(SIZE, 5, WIDTH)}
    Objective(Masked(), [batch], loss).value()
    with pytest.raises(
        ValueError, match=r"micro_batch=2 cannot be used.*\(6, 5, 4\).*micro_batch=None"
    ):
        Objective(Masked(), [batch], loss, micro_batch=2).value()


@pytest.mark.parametrize(("positions", "cut"), [(5, True), (SIZE, False)])
def test_where_two_examples_take_too_much_memory_shapes_decide_if_they_can(positions, cut):
    def hungry(model, batch):
        if len(batch["x"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return squared(model, batch)

    batch = {"x": drawn(SIZE, positions, WIDTH), "y": drawn(SIZE)}
    objective = Objective(Masked(), [batch], hungry, micro_batch=1)
    if cut:
        assert sum(1 for _ in objective.batches()) == SIZE
    else:
        with pytest.raises(torch.OutOfMemoryError):
            list(objective.batches())


def test_an_error_of_the_loss_is_the_error():
    def loss(model, batch):
        raise KeyError("a name of its own")

    with pytest.raises(KeyError, match="a name of its own"):
        Objective(Masked(), [batch_of()], loss, micro_batch=2).value()


@pytest.mark.parametrize("wrong", ["nan", "random"])
def test_what_the_objective_itself_checks_is_said_by_it(wrong):
    def loss(model, batch):
        total, count = squared(model, batch)
        return total * (float("nan") if wrong == "nan" else torch.rand(())), count

    objective = Objective(Masked(), [batch_of()], loss, micro_batch=2)
    with pytest.raises(
        ValueError, match={"nan": "the loss is nan", "random": "not deterministic"}[wrong]
    ):
        objective.check()


def test_tokens_as_long_as_many():
    """(T, T) tokens and targets: both carry examples."""
    it = nanogpt()
    batch = (tokens(6, 6), tokens(6, 6, seed=1))
    whole, parts = (
        Objective(it.model, [batch], losses.next_token, micro_batch=s) for s in (None, 2)
    )
    assert parts.value() == pytest.approx(whole.value(), rel=1e-12)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.double()

    def forward(self, input_ids, mask):
        return self.head(self.layer(self.words(input_ids), src_mask=mask))


def test_an_encoder_with_a_mask_for_as_many_positions_as_examples():
    mask = nn.Transformer.generate_square_subsequent_mask(SIZE, dtype=torch.float64)
    batch = {"input_ids": tokens(SIZE, SIZE), "mask": mask}
    model = Encoder()
    found = []
    for size in (None, 1, 4):
        objective = Objective(model, [batch], losses.next_token, micro_batch=size)
        spectra = estimate_spectra(objective, partition(model, "model"), 1, 4)
        found.append(torch.tensor(spectra["model"].nodes))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-10)
