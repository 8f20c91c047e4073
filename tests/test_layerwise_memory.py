"""Memory of products a layer at a time, as the system counts it, in a process of its own."""

import pytest
import torch
from launching import printed_alone
from models import tiny_gpt2, tiny_vit

import blockspec
from blockspec import losses
from blockspec.engine.estimate import plan_spectra
from blockspec.engine.plan import _choose_way, fit, plan
from blockspec.engine.schedule import Schedule
from blockspec.numerics import memory
from blockspec.products.curvature import Products
from blockspec.products.foresight import TIMES

CPU = torch.device("cpu")
SCRIPT = """
import gc, json, sys
import torch
sys.path.insert(0, sys.argv[1])
import models
from blockspec import Objective, losses, partition
from blockspec.numerics import memory
from blockspec.products.curvature import Products

CPU = torch.device("cpu")

def measured(way, layers):
    model = models.tiny_gpt2(dtype=torch.float32, layers=layers, n_embd=64, n_positions=160, vocab_size=256)
    objective = Objective(model, [{"input_ids": torch.randint(256, (2, 160))}], losses.next_token)
    blocks = partition(model, include="transformer.h.[0-3].attn.c_attn.weight/query")
    operator = Products(objective, guarded=False, products=way)
    requests = [(block, torch.ones(block.numel)) for block in blocks]
    with memory.watched(CPU) as peak:
        operator.sweep(requests)
    planned = None
    if way == "layerwise" and layers == 24:
        with memory.watched(CPU) as again:
            Products(objective, guarded=False, products=way).rehearse(blocks, None)
        planned = again.growth
    return {"peak": peak.growth, "planned": planned}

measured("layerwise", 2)  # what is allocated once
print(json.dumps({way: {n: measured(way, n) for n in (6, 24)} for way in ("layerwise", "whole")}))
"""
HIDDEN = 4 * 2 * 160 * 64  # bytes of the tensor between two layers
BETWEEN = (
    2 + 4
)  # such tensors that stay for each layer: it, its cotangent, one for each of 4 blocks


@pytest.fixture(scope="module")
def peaks():
    """Bytes, by way and number of layers."""
    return printed_alone(SCRIPT)


@pytest.mark.slow
def test_memory_does_not_grow_with_depth_but_for_what_stays_between_layers(peaks):
    shallow, deep = (
        peaks["layerwise"][layers]["peak"] - int(layers) * BETWEEN * HIDDEN
        for layers in ("6", "24")
    )
    assert deep <= 1.15 * shallow, peaks
    assert peaks["whole"]["24"]["peak"] > 3 * peaks["whole"]["6"]["peak"], peaks
    assert peaks["layerwise"]["24"]["peak"] < peaks["whole"]["24"]["peak"] / 3, peaks


def test_the_plan_foresees_it(peaks):
    """The rehearsal does; on top of it a plan keeps a margin, because memory= is a bound."""
    found = peaks["layerwise"]["24"]
    assert found["planned"] == pytest.approx(found["peak"], rel=0.2), peaks


class Rehearsed(Products):
    """A whole graph that takes more than there is, and layers that fit."""

    def rehearse(self, blocks, size):
        self.taken = torch.zeros(2**23 if self.way.layerwise else 2**27).fill_(1)
        del self.taken


def scheduled(products):
    model = tiny_vit(layers=2)
    batch = (torch.randn(2, 3, 8, 8).double(), torch.arange(2))
    objective = blockspec.Objective(model, [batch], losses.classification)
    blocks = blockspec.partition(model, include="*fc1.weight")
    from blockspec.engine.accuracy import Accuracy
    from blockspec.engine.task import Probing, Task

    tasks = [
        Task(
            b, torch.float64, torch.device("cpu"), Accuracy(3, 1, 0.1), Probing(0, "gaussian", True)
        )
        for b in blocks
    ]
    return Schedule(tasks), Rehearsed(objective, guarded=False, products=products)


def test_auto_goes_a_layer_at_a_time_where_the_whole_graph_does_not_fit():
    schedule, operator = scheduled("auto")
    found = plan(schedule, operator, limit=memory.resident() + 2**28)
    assert operator.way.layerwise
    assert "a layer at a time, because the whole graph of one example takes" in found.told
    schedule, operator = scheduled("auto")
    assert plan(schedule, operator, limit=memory.resident() + 2**31).told == "from the whole graph"
    schedule, operator = scheduled("whole")
    with pytest.raises(ValueError, match="is too little"):
        fit(schedule, operator, memory.resident() + 2**28)


def test_a_graph_that_cannot_fit_is_never_made():
    model = tiny_gpt2(dtype=torch.float32, layers=6, n_embd=64, n_positions=160, vocab_size=256)
    batch = {"input_ids": torch.randint(256, (2, 160))}
    objective = blockspec.Objective(model, [batch], losses.next_token)
    made = []

    class Noted(Products):
        def linearise(self, batch, parameters):
            made.append(self.way.layerwise)
            return super().linearise(batch, parameters)

    blocks = blockspec.partition(model, include="*h.1.attn.c_attn.weight/query")
    operator = Noted(objective, guarded=False)
    least = operator.least_memory(blocks)
    with objective.prepared():  # the tensors of one example's graph, all held at once
        kept = {}
        own = {p.data_ptr() for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr(), tensor.nbytes] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = objective.loss_sum(objective.heaviest(1))
        held = sum(tensor.nbytes for tensor in kept.values())
        del loss
    gradient = sum(model.get_parameter(name).nbytes for name in blocks[0].parameters)
    assert least == pytest.approx(TIMES * held + gradient, rel=0.02)
    _choose_way(operator, blocks, memory.used(CPU) + 2 * least)
    assert operator.way.is_open
    _choose_way(operator, blocks, memory.used(CPU) + least // 2)
    assert operator.way.layerwise
    assert operator.least_memory(blocks) == 0
    assert "takes" in operator.told
    assert made == []
    assert operator.objective.model.transformer.h[0].forward.__self__ is model.transformer.h[0]


def test_auto_goes_a_layer_at_a_time_where_memory_runs_out(monkeypatch):
    objective = blockspec.Objective(
        tiny_gpt2(), [{"input_ids": torch.arange(8)[None]}], losses.next_token
    )
    (block,) = blockspec.partition(objective.model, include="*h.0*c_fc.weight")
    vector = torch.ones(block.numel, dtype=torch.float64)
    truth = Products(objective, guarded=False, products="whole").sweep([(block, vector)])[0]
    operator = Products(objective, guarded=False)
    linearise = operator.linearise

    def short(batch, parameters):
        if not operator.way.layerwise:
            raise MemoryError("out of memory")
        return linearise(batch, parameters)

    monkeypatch.setattr(operator, "linearise", short)
    with pytest.warns(UserWarning, match="going on a layer at a time"):
        found = operator.sweep([(block, vector)])[0]
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-14)
    assert operator.told.startswith("a layer at a time, because memory ran out")


def test_auto_without_a_bound_keeps_within_what_is_free(monkeypatch):
    model = tiny_gpt2(dtype=torch.float32, layers=4, n_embd=64, n_positions=64)
    batch = {"input_ids": torch.randint(32, (8, 64))}
    objective = blockspec.Objective(model, [batch], losses.next_token)
    blocks = blockspec.partition(model, include="*h.2.attn.c_attn.weight/query")
    one = Products(objective).least_memory(blocks)
    for room, size, way in ((20, None, False), (3, 2, False), (0.5, 1, True)):
        monkeypatch.setattr(memory, "free", lambda _, room=room: int(room * one))
        operator = Products(objective, guarded=False)
        operator.check(blocks)
        assert (operator.micro_batch, operator.way.layerwise) == (size, way)
    assert "takes" in operator.told
    assert "are free" in operator.told
    found = plan_spectra(objective, blocks, num_probes=1, num_steps=2)
    assert found.told.startswith(operator.told)
    assert found.micro_batch == 1
    operator = Products(objective, guarded=False, products="whole")
    operator.check(blocks)
    assert not operator.way.layerwise


def test_layers_that_are_held_are_let_go_where_there_is_too_little(monkeypatch):
    """A bound that every layer cut would keep is not refused for those that are held."""
    schedule, operator = scheduled("layerwise")
    rehearsed = Products.rehearse

    def rehearse(self, blocks, size):
        rehearsed(self, blocks, size)
        self.taken = torch.zeros(2**28 if self.way.top.held else 2**20).fill_(1)
        del self.taken

    monkeypatch.setattr(Rehearsed, "rehearse", rehearse)
    fit(schedule, operator, memory.resident() + 2**28)
    assert not operator.way.top.held
    assert operator.way.layerwise
    with pytest.raises(ValueError, match="is too little"):
        fit(schedule, operator, memory.resident() + 2**20)
