"""``blockspec blocks``: the blocks of a model, listed before anything is computed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blockspec.model.pieces import Block, frame_of
from blockspec.runs.factories import find_factory
from blockspec.runs.settings import BlockSettings, RunSettings
from blockspec.runs.stages import Stage, prepare

SHOWN = 5  # names in the warning


@dataclass(frozen=True)
class ListingSettings:
    """Which blocks are listed, and how.

    Args:
        model: A factory, written module:function, that returns (model, batches, loss); or the name
            or the folder of a Hugging Face model.
        model_args: Keyword arguments of the factory. Set one of them by --model_args.NAME value.
        by: How parameters are cut into blocks: by tensor, matrix, head, neuron, layer or model.
        include: Keep the blocks whose names match one of these patterns, such as *attn*weight*. If
            left out, every block is kept.
        exclude: Leave out the blocks whose names match one of these patterns. If left out, none is.
        names: What the parts of your model are called: a mapping from a kind of block to endings of
            parameter names, for example '{"query": ["attn.my_q"]}'. It is asked before the names
            that blockspec knows. If left out, the known names decide.
        format: How the list is printed: as a table to read, or as csv or json for a program.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    by: str = "matrix"
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    names: dict[str, str | list[str]] | None = None
    format: Literal["table", "csv", "json"] = "table"


def run(settings: ListingSettings) -> None:
    """Prints the blocks that ``blockspec run`` would measure, the kinds counted."""
    chosen = BlockSettings(
        settings.by, settings.include, settings.exclude, full=False, names=settings.names
    )
    model = RunSettings(settings.model, model_args=settings.model_args, blocks=chosen)
    stage = Stage(0, dict(settings.model_args))
    _, blocks = prepare(model, stage, find_factory(settings.model), "cpu")
    {"table": _table, "csv": _csv, "json": _json}[settings.format](blocks)
    told = [_counted(blocks)] if settings.format == "csv" else []
    told.append(unnamed(blocks))
    for line in filter(None, told):
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def unnamed(blocks: Sequence[Block]) -> str:
    """What is to be said of blocks of kind ``other``; "" where there are none."""
    names = [block.name for block in blocks if block.kind == "other"]
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"warning: {len(names)} of {len(blocks)} blocks are of kind other: "
        f"{', '.join(names[:SHOWN])}{more}. Neither their names nor a forward pass tell what they "
        "are. Their spectra are as right as the others, but no comparison by kind holds them, but "
        "for the full matrix. To say what the parts of your model are called, pass --names (of "
        "blockspec blocks), --blocks.names (of run and plan) or names= (of blockspec.partition)"
    )


def _csv(blocks: Sequence[Block]) -> None:
    frame_of(blocks).to_csv(sys.stdout)


def _json(blocks: Sequence[Block]) -> None:
    shown = ("name", "kind", "layer", "numel", "note")
    rows = [{name: getattr(block, name) for name in shown} for block in blocks]
    kinds = dict(Counter(block.kind for block in blocks))
    parameters = sum(block.numel for block in blocks)
    print(json.dumps({"blocks": rows, "kinds": kinds, "parameters": parameters}, indent=1))


def _table(blocks: Sequence[Block]) -> None:
    console = Console()
    table = Table(title=f"{len(blocks)} blocks, {sum(b.numel for b in blocks):,} parameters")
    notes = any(block.note for block in blocks)
    for column in ("block", "kind", "layer", "parameters", *(["note"] if notes else [])):
        justify: Any = "right" if column in ("layer", "parameters") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for block in blocks:
        layer = "" if block.layer is None else str(block.layer)
        cells = [escape(block.name), escape(block.kind), layer, f"{block.numel:,}"]
        table.add_row(*cells, *([escape(block.note)] if notes else []))
    console.print(table)
    console.print(_counted(blocks), highlight=False, markup=False, soft_wrap=True)


def _counted(blocks: Sequence[Block]) -> str:
    kinds = Counter(block.kind for block in blocks)
    return "kinds: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
