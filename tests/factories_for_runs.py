"""Factories for the tests of runs; ``calls`` tells how often models and losses were asked for."""

import os
import signal
from pathlib import Path

import problems
import torch

from blockspec import losses

calls = {"factory": 0, "loss": 0, "fail_at_loss": None}


def reset():
    calls.update(factory=0, loss=0, fail_at_loss=None)


def _counted(loss):
    def outputs(model, batch):
        calls["loss"] += 1
        if calls["loss"] == calls["fail_at_loss"]:
            raise RuntimeError("killed on the way")
        return loss.outputs(model, batch)

    return losses.Loss(outputs, loss.terms)


def tiny(*, checkpoint: str | None = None, shift: float = 0.0, tokens: int = 6):
    """A nanoGPT on a few tokens.

    Args:
        checkpoint: A state dict.
        shift: Added to every parameter.
        tokens: Length of a sequence.
    """
    calls["factory"] += 1
    it = problems.nanogpt()
    if checkpoint is not None:
        it.model.load_state_dict(torch.load(checkpoint))
    with torch.no_grad():
        for p in it.model.parameters():
            p.add_(shift)
    return it.model, [(x[:, :tokens], y[:, :tokens]) for x, y in it.batches], _counted(it.loss)


def mortal(*, dying_rank: int, after: int, mark: str):
    """A nanoGPT in four batches, of which one process kills itself at a number of losses.

    Args:
        dying_rank: Of the process.
        after: Losses that it computes before.
        mark: File that it leaves.
    """
    it = problems.nanogpt()
    seen = 0

    def outputs(model, batch):
        nonlocal seen
        seen += 1
        if seen > after and int(os.environ.get("RANK", "0")) == dying_rank:
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return it.loss.outputs(model, batch)

    return it.model, [*it.batches, *it.batches], losses.Loss(outputs, it.loss.terms)


def write_checkpoints(folder, steps):
    """State dicts of a model that drifts; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for step in steps:
        model = problems.roughened(problems.nanogpt().model, size=0.02 * (step % 7 + 1), seed=step)
        paths.append(folder / f"step_{step:06d}.pt")
        torch.save(model.state_dict(), paths[-1])
    return paths
