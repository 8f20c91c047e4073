"""An exhibit is a figure or table of a paper that is measured anew: its tables, figures and
findings in one folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from matplotlib.figure import Figure

from blockspec.engine.state import differences
from blockspec.figures.plots import save
from blockspec.runs.json_files import read_json, write_json
from blockspec.runs.record import git_commit, versions
from blockspec.spectra.collection import write_parquet
from training.command import run_command

Tables = Mapping[str, pd.DataFrame]
Verdict = Literal["agrees", "disagrees", "not comparable"]


@dataclass(frozen=True)
class Finding:
    """A claim of a paper beside what was measured.

    Args:
        claim: What the paper says, in words; a number only where it is the paper's own.
        measured: What we found, with its error.
        verdict: agrees, disagrees or not comparable.
        why: What decided it, or what differs.
    """

    claim: str
    measured: str
    verdict: Verdict
    why: str

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict is one of {get_args(Verdict)}, got {self.verdict!r}")


@dataclass(frozen=True)
class Context:
    """What the work may use.

    Args:
        seed: Of everything random.
        runs: Folder for trainings and spectra, shared by all exhibits of one scale.
        needed: Tables of the exhibits that this one needs, by name.
        workers: Processes at once.
        device: auto, cpu, cuda …
    """

    seed: int
    runs: Path
    needed: Mapping[str, Tables] = field(default_factory=dict)
    workers: int = 1
    device: str = "auto"


@dataclass(frozen=True)
class Scale:
    """One size of an exhibit.

    Args:
        settings: A dataclass of plain values.
        setup: What is measured, and how it differs from the paper.
        cost: Time and machine, measured or estimated, and said which.
    """

    settings: Any
    setup: str
    cost: str


@dataclass(frozen=True)
class Exhibit:
    """A figure or table of a paper; see the package's docstring for the functions.

    Args:
        name: The module's name.
        title: A line.
        source: Paper and number.
        measure: ``measure(settings, context)`` -> tables.
        draw: ``draw(tables)`` -> figures.
        judge: ``judge(tables)`` -> findings.
        scales: small and paper.
        needs: Names of exhibits whose tables or runs are used; they come first.
        shown: Tables that are printed in the document.
    """

    name: str
    title: str
    source: str
    measure: Callable[[Any, Context], Tables]
    draw: Callable[[Tables], Mapping[str, Figure]]
    judge: Callable[[Tables], Sequence[Finding]]
    scales: Mapping[str, Scale]
    needs: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


def find(name: str) -> Exhibit:
    """The exhibit of the module ``paper.<name>``."""
    return importlib.import_module(f"paper.{name}").EXHIBIT


def reproduce(
    exhibit: Exhibit,
    *,
    scale: str = "small",
    out: Path | str = "runs/paper",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    device: str = "auto",
) -> Path:
    """Measures what is not there yet, and draws and judges it anew.

    Returns:
        The exhibit's folder.

    Raises:
        ValueError: unknown settings, or a folder that holds a measurement of other ones.
    """
    folder = Path(out) / scale / exhibit.name
    tables = measured(
        exhibit,
        scale=scale,
        out=out,
        seed=seed,
        settings=settings or {},
        workers=workers,
        device=device,
    )
    for name, figure in exhibit.draw(tables).items():
        print(save(figure, folder / "figures", name))
    write_json(
        {"findings": [dataclasses.asdict(finding) for finding in exhibit.judge(tables)]},
        folder / "findings.json",
    )
    return folder


def measured(
    exhibit: Exhibit,
    *,
    scale: str,
    out: Path | str,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    device: str = "auto",
) -> Tables:
    """The tables of an exhibit: those that are there, or measured now, after those that it needs.

    settings: to replace; None: whatever those that are there were measured with.
    """
    folder = Path(out) / scale / exhibit.name
    chosen = _replaced(exhibit.scales[scale].settings, settings or {})
    asked = as_json(chosen)
    if settings is None and (folder / "record.json").exists():
        asked = read_json(folder / "record.json")["settings"]
    asked = {**asked, "seed": seed}
    tables = _read(folder, asked)
    if tables is None:
        same = {"scale": scale, "out": out, "seed": seed, "workers": workers, "device": device}
        needed = {name: measured(find(name), **same) for name in exhibit.needs}
        start = time.perf_counter()
        context = Context(seed, Path(out) / scale / "runs", needed, workers, device)
        tables = exhibit.measure(chosen, context)
        _write(folder, tables, asked, seconds=time.perf_counter() - start)
    return tables


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of an exhibit, by name."""
    return {
        name: pd.read_parquet(folder / f"{name}.parquet")
        for name in read_json(folder / "record.json")["tables"]
    }


def read_findings(folder: Path) -> list[Finding]:
    return [Finding(**finding) for finding in read_json(folder / "findings.json")["findings"]]


def with_error(value: float, error: float | None) -> str:
    """``3.21 ± 0.04``: two digits of the error, as many places of the value; an error of None or
    nan is said to be unknown.
    """
    if error is None or error != error:
        return f"{value:.3g} (error unknown)"
    if error <= 1e-9 * abs(value):  # rounding
        return f"{value:.4g}"
    places = max(0, 1 - int(f"{error:.1e}".split("e")[1]))
    return f"{value:.{places}f} ± {error:.{places}f}"


def command(exhibit: Exhibit, arguments: Sequence[str] | None = None) -> None:
    """The exhibit's command line."""

    def run(
        *,
        scale: Literal["small", "paper"] = "small",
        out: str = "runs/paper",
        seed: int = 0,
        settings: dict[str, Any] = {},  # noqa: B006
        workers: int = 2,
        device: str = "auto",
    ) -> None:
        if scale == "small":
            torch.set_num_threads(1)  # the models are too small for more
        folder = reproduce(
            exhibit,
            scale=scale,
            out=out,
            seed=seed,
            settings=settings,
            workers=workers,
            device=device,
        )
        for finding in read_findings(folder):
            print(f"{finding.verdict}: {finding.claim}\n    {finding.measured}")

    costs = "; ".join(
        f"{name}: {scale.setup} {scale.cost}" for name, scale in exhibit.scales.items()
    )
    run.__doc__ = f"""{exhibit.title} ({exhibit.source}). {costs}

    Args:
        scale: small (embedded data) or paper (the paper's own models and data).
        out: Folder of all exhibits; this one is in <scale>/{exhibit.name} below.
        seed: Of everything random.
        settings: Fields of the scale's settings to replace: --settings.<field> <value>.
        workers: Processes at once, for exhibits of many trainings.
        device: auto, cpu, cuda …
    """
    run_command(run, arguments)


def as_json(settings: Any) -> dict[str, Any]:
    """A dataclass of plain values, as a file of JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _replaced(settings: Any, changes: Mapping[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(settings)]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"no setting {unknown[0]!r}: there are {', '.join(names)}")
    return dataclasses.replace(settings, **changes)


def _read(folder: Path, asked: Mapping[str, Any]) -> Tables | None:
    """The tables, if they have been measured."""
    if not (folder / "record.json").exists():
        return None
    if different := differences(read_json(folder / "record.json")["settings"], asked):
        raise ValueError(
            f"{folder} holds other settings ({'; '.join(different)}): delete it or choose another "
            "--out"
        )
    return read_tables(folder)


def _write(folder: Path, tables: Tables, settings: Mapping[str, Any], *, seconds: float) -> None:
    """The record comes last: it says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_parquet(table, folder / f"{name}.parquet")
    record = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings,
        "tables": list(tables),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(record, folder / "record.json")
