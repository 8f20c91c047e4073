"""What a run's tables say: figures, a printed summary, a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blockspec.numerics.memory import readable
from blockspec.runs.json_files import read_json
from blockspec.spectra.collection import Spectra, read_table, spectra_of, write_parquet

if TYPE_CHECKING:  # a summary is printed without torch and matplotlib
    from matplotlib.figure import Figure

    from blockspec.engine.plan import Plan

SHOWN = 30  # blocks in the printed plan


def draw(run: Path) -> list[Path]:
    """Draws every figure that the run's tables have the data for; returns the paths of the png
    files.
    """
    from blockspec.figures import plots

    table = read_table(run / "spectra.parquet")
    by_step = {
        step: spectra_of(table[table["step"] == step])
        for step in sorted(table["step"].unique().tolist())
    }
    last = max(by_step)
    parts = by_step[last].parts
    figures = {
        "tails_by_block": plots.tails_by_block(parts),
        "quantiles_by_block": plots.quantiles_by_block(parts),
        "esd_by_block": plots.esd_by_block(parts),
        "edges_by_block": plots.edges_by_block(parts),
    }
    if "model" in by_step[last]:
        figures["tails_full"] = plots.tails_of_full(by_step)
        figures["esd_full"] = plots.esd_stages(by_step)
        figures["full_and_block_diagonal"] = plots.full_and_block_diagonal(by_step[last])
    if (run / "heterogeneity.parquet").exists():
        figures |= _heterogeneity_figures(pd.read_parquet(run / "heterogeneity.parquet"))
    if len(by_step) > 1:
        figures["trace_by_kind"] = plots.trace_by_kind_over_training(table)
    return [plots.save(figure, run / "figures", name) for name, figure in figures.items()]


def _heterogeneity_figures(table: pd.DataFrame) -> dict[str, Figure]:
    from blockspec.figures import plots

    maps = _distances(table)
    steps = list(maps)
    chosen = dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]])
    figures = {
        "distances": plots.distance_heatmaps({f"step {step}": maps[step] for step in chosen})
    }
    if len(maps) > 1:
        figures["heterogeneity"] = plots.heterogeneity_over_training(
            table[table["definition"] == "jensen-shannon"]
        )
    return figures


def _distances(table: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Step -> Jensen-Shannon divergences, blocks x blocks in their order, from a run's
    heterogeneity.parquet.
    """
    rows = table[table["definition"] == "jensen-shannon"]
    maps = {}
    for step in sorted(rows["step"].unique().tolist()):
        part = rows[rows["step"] == step]
        names = part["block"].unique()
        maps[step] = part.pivot(index="block", columns="other", values="distance").loc[names, names]
    return maps


def summary(spectra: Spectra) -> pd.DataFrame:
    """A row a role of block (its kind, where there is nothing to tell apart), and one for the full
    matrix: number, largest and smallest eigenvalue, mean eigenvalue.
    """
    table = spectra.summary().reset_index()
    roles = [spectrum.block.role for spectrum in spectra.values()]
    groups = table.groupby(pd.Series(roles, name="kind"), sort=False)
    return pd.DataFrame(
        {
            "blocks": groups.size(),
            "parameters": groups["numel"].sum(),
            "largest": groups["largest"].max(),
            "smallest": groups["smallest"].min(),
            "mean": groups["trace"].sum() / groups["numel"].sum(),
            "stderr": groups["trace_stderr"].apply(lambda s: (s**2).sum(skipna=False) ** 0.5)
            / groups["numel"].sum(),
        }
    )


def show(run: Path) -> None:
    """Prints what a run found and where it is."""
    console = Console()
    record = read_json(run / "run.json")
    table = read_table(run / "spectra.parquet")
    stages = {stage["step"]: stage for stage in record["stages"]}
    for step in sorted(table["step"].unique().tolist()):
        rows = table[table["step"] == step]
        stage = stages.get(step, {})
        title = f"step {step}: loss {stage.get('loss', float('nan')):.4f}, {_outcome(stage)}"
        console.print(_rich(summary(spectra_of(rows)), title))
        console.print(_origin(stage), highlight=False, markup=False, soft_wrap=True)
    _show_heterogeneity(run, console)
    console.print(
        f"run folder: {run}  (run.json, spectra.parquet, heterogeneity.parquet, figures/)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _origin(stage: Mapping[str, Any]) -> str:
    """From which weights and data a step's numbers are, and by which code."""
    identity = stage.get("identity", {})
    words = [f"{name} {identity[name][:8]}" for name in ("weights", "data") if name in identity]
    if stage.get("checkpoint"):
        words.insert(0, f"of {stage['checkpoint']}")
    if "precondition" in identity:
        words.append(f"seen by {identity['precondition'][:-8]}")
    commit = stage.get("git_commit")
    versions = stage.get("versions", {})
    words.append(f"commit {commit}" if commit else "no commit")
    words += [f"{name} {versions[name]}" for name in ("blockspec", "torch") if name in versions]
    return ", ".join(words)


def show_plan(plan: Plan, *, stages: int = 1) -> None:
    """Prints the cost of an estimate: the dearest blocks, and the total."""
    console = Console()
    table = Table(
        title=f"{len(plan.table)} blocks; one gradient of the objective takes "
        f"{plan.gradient_seconds:.3g} s"
    )
    for column in ("block", "parameters", "products", "gradients", "operations", "time"):
        table.add_column(column, justify="left" if column == "block" else "right", overflow="fold")
    dearest = plan.table.sort_values("seconds", ascending=False)
    shown = [(str(name), row) for name, row in dearest.head(SHOWN).iterrows()]
    if len(dearest) > SHOWN:
        shown.append((f"{len(dearest) - SHOWN} more", dearest.iloc[SHOWN:].sum(numeric_only=True)))
    for name, row in [*shown, ("all", plan.table.sum(numeric_only=True))]:
        counts = (
            f"{int(row['parameters']):,}",
            f"{int(row['products']):,}",
            f"{row['gradients']:.4g}",
        )
        table.add_row(escape(name), *counts, f"{row['flops']:.3g}", duration(row["seconds"]))
    console.print(table)
    show_totals(plan, console, stages=stages)


def show_totals(plan: Plan, console: Console, *, stages: int = 1) -> None:
    """Prints what an estimate costs in all."""
    micro_batch = (
        "batches as they come"
        if plan.micro_batch is None
        else f"micro-batches of {plan.micro_batch}"
    )
    bound = "" if plan.limit is None else f" of {readable(plan.limit)}"
    time = f"time {duration(plan.seconds)} a model, {duration(plan.seconds * stages)} for {stages}"
    groups = f"{plan.passes} group(s) of recurrences"
    peak = f"peak memory {readable(plan.peak)}{bound}, {micro_batch}, {groups}"
    for line in (f"planned: {plan.products:,} products, {time}", f"planned: {peak}"):
        console.print(line, highlight=False, soft_wrap=True)


def _outcome(stage: Mapping[str, Any]) -> str:
    """Time and memory of a stage, and what was planned."""
    planned = stage.get("planned") or {}
    found = {"seconds": duration, "peak": readable}
    parts = []
    for name, text in found.items():
        if stage.get(name) is not None:
            parts.append(
                text(stage[name]) + (f" (planned {text(planned[name])})" if planned else "")
            )
    return ", peak ".join(parts)


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``4.2 s``"""
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return (
        f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.2g} s"
    )


def _show_heterogeneity(run: Path, console: Console) -> None:
    path = run / "heterogeneity.parquet"
    if not path.exists():
        return
    rows = pd.read_parquet(path).drop_duplicates(["definition", "step"])
    table = Table(title="heterogeneity: mean distance over all pairs of blocks")
    for column in ("definition", "step", "mean", "standard error"):
        table.add_column(column, justify="left" if column == "definition" else "right")
    for row in rows.itertuples():
        table.add_row(str(row.definition), str(row.step), f"{row.js0:.4g}", _number(row.js0_stderr))
    console.print(table)


def _rich(frame: pd.DataFrame, title: str) -> Table:
    table = Table(title=escape(title))
    table.add_column(str(frame.index.name))
    for column in frame.columns:
        table.add_column(column, justify="right")
    for name, row in frame.iterrows():
        cells = [
            f"{int(row[c]):,}" if c in ("blocks", "parameters", "step") else _number(row[c])
            for c in frame.columns
        ]
        table.add_row(escape(str(name)), *cells)
    return table


def _number(value: Any) -> str:
    return "unknown" if pd.isna(value) else f"{value:.3g}"


def compare(runs: list[Path], out: Path) -> None:
    """Tables and figures of several runs beside each other; the heat maps are those of each run's
    first step.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least 2 runs, got {len(runs)}")
    from blockspec.figures import plots

    names = _names(runs)
    spectra = {
        name: read_table(run / "spectra.parquet") for name, run in zip(names, runs, strict=True)
    }
    distances = {
        name: pd.read_parquet(run / "heterogeneity.parquet")
        for name, run in zip(names, runs, strict=True)
    }
    first = {name: next(iter(_distances(table).items())) for name, table in distances.items()}
    maps = {f"{name}, step {step}": distance for name, (step, distance) in first.items()}
    means = [
        table.drop_duplicates(["definition", "step"]).assign(run=name)
        for name, table in distances.items()
    ]
    joined = pd.concat(means)[["run", "step", "definition", "js0", "js0_stderr"]]
    write_parquet(joined, out / "comparison.parquet")
    figures = {
        "comparison": plots.compare_runs(spectra),
        "distances": plots.distance_heatmaps(maps),
    }
    paths = [plots.save(figure, out / "figures", name) for name, figure in figures.items()]
    console = Console()
    frame = joined[joined["definition"] == "jensen-shannon"].set_index("run")[
        ["step", "js0", "js0_stderr"]
    ]
    console.print(_rich(frame, "mean Jensen-Shannon divergence over all pairs of blocks (nats)"))
    console.print(
        f"table: {out / 'comparison.parquet'}   figures: {', '.join(map(str, paths))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _names(runs: list[Path]) -> list[str]:
    """The folders' names, or their paths where names repeat."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
