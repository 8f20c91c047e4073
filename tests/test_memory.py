"""Memory of whole processes: resident sets as the system counts them, in a process of their own."""

import pytest
from launching import printed_alone

SCRIPT = """
import gc, json, re, sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import models
from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.numerics import memory

model = models.tiny_gpt2(dtype=torch.float32, layers=2, n_embd=32, n_head=4, n_positions=64, vocab_size=256)
(block,) = partition(model, include="*h.0*weight/value")
blocks = [block, *partition(model, "model")]
ids = torch.randint(256, (8, 48))
kept = []

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

def peak():
    return status("VmHWM")  # getrusage begins with the peak of the process that started this one

def resident():
    gc.collect()
    return status("VmRSS")

def run(batches, curvature="hessian", leak=None):
    def terms(outputs, batch):
        terms = losses.next_token.terms(outputs, batch)
        if leak == "graph":
            kept.append(terms)  # what a sum of all batches' losses before one backward pass would do
        return terms
    loss = losses.Loss(losses.next_token.outputs, terms)
    objective = Objective(model, [{"input_ids": ids}] * batches, loss)
    estimate_spectra(objective, blocks, num_probes=1, num_steps=2, curvature=curvature)

def leaking_backward():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses.next_token(model, {"input_ids": ids})[0].backward(create_graph=True)

result = {}
for curvature in ("hessian", "ggn", "fisher"):
    run(2, curvature)
    before = peak()
    run(8, curvature)
    result[f"batches {curvature}"] = peak() - before
    run(1, curvature)
    before = resident()
    for _ in range(3):
        run(1, curvature)
    result[f"calls {curvature}"] = resident() - before

def bounded(room, num_batches):
    # how far beyond its bound an estimate went, in MiB, with the highest mark before any reset
    marks, reset = [], memory._reset_high_water
    memory._reset_high_water = lambda: (marks.append(peak()), reset())
    many = torch.randint(256, (64, 48), generator=torch.Generator().manual_seed(0))
    objective = Objective(model, [{"input_ids": many}] * num_batches, losses.next_token)
    memory.trim()
    limit = (resident() + room) * 2**20
    reset()
    spectra = estimate_spectra(objective, blocks, num_probes=2, num_steps=3, memory=limit)
    memory._reset_high_water = reset
    return max(peak(), *marks) - limit / 2**20, spectra.cost.gradients

bounded(100, 1)  # what is allocated once
for room in (20, 40):
    result[f"beyond {room}"], result[f"passes {room}"] = bounded(room, 2)
gc.disable()
before = status("VmRSS")
for _ in range(4):
    leaking_backward()
result["control calls"] = status("VmRSS") - before
gc.enable()
before = peak()
run(5, leak="graph")
result["control batches"] = peak() - before
print(json.dumps(result))
"""

ALLOWED = 8  # MiB; the graph of one batch takes several times as much, see the controls


@pytest.fixture(scope="module")
def growth():
    """MiB by which a process grew, by what was done in it."""
    return printed_alone(SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_peak_memory_does_not_grow_with_the_number_of_batches(growth, curvature):
    assert growth[f"batches {curvature}"] <= ALLOWED, growth


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_memory_does_not_grow_from_call_to_call(growth, curvature):
    assert growth[f"calls {curvature}"] <= ALLOWED, growth


def test_the_measurement_sees_what_it_is_there_for(growth):
    """Graphs kept from batch to batch, and the reference cycle of
    ``backward(create_graph=True)``.
    """
    assert growth["control batches"] > 2 * ALLOWED, growth
    assert growth["control calls"] > 2 * ALLOWED, growth


@pytest.mark.parametrize("room", [20, 40])
def test_a_bound_is_kept_from_the_checks_to_the_last_sweep(growth, room):
    assert growth[f"beyond {room}"] <= 0, growth
    assert growth["passes 20"] > growth["passes 40"] > 2 * 3  # batches were cut to fit
