"""What the guard of products sees in right and in wrong models: ``python -m benchmarks.guard``.

The right ones are tiny models of some hundred architectures, kinks among them
(``tests/menagerie.py``); the wrong ones are functions whose second derivative is silently another
(``tests/faults.py``).
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI

from benchmarks.record import write
from blockspec.model.blocks import partition
from blockspec.model.objective import Objective
from blockspec.products.curvature import Products
from blockspec.products.guard import Check, check_products

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def check(objective: Objective, curvature: str) -> Check | str:
    """What is found, or the complaint."""
    blocks = partition(objective.model, "tensor")
    try:
        return check_products(objective, blocks, curvature, lambda o: Products(o, curvature))
    except ValueError as error:
        return str(error)


def row(name: str, objective: Objective, curvature: str) -> tuple[Any, ...]:
    start = time.perf_counter()
    objective.gradient()
    gradient = time.perf_counter() - start
    found = check(objective, curvature)
    cost = (time.perf_counter() - start - gradient) / gradient
    if isinstance(found, str):
        return name, curvature, "alarm", None, None, cost, found.split(". To blame is ")[-1][:80]
    return name, curvature, found.state, found.error, found.asymmetry, cost, found.reason


def table(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    columns = [
        "model",
        "matrix",
        "state",
        "error",
        "asymmetry",
        "time / gradient",
        "to blame, or why",
    ]
    return pd.DataFrame(rows, columns=columns)


def main(
    dtype: str = "float32", curvatures: tuple[str, ...] = ("hessian",), pattern: str = ""
) -> None:
    """The statistic of every right and every wrong model.

    Args:
        dtype: Of the right models.
        curvatures: Matrices of the right models.
        pattern: Names that contain it; all if left out.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    zoo, faults = (
        importlib.import_module("menagerie").zoo(),
        importlib.import_module("faults").FAULTS,
    )
    right = [
        row(name, make(getattr(torch, dtype)), curvature)
        for name, make in zoo.items()
        if pattern in name
        for curvature in curvatures
    ]
    wrong = [
        row(name, fault.objective(), curvature)
        for name, fault in faults.items()
        if pattern in name
        for curvature in fault.curvatures
    ]
    tables = {f"Right models, {dtype}": table(right), "Wrong models, float64": table(wrong)}
    notes = (
        "Error: largest relative difference between a parameter's part of the product and the "
        "difference of the gradient. "
        "Asymmetry: |u'Hv - v'Hu|, relative. Time: of the guard over that of one gradient of the "
        "whole data (two sequences or "
        "images here); the copy in float64 and Python's own overhead are most of it, as models are "
        "tiny."
    )
    write("guard", tables, notes=notes)


if __name__ == "__main__":
    CLI(main)
