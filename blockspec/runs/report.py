"""What a run's tables say: figures, a printed summary, a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from blockspec.numerics.memory import readable
from blockspec.runs.loading import load_run
from blockspec.runs.printing import print_frame
from blockspec.spectra.collection import (
    Spectra,
    mean_data_stderr,
    read_table,
    spectra_of,
    write_parquet,
)
from blockspec.spectra.groups import MOST_COMPARED
from blockspec.spectra.stages import shortened, stage_label, stage_labels

if TYPE_CHECKING:  # a summary is printed without torch and matplotlib
    from matplotlib.figure import Figure

    from blockspec.engine.enough import Foreseen
    from blockspec.engine.plan import Plan
    from blockspec.runs.plotting import PlotSettings

SHOWN = 30  # blocks in the printed plan


def draw(run: Path, settings: PlotSettings | None = None) -> list[Path]:
    """Draws every figure that the run's tables have the data for; returns the paths of the png
    files.
    """
    from blockspec.figures import plots
    from blockspec.figures.page import drawn_for
    from blockspec.runs.plotting import PlotSettings

    settings = settings or PlotSettings()
    with drawn_for(settings.page):
        figures = _figures(run, settings)
        return [plots.save(figure, run / "figures", name) for name, figure in figures.items()]


def _figures(run: Path, settings: PlotSettings) -> dict[str, Figure]:
    from blockspec.figures import plots
    from blockspec.figures.stages import stage_title

    followed = _tracking_figures(run, settings)
    if followed and not (run / "spectra.parquet").exists():
        return followed
    table = settings.chosen(read_table(run / "spectra.parquet"))
    by_step = {
        step: spectra_of(table[table["step"] == step])
        for step in sorted(table["step"].unique().tolist())
    }
    last, labels = max(by_step), stage_labels(table)
    parts = by_step[last].parts or by_step[last]
    figures = {
        "tails_by_block": plots.tails_by_block(parts),
        "quantiles_by_block": plots.quantiles_by_block(parts),
        "esd_by_block": plots.esd_by_block(parts),
        "edges_by_block": plots.edges_by_block(parts),
    }
    if "model" in by_step[last]:
        figures["tails_full"] = plots.tails_of_full(by_step, labels=labels)
        figures["esd_full"] = plots.esd_stages(by_step, labels=labels)
        if by_step[last].parts:
            figures["full_and_block_diagonal"] = plots.full_and_block_diagonal(by_step[last])
    if len(by_step) > 1:  # the others say themselves what they show
        note = f"{stage_title(last, labels)}, the last of {len(by_step)}"
        for name in set(figures) - {"tails_full", "esd_full"}:
            plots.with_note(figures[name], note)
    if (run / "heterogeneity.parquet").exists():
        distances = settings.chosen(pd.read_parquet(run / "heterogeneity.parquet"))
        figures |= _heterogeneity_figures(distances, every_block=settings.every_block)
    if len(by_step) > 1:
        figures["trace_by_kind"] = plots.trace_by_kind_over_training(table)
    return figures | followed


def _tracking_figures(run: Path, settings: PlotSettings) -> dict[str, Figure]:
    """The curves of what was followed at every n-th step of a training, where something was.

    Other blocks may be followed than those whose spectra are measured: patterns that match none
    of them are an error only where there are no spectra.
    """
    from blockspec.figures.tracking import tracked_eigenvalues
    from blockspec.toolbox.tracking import VALUES

    if not (run / VALUES).exists():
        return {}
    table = pd.read_parquet(run / VALUES)
    if not (run / "spectra.parquet").exists():
        table = settings.chosen(table)
    rows = table[[settings.holds(block) for block in table["block"]]]
    return {} if rows.empty else {"tracking": tracked_eigenvalues(rows)}


def _heterogeneity_figures(table: pd.DataFrame, *, every_block: bool) -> dict[str, Figure]:
    """The means that a table holds are over all blocks: of chosen ones only the map is drawn."""
    from blockspec.figures import plots
    from blockspec.figures.stages import stage_title

    maps = _distances(table)
    steps = list(maps)
    chosen = dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]])
    labels = stage_labels(table)
    titles = {step: stage_title(step, labels) for step in chosen}
    shown = plots.distance_heatmaps({titles[step]: maps[step] for step in chosen})
    left_out = "" if len(chosen) == len(maps) else f"{len(chosen)} of {len(maps)} stages"
    figures = {"distances": plots.with_note(shown, left_out)}
    if len(maps) > 1 and every_block:
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
    matrix: number, largest and smallest eigenvalue, mean eigenvalue with its standard errors over
    probes and over the data, and which part dominates the error of most of its spectra.
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
            "data stderr": groups["block"].apply(
                lambda names: mean_data_stderr([spectra[name] for name in names])
            ),
            "larger error": groups["dominant"].agg(lambda parts: parts.mode()[0]),
        }
    )


def show(run: Path) -> None:
    """Prints what a run found, of what, and where it is."""
    console = Console()
    found = load_run(run)
    say(console, *described(found.record, found.table))
    for step, spectra in found.stages.items():
        stage = found.entry(step)
        loss = f": loss {stage['loss']:.4f}" if stage.get("loss") is not None else ""
        outcome = _outcome(stage)
        title = f"{stage_name(stage, step)}{loss}" + (f", {outcome}" if outcome else "")
        print_frame(console, _written(summary(spectra)), title)
        say(console, spectra.data, _origin(stage))
    _show_heterogeneity(run, console)
    say(console, f"run folder: {run}  (run.json, spectra.parquet, heterogeneity.parquet, figures/)")


def say(console: Console, *lines: str) -> None:
    """Prints lines as they are, however long."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def stage_name(stage: Mapping[str, Any], step: int) -> str:
    """``step 500``; the checkpoint's name beside its place where its step is not known."""
    label = stage.get("label")
    return stage_label(step) if label is None else f"stage {step} ({label})"


def _stage_column(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """A column that says of which stage each row is, by its step or by what it is called."""
    if not stage_labels(rows):
        return {"step": rows["step"].map(str)}
    return {"stage": rows["label"].map(shortened(rows["label"]))}


def described(record: Mapping[str, Any], table: pd.DataFrame) -> list[str]:
    """Of what a run is: the model, the matrix, the blocks, the probes, the data."""
    settings = record.get("settings", {})
    stage: dict[str, Any] = next(iter(record["stages"]), {})
    model, named = stage.get("model", {}), settings.get("model", "not recorded")
    facts = [f"{model['parameters']:,} parameters, {model['dtype']}"] if model else []
    if model and model["class"] != named:
        facts.insert(0, model["class"])
    blocks = table.drop_duplicates("block")
    parts = int((blocks["kind"] != "full").sum())
    cut = [f"{parts} {partition_of(record)}"] if parts else []
    full = ["the full matrix"] if parts < len(blocks) else []
    per_block = table.groupby(["step", "block"])[["probe", "steps"]].max()
    rows = {
        "model": f"{named}" + (f" ({', '.join(facts)})" if facts else ""),
        "matrix": ", ".join(sorted(table["curvature"].unique())),
        "blocks": ", and ".join(cut + full),
        "probes": f"{_range(per_block['probe'] + 1)} a block, {_range(per_block['steps'])} steps a "
        f"probe, seed {_range(table['seed'])}",
        "data": "not recorded" if "data" not in stage else f"{len(stage['data'])} batch(es)",
    }
    return [f"{name:7}{text}" for name, text in rows.items()]


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def partition_of(record: Mapping[str, Any]) -> str:
    """How a run's parameters are cut: ``by matrix``."""
    by = record.get("settings", {}).get("blocks", {}).get("by")
    if by is None:
        return "of a list of one's own"
    return f"by {by}" if isinstance(by, str) else f"of one's own ({', '.join(by)})"


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
    dearest = plan.table.sort_values("seconds", ascending=False)
    shown = [(str(name), row) for name, row in dearest.head(SHOWN).iterrows()]
    if len(dearest) > SHOWN:
        shown.append((f"{len(dearest) - SHOWN} more", dearest.iloc[SHOWN:].sum(numeric_only=True)))
    rows = {
        name: {
            "parameters": f"{int(row['parameters']):,}",
            "products": f"{int(row['products']):,}",
            "gradients": f"{row['gradients']:.4g}",
            "operations": f"{row['flops']:.3g}",
            "time": duration(row["seconds"]),
        }
        for name, row in [*shown, ("all", plan.table.sum(numeric_only=True))]
    }
    console = Console()
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("block")
    gradient = f"one gradient of the objective takes {plan.gradient_seconds:.3g} s"
    print_frame(console, frame, f"{len(plan.table)} blocks; {gradient}")
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
    products = f"{plan.products:,} products {plan.told}"
    lines = [f"planned: {products}, {time}", f"planned: {peak}"]
    if len(plan.table) > MOST_COMPARED:
        lines.append(
            f"of {len(plan.table):,} blocks, distances are taken between the mixtures of each kind "
            f"and layer (up to {MOST_COMPARED} blocks, between all pairs)"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def show_data(needed: Foreseen, tolerance: float) -> None:
    """Prints how much data a tolerance takes."""
    by_need = sorted(needed.units, key=lambda name: needed.units[name])
    subjects = {
        by_need[len(by_need) // 2]: "half of the blocks need at most",
        by_need[-1]: f"{by_need[-1]!r} needs the most,",
    }
    lines = [
        f"data: {subject} about {needed.units[name]:,} units, which are "
        f"{needed.units[name] * needed.terms:,.0f} loss terms (tokens, or images)"
        for name, subject in subjects.items()
    ]
    lines.append(
        f"data: these are for a total error of {tolerance:g}; the plan above counts all "
        f"{needed.available:,} units"
    )
    for line in lines:
        Console().print(line, highlight=False, soft_wrap=True)


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
    rows = pd.read_parquet(path).drop_duplicates(["definition", "step"]).set_index("definition")
    frame = pd.DataFrame(
        {
            **_stage_column(rows),
            "mean": rows["js0"].map("{:.4g}".format),
            "standard error": rows["js0_stderr"].map(_number),
            "of the data": rows.get("js0_data_stderr", pd.Series(index=rows.index)).map(_number),
        }
    )
    print_frame(console, frame, "heterogeneity: mean distance over all pairs of blocks")


def _written(frame: pd.DataFrame) -> pd.DataFrame:
    counted = ("blocks", "parameters", "step")
    return pd.DataFrame(
        {
            name: frame[name].map("{:,}".format if name in counted else _number)
            for name in frame.columns
        },
        index=frame.index,
    )


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "unknown" if pd.isna(value) else f"{value:.3g}"


def compare(runs: list[Path], out: Path) -> None:
    """Tables and figures of several runs beside each other; the heat maps are those of each run's
    first step.

    Raises:
        ValueError: The runs are of different matrices or cut differently: their distances between
            blocks have nothing to do with each other.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least 2 runs, got {len(runs)}")
    from blockspec.figures import plots
    from blockspec.figures.stages import stage_title

    names = _names(runs)
    found = {name: load_run(run) for name, run in zip(names, runs, strict=True)}
    spectra = {name: run.table for name, run in found.items()}
    records = {name: run.record for name, run in found.items()}
    _check_comparable(records, spectra)
    figures = {"comparison": plots.compare_runs(spectra)}
    console = Console()
    for name, table in spectra.items():
        say(console, f"{name}:", *(f"  {line}" for line in described(records[name], table)))
    tables = _distances_of(dict(zip(names, runs, strict=True)))
    written = ""
    if tables:
        first = {name: next(iter(_distances(table).items())) for name, table in tables.items()}
        labels = {name: stage_labels(table) for name, table in tables.items()}
        maps = {
            f"{name}, {stage_title(step, labels[name])}": distance
            for name, (step, distance) in first.items()
        }
        figures["distances"] = plots.distance_heatmaps(maps)
        joined = _means(tables)
        write_parquet(joined, out / "comparison.parquet")
        chosen = joined[joined["definition"] == "jensen-shannon"].set_index("run")
        title = "mean Jensen-Shannon divergence over all pairs of blocks (nats)"
        numbers = _written(chosen[["js0", "js0_stderr"]])
        frame = pd.DataFrame(_stage_column(chosen) | dict(numbers.items()))
        print_frame(console, frame, title)
        written = f"table: {out / 'comparison.parquet'}   "
    paths = [plots.save(figure, out / "figures", name) for name, figure in figures.items()]
    say(console, f"{written}figures: {', '.join(map(str, paths))}")


def _check_comparable(
    records: Mapping[str, Mapping[str, Any]], spectra: Mapping[str, pd.DataFrame]
) -> None:
    for word, values in {
        "matrix": {n: ", ".join(sorted(t["curvature"].unique())) for n, t in spectra.items()},
        "partition": {name: partition_of(record) for name, record in records.items()},
    }.items():
        if len(set(values.values())) > 1:
            told = "; ".join(f"{name}: {value}" for name, value in values.items())
            raise ValueError(
                f"the runs are not of the same {word} ({told}), so that their numbers say nothing "
                "about each other: compare runs that share both, matrix and partition"
            )


def _distances_of(runs: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """Run -> its heterogeneity.parquet, where it has one (a single block has none)."""
    paths = {name: run / "heterogeneity.parquet" for name, run in runs.items()}
    return {name: pd.read_parquet(path) for name, path in paths.items() if path.exists()}


def _means(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    means = [
        table.drop_duplicates(["definition", "step"]).assign(run=name)
        for name, table in tables.items()
    ]
    return pd.concat(means)[["run", "step", "label", "definition", "js0", "js0_stderr"]]


def _names(runs: list[Path]) -> list[str]:
    """The folders' names, or their paths where names repeat."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
