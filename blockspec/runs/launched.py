"""Meeting the other processes of a launcher, or saying soon that they are not there."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from blockspec.numerics.ranks import is_first

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = (
    60.0  # seconds in which all processes have to come; nodes of a cluster start seconds apart
)


def join(patience: float = PATIENCE) -> bool:
    """Joins the processes that a launcher (torchrun, accelerate launch) has started.

    Args:
        patience: Seconds in which all of them have to come.

    Returns:
        Whether this process is the first.

    Raises:
        ValueError: The environment says that there are several processes, but not where they meet,
            or they do not come.
    """
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')!r}, which says that a launcher has "
            "started several processes, but "
            f"{', '.join(missing)} is not set: start with torchrun or accelerate launch, or unset "
            "WORLD_SIZE and RANK"
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        store = _meet(rank, world, patience)
        if (backend := backend_here()) == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        atexit.register(_leave)
    return is_first()


def backend_here() -> str:
    """``nccl`` where each process of this machine has a GPU of its own, which it insists on."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "gloo"


def _leave() -> None:
    """Ends the group of processes while the interpreter still stands; its threads abort a program
    that ends under them.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(rank: int, world: int, patience: float) -> dist.Store:
    """The store of the processes, when all of them have written their names into it."""
    time = timedelta(seconds=patience)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=time))
        store.set(f"blockspec/{rank}", "here")
        store.wait([f"blockspec/{other}" for other in range(world)], time)
    except (RuntimeError, ValueError, OSError) as error:  # DistStoreError is a RuntimeError
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"process {rank} has waited {patience:g} s for all {world} processes to meet at "
            f"{where} ({_first_line(error)}): "
            "start all of them, or unset WORLD_SIZE and RANK for one process alone"
        ) from None
    return store


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
