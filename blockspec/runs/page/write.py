"""The page: a template, the script of plotly, numbers, and what is known of the run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from blockspec.figures.panels import DENSITY, EIGENVALUE
from blockspec.figures.style import KINDS
from blockspec.numerics.files import whole_file
from blockspec.numerics.memory import readable
from blockspec.runs.loading import Run, load_run
from blockspec.runs.page.answer import sentences
from blockspec.runs.page.curves import (
    DEEPEST,
    PER_DECADE,
    PER_NAT,
    PER_UNIT,
    Store,
    curves,
    deflated,
    distances,
    points_of,
)
from blockspec.runs.page.numbers import NUMBERS, Maps, as_json, distance_maps
from blockspec.runs.report import duration

UNKNOWN = "not known"
DEFINITIONS = ("jensen-shannon", "resolved")
"""Distances that have a bound, ln 2: a map of the others says less."""


def report(folders: Sequence[Path], out: Path) -> Path:
    """Writes one page for one run or several, whole or not at all; returns its path.

    Args:
        folders: Of runs.
        out: The page, an HTML file.

    Raises:
        FileNotFoundError: A folder is no run's.
        ValueError: A run is damaged, or plotly is not installed.
    """
    script = _plotly()
    runs = dict(zip(_names(folders), map(load_run, folders), strict=True))
    maps = [_maps(run) for run in runs.values()]
    several = len(runs) > 1
    here = files("blockspec.runs.page")
    text = {name: (here / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    filled = Template(text["html"]).substitute(
        title=escape(", ".join(runs)),
        css=text["css"],
        js=text["js"],
        plotly=script,
        data=_data(runs, maps),
        answers="".join(
            _heading(name, several) + _answer(run, its)
            for (name, run), its in zip(runs.items(), maps, strict=True)
        ),
        plans="".join(_heading(name, several) + _plan(run) for name, run in runs.items()),
        origins="".join(_heading(name) + _origin(run) for name, run in runs.items()),
        several="" if several else "hidden",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        partial.write_text(filled, encoding="utf-8")
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The last two folders of each path (``embedded_tiny/spectra``), or the whole where these
    repeat.
    """
    ends = ["/".join(folder.resolve().parts[-2:]).lstrip("/") for folder in folders]
    return ends if len(set(ends)) == len(ends) else [str(folder) for folder in folders]


def _plotly() -> str:
    """Its script, deflated: the page reads it when sentences and tables are shown."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError(
            "a report needs plotly, which is not installed: pip install 'blockspec[report]'"
        ) from None
    return deflated(get_plotlyjs().encode())


def _data(runs: Mapping[str, Run], maps: Sequence[dict[str, Maps]]) -> str:
    store, points = Store(), points_of(runs.values())
    described = [
        as_json(run, name)
        | {"curves": curves(run, points, store), "distances": distances(its, store)}
        for (name, run), its in zip(runs.items(), maps, strict=True)
    ]
    kinds = {block.role for run in runs.values() for block in run.blocks}
    return store.packed(
        {
            "runs": described,
            "numbers": NUMBERS,
            "kinds": {kind: KINDS[kind].label for kind in KINDS if kind in kinds},
            "units": {"eigenvalue": EIGENVALUE, "density": DENSITY},
            "scales": {"decade": PER_DECADE, "unit": PER_UNIT, "nat": PER_NAT, "deepest": DEEPEST},
        }
    )


def _maps(run: Run) -> dict[str, Maps]:
    found = {definition: distance_maps(run, definition) for definition in DEFINITIONS}
    return {definition: maps for definition, maps in found.items() if maps is not None}


def _answer(run: Run, maps: dict[str, Maps]) -> str:
    told = sentences(run, maps.get("jensen-shannon"))
    lines = "".join(f"<li>{sentence}</li>" for sentence in told if sentence)
    return f"<ul class='answer'>{lines}</ul>"


def _heading(name: str, shown: bool = True) -> str:
    return f"<h3>{escape(name)}</h3>" if shown else ""


def _plan(run: Run) -> str:
    """Plan against actual, a row a stage."""
    rows = []
    for step in run.steps:
        entry = run.entry(step)
        planned, cost = entry.get("planned") or {}, entry.get("cost") or {}
        rows.append(
            [
                run.labels.get(step, f"{step:,}"),
                _cell(entry.get("seconds"), duration),
                _cell(planned.get("seconds"), duration),
                _cell(entry.get("peak"), readable),
                _cell(planned.get("peak"), readable),
                _cell(cost.get("products"), "{:,}".format),
                _cell(planned.get("products"), "{:,}".format),
            ]
        )
    names = ["stage" if run.labels else "step", "time", "planned", "peak memory", "planned"]
    names += ["products", "planned"]
    return _table(names, rows)


def _cell(value: Any, written: Any) -> str:
    return UNKNOWN if value is None else written(value)


def _origin(run: Run) -> str:
    """Settings, versions, the commits, and the command that makes it again."""
    record = run.record
    rows = list(_flat(record.get("settings", {})))
    rows += [(f"version of {name}", v) for name, v in record.get("versions", {}).items()]
    commits = dict.fromkeys(
        entry.get("git_commit") or "none" for entry in map(run.entry, run.steps)
    )
    rows += [("commits", ", ".join(commits)), ("machine", json.dumps(record.get("machine")))]
    rows += [("started", record.get("started")), ("finished", record.get("finished"))]
    rows += [(run.called(step), _digests(run.entry(step))) for step in run.steps if run.entry(step)]
    command = escape(" ".join(map(shlex.quote, _command(record))))
    table = _table(["setting", "value"], [[str(a), str(b)] for a, b in rows])
    return f"<p>The command:</p><pre><code>{command}</code></pre>{table}"


def _digests(entry: Mapping[str, Any]) -> str:
    identity = entry.get("identity", {})
    words = [str(entry["checkpoint"])] if entry.get("checkpoint") else []
    return ", ".join(words + [f"{n} {identity[n]}" for n in ("weights", "data") if n in identity])


def _flat(settings: Mapping[str, Any], above: str = "") -> Any:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value)


def _command(record: Mapping[str, Any]) -> list[str]:
    """What was typed, ``python -m blockspec`` as ``blockspec``."""
    program, *arguments = record.get("command") or ["not known"]
    return ["blockspec" if program == "__main__.py" else program, *arguments]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    rows_ = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='wide'><table>{rows_}</table></div>"
