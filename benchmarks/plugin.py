"""Where the time of a measurement in training goes: ``python -m benchmarks.plugin``.

Trains a small GPT-2 in a loop of one's own and measures spectra in it with
``blockspec.integrations.record``. Products should be all of the cost: the rest is Lanczos' own
arithmetic, checks, distances between blocks and tables.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pandas as pd
import torch
from jsonargparse import CLI
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.record import clock, write
from blockspec import Objective, losses, partition
from blockspec.integrations import record

PARTS = {  # what is timed, and where its callers find it
    "products": "blockspec.products.curvature.Products.sweep",
    "Lanczos": "blockspec.numerics.ranks.Ranks.together",
    "distances and tables": "blockspec.integrations.recording.append_tables",
    "record of the run": "blockspec.integrations.recording.open_record",
}


def main(
    *,
    layers: int = 2,
    width: int = 128,
    window: int = 64,
    batches: tuple[int, ...] = (8, 32),
    probes: int = 4,
    steps: int = 20,
    measured: int = 2,
) -> None:
    """Measures and prints the shares.

    Args:
        layers: Of the model.
        width: Of the model; a head has 32.
        window: Tokens in a window.
        batches: Windows in the one held-out batch; each number is measured.
        probes: A block.
        steps: Lanczos steps.
        measured: Measurements; the first one, which begins the folder, counts as well.
    """
    sizes: dict[str, Any] = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": width // 32,
        "n_positions": window,
        "vocab_size": 512,
    }
    tables = {}
    for batch in batches:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        data = {"input_ids": torch.randint(512, (batch, window))}
        seconds, blocks = shares(model, data, probes=probes, steps=steps, measured=measured)
        table = pd.DataFrame(
            {
                "seconds": seconds,
                "share": {name: value / seconds["all"] for name, value in seconds.items()},
            }
        )
        title = (
            f"{batch * window} tokens: {measured} measurements of {blocks} blocks, "
            f"{probes} probes of {steps} steps"
        )
        tables[title] = table.rename_axis("part")
    write("plugin", tables, notes="CPU time.")


def shares(
    model: torch.nn.Module, data: dict[str, torch.Tensor], *, probes: int, steps: int, measured: int
) -> tuple[dict[str, float], int]:
    """Seconds of each part, and the number of blocks."""
    objective, blocks = (
        Objective(model, [data], losses.next_token),
        partition(model, include="*weight*"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as out, timed(seconds):
        for step in range(measured):
            start = clock()
            record(out, step, objective, blocks, num_probes=probes, num_steps=steps)
            seconds["all"] = seconds.get("all", 0.0) + clock() - start
            losses.next_token(model, data)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds["everything else"] = 2 * seconds["all"] - sum(seconds.values())
    return seconds, len(blocks)


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the time that each of PARTS takes."""
    with ExitStack() as stack:
        for name, path in PARTS.items():
            patcher: Any = mock.patch(path, autospec=True)
            original = patcher.get_original()[0]
            patcher.kwargs["side_effect"] = _timer(original, name, seconds)
            stack.enter_context(patcher)
        yield


def _timer(
    function: Callable[..., Any], name: str, seconds: dict[str, float]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + clock() - start

    return call


if __name__ == "__main__":
    CLI(main)
