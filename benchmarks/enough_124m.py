"""Just enough data for GPT-2 124M, and whether the stated errors hold:
``python -m benchmarks.enough_124m``.

The 25 blocks of arXiv 2402.16788, random weights, windows of 1,024 tokens of the embedded text, of
which there are 190. The spectra are estimated with ``data="auto"``, and from a few windows alone
with errors of the data. Their Wasserstein distance to a reference from all windows is what their
total error states; without one (``--reference_steps 0``) the few windows are compared with
``data="auto"``. An H100 takes two minutes without the reference and a quarter of an hour for it, a
core of a CPU hours.
"""

from __future__ import annotations

import time
import warnings

import pandas as pd
import torch
from jsonargparse import CLI

import blockspec
from benchmarks.gpt2_gpu import published_blocks, synchronise
from benchmarks.record import write
from blockspec.engine.enough import ESTIMATES_SHARE
from blockspec.numerics.measures import wasserstein
from language_models.fresh import fresh

AUTO = {"num_probes": "auto", "num_steps": "auto"}


def objective_of(
    sequences: int, batch_size: int, tokens: int, device: torch.device
) -> blockspec.Objective:
    """GPT-2 with the weights of a seed; each batch is a unit."""
    shape = {"num_layers": 12, "num_heads": 12, "width": 768, "vocabulary": 50257}
    model, batches, loss = fresh(
        settings={"architecture": "gpt2", **shape},
        num_batches=sequences // batch_size,
        batch_size=batch_size,
        num_tokens=tokens,
    )
    return blockspec.Objective(model.to(device), batches, loss)


def timed(
    objective: blockspec.Objective, blocks: list[blockspec.Block], **settings: object
) -> tuple[blockspec.Spectra, dict[str, float]]:
    """The spectra, and what they took."""
    synchronise(objective.device)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = blockspec.estimate_spectra(objective, blocks, **settings)
    synchronise(objective.device)
    assert found.cost is not None
    taken = {
        "seconds": time.perf_counter() - start,
        "products of a batch": found.cost.products,
        "gradients": found.cost.gradients,
        "units, at most": max(s.units for s in found.values()),
        "steps, at most": max(int(s.steps.max()) for s in found.values()),
        "probes, at most": max(s.num_probes for s in found.values()),
        "warnings": len(told),
    }
    return found, taken


def distance(found: blockspec.Spectrum, reference: blockspec.Spectrum) -> float:
    """Wasserstein-1, over the reference's norm."""
    measures = [(s.nodes.ravel(), s.weights.ravel() / s.weights.sum()) for s in (found, reference)]
    return wasserstein(*measures) / reference.norm


def errors(
    found: blockspec.Spectra, reference: blockspec.Spectra | None
) -> list[dict[str, object]]:
    """A row a block: what was taken, what is stated, over the norm, and what is true."""
    rows = []
    for name, s in found.items():
        row: dict[str, object] = {"block": name.removeprefix("transformer."), "units": s.units}
        row |= {
            "probes x steps": f"{s.num_probes} x {int(s.steps.max())}",
            "error": s.error / s.norm,
        }
        data, total = (e if e is None else e / s.norm for e in (s.data_error, s.total_error))
        row |= {"error of the data": data, "total": total}
        if reference is not None:
            row["distance"] = distance(s, reference[name])
        rows.append(row)
    return rows


def main(
    sequences: int = 190,
    few: int = 8,
    tokens: int = 1024,
    tolerance: float = 0.1,
    auto: bool = True,
    few_steps: int | None = None,
    reference_steps: int = 0,
    reference_batch: int = 10,
    save: str | None = None,
) -> None:
    """Estimates, compares, and writes the tables.

    Args:
        sequences: Windows of the text; with 1,024 tokens there are 190 that do not overlap.
        few: The windows of the estimate with a fixed number of them, spread over the text.
        tokens: Of a window.
        tolerance: Of the total error, over each block's norm.
        auto: Also with ``data="auto"``.
        few_steps: Of one probe of each block, on the few windows; None: as the tolerance needs.
        reference_steps: Of the reference's one probe, in tf32; 0: no reference.
        reference_batch: Windows that the reference takes at once.
        save: A folder for the spectra.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_of_it = objective_of(sequences, 1, tokens, device)
    model = all_of_it.model
    blocks = published_blocks(model)
    some = blockspec.Objective(
        model, objective_of(few, 1, tokens, torch.device("cpu")).batches(), all_of_it.loss
    )
    own: dict[str, object] = {"tolerance": ESTIMATES_SHARE * tolerance, **AUTO}
    if few_steps is not None:
        own = {"num_probes": 1, "num_steps": few_steps}
    cases: dict[str, tuple[blockspec.Objective, dict[str, object]]] = {}
    if auto:
        cases['data="auto"'] = (all_of_it, {"tolerance": tolerance, "data": "auto", **AUTO})
    cases[f"{few} sequences"] = (some, own)
    if reference_steps:
        whole = objective_of(sequences, reference_batch, tokens, torch.device("cpu"))
        at_once = blockspec.Objective(model, whole.batches(), all_of_it.loss)
        fixed = {"num_probes": 1, "num_steps": reference_steps, "precision": "tf32"}
        cases["reference"] = (at_once, {**fixed, "data_errors": False})
    found, taken = {}, []
    for case, (objective, settings) in cases.items():
        found[case], cost = timed(objective, blocks, check=False, **settings)
        taken.append({"what": case, **cost})
        print(taken[-1], flush=True)
        if save is not None:
            found[case].save(f"{save}/{''.join(filter(str.isalnum, case))}.parquet")
    reference = found.pop("reference", None)
    tables = {"Cost": pd.DataFrame(taken)}
    for case, spectra in found.items():
        best = reference if case.startswith("data") else reference or found.get('data="auto"')
        tables[f"{case}, over each block's norm"] = pd.DataFrame(errors(spectra, best))
    write("enough_124m", tables, notes=f"{len(blocks)} blocks, {sequences} sequences.")


if __name__ == "__main__":
    CLI(main, as_positional=False)
