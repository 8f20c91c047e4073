"""Cross-attention told by where its inputs come from, in models whose names tell nothing."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from test_places import bart, t5, torch_s_own, whisper
from torch import nn

from blockspec import Objective, losses, partition
from blockspec.model.places import ATTENDING, CROSS
from blockspec.model.roles import watch_example

WIDTH, VOCABULARY = 8, 12
TOKENS = torch.arange(7)[None]


class Looks(nn.Module):
    """Attention of ``x`` to ``y``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        query = self.a(x)[:, None]
        key, value = self.b(y)[:, None].chunk(2, -1)
        return self.c(F.scaled_dot_product_attention(query, key, value)[:, 0])


class Reader(nn.Module):
    """Two layers that look at themselves and at something else: ``other`` says at what."""

    def __init__(self, other, norm_last=False):
        super().__init__()
        self.t, self.o = (nn.Embedding(VOCABULARY, WIDTH) for _ in range(2))
        self.parts = nn.ModuleList(nn.ModuleList([Looks(), Looks()]) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.z = nn.Linear(WIDTH, VOCABULARY)
        self.other, self.norm_last = other, norm_last

    def memory(self, x):
        if self.other == "tokens":
            return self.o(TOKENS[:, :4])
        if self.other == "data":  # from a model that is not here
            return torch.ones(1, 5, WIDTH)
        if self.other == "pooled":  # itself, at a lower resolution
            return F.avg_pool1d(x.mT, 2).mT
        return torch.cat([x, self.o(TOKENS[:, :4])], 1)  # itself and others

    def add(self, x, looks, norm, memory=None):
        read = x if self.norm_last else norm(x)
        y = x + looks(read, read if memory is None else memory)
        return norm(y) if self.norm_last else y

    def forward(self, tokens):
        x = self.t(tokens)
        for i, (one, two) in enumerate(self.parts):
            x = self.add(x, one, self.norms[2 * i])
            x = self.add(x, two, self.norms[2 * i + 1], self.memory(x))
        return self.z(x)


def roles(model, example=TOKENS):
    torch.manual_seed(0)
    blocks = partition(model, example=example)
    return {b.name: b.role for b in blocks if b.kind in ATTENDING}


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("other", ["tokens", "data", "pooled", "both"])
def test_only_what_comes_from_elsewhere_is_crossed(other, norm_last):
    found = roles(Reader(other, norm_last))
    assert len(found) == 16  # query, key, value, output of four
    for name, role in found.items():
        looks_elsewhere = ".1." in name.removeprefix("parts.0").removeprefix("parts.1")
        crossed = looks_elsewhere and other in ("tokens", "data")
        assert role.startswith("cross_") == crossed, (name, role)


def test_of_raw_inputs_the_lengths_tell():
    model = Looks()
    x, y = torch.randn(1, 5, WIDTH), torch.randn(1, 3, WIDTH)
    assert set(roles(model, lambda: model(x, y)).values()) == {
        "cross_query",
        "cross_key",
        "cross_value",
        "cross_attention_output",
    }
    assert not any("cross" in role for role in roles(model, lambda: model(x, x)).values())


def test_a_name_that_is_wrong_is_said():
    model = Reader("pooled")
    for part in model.parts:
        part.add_module("cross_attn", part[1])
        del part._modules["1"]
        part.forward = None
    model.forward = lambda tokens: _renamed(model, tokens)
    blocks = [b for b in partition(model, example=TOKENS) if "cross_attn" in b.name]
    told = "the name says cross-attention, the forward pass says self-attention"
    assert {b.role for b in blocks} >= {"query", "key", "value", "attention_output"}
    assert all(told in b.note for b in blocks if b.kind in ATTENDING)


def _renamed(model, tokens):
    x = model.t(tokens)
    for i, part in enumerate(model.parts):
        x = model.add(x, part[0], model.norms[2 * i])
        x = model.add(x, part.cross_attn, model.norms[2 * i + 1], model.memory(x))
    return model.z(x)


@pytest.mark.parametrize("build", [t5, bart])
def test_watched_and_named_encoder_decoders_agree(build):
    model = build()
    batch = {"input_ids": TOKENS % 11, "labels": TOKENS[:, :5] % 11}
    objective = Objective(model, [batch], losses.sequence_to_sequence)
    named, watched = partition(model), objective.partition()
    assert [b.role for b in named] == [b.role for b in watched]
    assert any(b.role == "decoder_cross_query" for b in watched)


@pytest.mark.parametrize("name", ["pvt", "funnel", "led", "m2m_100", "seamless_m4t", "xlnet"])
def test_other_architectures_are_seen_as_they_are_named(name):
    model = zoo.build(name)
    told = {
        parameter: seen.crossed
        for parameter, seen in watch_example(model, zoo.inputs(model)).items()
        if seen.kind in ATTENDING
    }
    assert told
    assert all(c == bool(CROSS.search(p)) for p, c in told.items() if c is not None)
    assert any(crossed is not None for crossed in told.values())


@pytest.mark.parametrize("build", [whisper, torch_s_own])
def test_without_a_pass_names_tell(build):
    assert "decoder_cross_query" in {b.role for b in partition(build())}
