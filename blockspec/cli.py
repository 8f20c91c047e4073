"""The command line: ``blockspec run|plot|compare|show``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import CLI, ArgumentError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import report
from .factories import find_factory
from .run import BlockSettings, EstimateSettings, RunSettings, measure

console = Console(stderr=True)


def run(
    model: str,
    out: Path,
    model_args: dict[str, Any] = {},  # noqa: B006
    checkpoints: list[str] = [],  # noqa: B006
    blocks: BlockSettings = BlockSettings(),
    estimate: EstimateSettings = EstimateSettings(),
    batch_norm: str = "eval",
    dtype: str | None = None,
    device: str = "auto",
    plots: bool = True,
) -> None:
    """Estimate spectra and leave a run folder: run.json, spectra.parquet, heterogeneity.parquet, figures/.

    A second call with the same settings does what is not done yet.

    Args:
        model: A factory module:function that returns (model, batches, loss), or a Hugging Face name or folder.
        out: The run's folder.
        model_args: Keyword arguments of the factory.
        checkpoints: Folders or files of checkpoints (globs allowed); each is given to the factory as checkpoint=.
        blocks: Which blocks.
        estimate: How well.
        batch_norm: eval (running statistics) or train (statistics of each batch).
        dtype: Convert the model to this dtype first, e.g. float64; as loaded if left out.
        device: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.
        plots: Draw the figures at the end.
    """
    settings = RunSettings(model, model_args, checkpoints, blocks, estimate, batch_norm, dtype)
    with _progress() as progress:
        measure(settings, find_factory(model), out, device=_device(device), progress=progress)
    if plots:
        report.draw(out)
    report.show(out)


def plot(run: Path) -> None:
    """Draw the figures of a run anew from its tables; needs no model.

    Args:
        run: A run's folder.
    """
    for path in report.draw(run):
        print(path)


def compare(runs: list[Path], out: Path) -> None:
    """Set several runs side by side: heterogeneity and spectra.

    Args:
        runs: Folders of runs.
        out: Folder for the table and the figures.
    """
    report.compare(runs, out)


def show(run: Path) -> None:
    """Print what a run found.

    Args:
        run: A run's folder.
    """
    report.show(run)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0, or 1 with one line; a traceback only with --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        CLI([run, plot, compare, show], args=arguments, prog="blockspec", as_positional=False, exit_on_error=False)
    except KeyboardInterrupt:
        console.print("blockspec: stopped; the same command goes on from the last complete step", highlight=False)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        console.print(f"blockspec: error: {_one_line(error)}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    known = (ValueError, TypeError, OSError, ArgumentError, KeyError)
    return text if isinstance(error, known) and text else f"{type(error).__name__}: {text} (--debug shows where)"


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used ({error}); devices here: cpu, or auto") from None
    return name


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar with time left, one line per stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} products"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield update


if __name__ == "__main__":
    main()
