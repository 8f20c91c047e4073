"""Every exhibit, then the document: ``python -m paper.all``; at small scale at most half an hour on
two cores.

An exhibit that fails is named at the end, with its log; the others go on. A second call does what
is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

from paper import EXHIBITS, reproduction
from paper.exhibit import find
from training.command import run_command


def run_all(
    *,
    scale: Literal["small", "paper"] = "small",
    out: str = "runs/paper",
    seed: int = 0,
    names: Sequence[str] = EXHIBITS,
    workers: int = 2,
    device: str = "auto",
) -> None:
    """Reproduces every exhibit, each in a process of its own, and writes
    <out>/<scale>/REPRODUCTION.md.

    Args:
        scale: small (embedded data) or paper (the paper's own models and data).
        out: Folder of all exhibits.
        seed: Of everything random.
        names: The exhibits; all by default.
        workers: Exhibits at once, each on one core at small scale.
        device: auto, cpu, cuda …
    """
    options = {"scale": scale, "out": out, "seed": seed, "workers": 1, "device": device}
    start = time.perf_counter()
    failed = _in_order(names, options, workers)
    folder = Path(out) / scale
    there = [name for name in EXHIBITS if (folder / name / "findings.json").exists()]
    print(
        f"{reproduction.write(folder, there, folder)}  ({(time.perf_counter() - start) / 60:.1f} "
        "minutes)"
    )
    if failed:
        print(
            f"failed: {', '.join(f'{name} ({reason})' for name, reason in failed.items())}",
            file=sys.stderr,
        )
        sys.exit(1)


def _in_order(names: Sequence[str], options: dict[str, object], workers: int) -> dict[str, str]:
    """Runs each exhibit after those that it needs, longest chains first, and the ends of chains
    before what stands alone; returns why some have failed.
    """
    needs, failed = _needs(names)
    waiting, running = list(needs), dict[Future[str | None], str]()
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            for name in sorted(waiting, key=lambda name: (-_chain(name, needs), not needs[name])):
                if lost := needs[name] & failed.keys():
                    failed[name] = f"needs {', '.join(sorted(lost))}"
                    waiting.remove(name)
                elif len(running) < workers and not needs[name] & {*waiting, *running.values()}:
                    running[pool.submit(_run, name, options)] = name
                    waiting.remove(name)
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(job)
                if reason := job.result():
                    failed[name] = reason
    return failed


def _needs(names: Sequence[str]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """What each exhibit needs, with those that are needed; and why some cannot be imported."""
    needs: dict[str, set[str]] = {}
    failed: dict[str, str] = {}
    todo = list(names)
    for name in todo:
        if name in needs or name in failed:
            continue
        try:
            needs[name] = set(find(name).needs)
        except Exception as error:  # one failure among others
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            todo += needs[name]
    return needs, failed


def _chain(name: str, needs: Mapping[str, set[str]]) -> int:
    """How many exhibits wait for this one, one after the other."""
    return 1 + max(
        (_chain(other, needs) for other, needed in needs.items() if name in needed), default=0
    )


def _run(name: str, options: dict[str, object]) -> str | None:
    """Runs one exhibit; returns why it failed."""
    folder = Path(str(options["out"])) / str(options["scale"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    arguments = [f"--{key}={value}" for key, value in options.items()]
    threads = {"OMP_NUM_THREADS": "1"} if options["scale"] == "small" else {}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", f"paper.{name}", *arguments]
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | threads, check=False
        ).returncode
    print(
        f"{name}: {'done' if code == 0 else 'FAILED'} after {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return None if code == 0 else f"exit code {code}, see {folder / 'log.txt'}"


if __name__ == "__main__":
    run_command(run_all)
