"""Products of several probes of one block, stacked (``is_grads_batched``, which is vmap over double
backward) against one by one: ``python -m benchmarks.stacked``.

From the whole graph, and through one layer that was built again for all of them. Both in turns in
one process; the ratio is that of the fastest of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from torch import Tensor

import blockspec
from benchmarks.layerwise import Case, model_of
from benchmarks.record import clock, write
from blockspec.products.curvature import Products
from blockspec.products.linearisations import ENDS, edges, grad

LAYERS = 4


def fastest(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each call, in turns."""
    found = []
    for _ in range(repeats):
        row = []
        for call in calls:
            start = clock()
            call()
            row.append(clock() - start)
        found.append(row)
    return [min(row) for row in zip(*found, strict=True)]


def stacked_and_not(
    gradient: Any, wanted: Sequence[Tensor], probes: Tensor
) -> list[Callable[[], Any]]:
    """The two ways to the derivatives of <gradient, probe> of all probes (K, ...)."""

    def stacked() -> list[Tensor]:
        settings: Any = {"grad_outputs": [probes], "is_grads_batched": True}
        return list(torch.autograd.grad([gradient], wanted, retain_graph=True, **settings))

    def one_by_one() -> list[Tensor]:
        rows = [
            torch.autograd.grad([gradient], wanted, grad_outputs=[v], retain_graph=True)
            for v in probes
        ]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    for a, b in zip(stacked(), one_by_one(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    return [stacked, one_by_one]


def whole(objective: blockspec.Objective, probes: int, repeats: int) -> list[float]:
    """Through the whole graph, from the first layer's matrix."""
    parameter = objective.model.get_parameter("transformer.h.0.attn.c_attn.weight")
    with objective.prepared():
        end = ENDS["hessian"](objective, next(iter(objective.batches())))
        settings: Any = {"grad_outputs": [end.slope], "create_graph": True}
        found = edges(grad([end.outputs], {"": parameter}, **settings))
        vectors = torch.randn(probes, *parameter.shape)
        return fastest(stacked_and_not(found[""], [parameter], vectors), repeats)


def through_a_layer(objective: blockspec.Objective, probes: int, repeats: int) -> list[float]:
    """Up through one layer: from its input's tangents to those of its output, and what is left for
    the way down.
    """
    operator = Products(objective, guarded=False, products="layerwise")
    operator.way.top.wanted = False
    with objective.prepared():
        linearised: Any = operator.linearise(next(iter(operator.batches())), operator.parameters)
        stretch = next(s for s in linearised._stretches[2:] if s.call is not None)
        outputs, start = linearised._opened(stretch)
        x = start[stretch.inputs[0]]
        dual = torch.randn_like(outputs[0]).requires_grad_()
        settings: Any = {"grad_outputs": [dual], "create_graph": True}
        found = edges(grad(outputs[:1], {"": x}, **settings))
        vectors = torch.randn(probes, *x.shape)
        return fastest(stacked_and_not(found[""], [dual, x], vectors), repeats)


def main(
    widths: tuple[int, ...] = (16, 32, 64, 192),
    tokens: int = 16,
    sequences: int = 2,
    probes: int = 8,
    repeats: int = 10,
) -> None:
    """Measures and writes the table.

    Args:
        widths: D.
        tokens: T.
        sequences: B.
        probes: K, of one block.
        repeats: Of each measurement.
    """
    torch.set_num_threads(1)
    rows = []
    for width in widths:
        case = Case(LAYERS, max(width, 64), tokens, 256)
        model = model_of(case) if width >= 64 else small(width, tokens)
        ids = torch.randint(256, (sequences, tokens))
        objective = blockspec.Objective(model, [{"input_ids": ids}], blockspec.losses.next_token)
        row: dict[str, Any] = {"D": width}
        for name, measure in {"whole graph": whole, "one layer": through_a_layer}.items():
            together, alone = measure(objective, probes, repeats)
            row |= {
                f"{name}, one by one (ms)": 1e3 * alone,
                f"{name}, stacked (ms)": 1e3 * together,
            }
            row[f"{name}, stacked / one by one"] = together / alone
        rows.append(row)
    table = pd.DataFrame(rows).set_index("D")
    write("stacked", {f"{probes} probes of one block, B={sequences}, T={tokens}": table})


def small(width: int, tokens: int) -> Any:
    """A GPT-2 narrower than a head of 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS, n_embd=width, n_head=2, bos_token_id=0, vocab_size=256,
            n_positions=tokens, eos_token_id=0, use_cache=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    CLI(main, as_positional=False)
