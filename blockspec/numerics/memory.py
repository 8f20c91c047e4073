"""How much memory there is, and how much a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
PAGE = resource.getpagesize()
DONTNEED = 4  # of madvise, on Linux
MOST = 2**60  # bytes: more is a mistake
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"


@dataclass
class Peak:
    """Bytes in use before, and at most while it was watched."""

    before: int = 0
    peak: int = 0

    @property
    def growth(self) -> int:
        return max(self.peak - self.before, 0)


@contextmanager
def watched(device: torch.device) -> Iterator[Peak]:
    """Measures the peak of the device's memory while it is open; on a CPU the process's resident
    set.
    """
    result = Peak()
    trim()
    if device.type == "cuda":
        _cuda().reset_peak_memory_stats(device)
        result.before = _cuda().memory_allocated(device)
    else:
        _reset_high_water()
        result.before = resident()
    try:
        yield result
    finally:
        result.peak = (
            _cuda().max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
        )


def trim() -> None:
    """Gives what was freed back to the system: what the C library keeps for later would count as in
    use, and what then goes into it would not show as growth.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def let_go(address: int, size: int) -> None:
    """Takes pages of mapped files out of the resident set; the system keeps them as long as it has
    room, and they are mapped again when they are read.

    Pages that somebody has written to, and memory that belongs to no file, are left alone: nothing
    is lost.

    Args:
        address: Where the memory begins.
        size: In bytes; whole pages within are meant.
    """
    first, end = -(-address // PAGE), (address + size) // PAGE
    if end <= first or not all(map(_of_a_file, _page_entries(first, 1))):
        return
    entries = _page_entries(first, end - first)
    if len(entries) == end - first and all(map(_of_a_file, entries)):
        with suppress(AttributeError):  # another C library
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(first * PAGE), ctypes.c_size_t((end - first) * PAGE), DONTNEED)


def _page_entries(first: int, count: int) -> array[int]:
    """What the kernel says of pages; fewer where it does not."""
    found = array("Q")
    with suppress(OSError), Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        found.frombytes(file.read(8 * count))
    return found


def _of_a_file(entry: int) -> bool:
    """Neither in memory nor swapped out, or a page of a file or of what processes share."""
    return not entry >> 62 or bool(entry >> 61 & 1)


def resident() -> int:
    """Bytes of the process's resident set now."""
    return _status("VmRSS")


def highest() -> int:
    """Bytes of the process's resident set at its peak so far, or since that was last watched."""
    return _status("VmHWM")


def used(device: torch.device) -> int:
    """Bytes that are in use now: on the device, or by this process."""
    return _cuda().memory_allocated(device) if device.type == "cuda" else resident()


def total(device: torch.device) -> int:
    """Bytes that the device has, or that this machine or its container lets a process have."""
    if device.type == "cuda":
        return _cuda().get_device_properties(device).total_memory
    limits = [int(_meminfo("MemTotal"))]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def free(device: torch.device) -> int:
    """Bytes that nobody uses now: on the device, or of what a process may still have."""
    if device.type == "cuda":
        own = _cuda().memory_reserved(device) - _cuda().memory_allocated(device)
        return int(_cuda().mem_get_info(device)[0]) + own
    return min(_meminfo("MemAvailable"), total(device) - resident())


def parse(limit: int | float | str, device: torch.device) -> int:
    """Bytes from a number of bytes, a share of the device (``0.8``, ``"80%"``) or a size
    (``"20GiB"``, ``"500 MB"``: powers of 1024).
    """
    share, size = _read(limit)
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"memory as a share of the device lies between 0 and 1, got {limit!r}")
        return int(share * total(device))
    if size < 1:
        raise ValueError(f"memory must be positive, got {limit!r}")
    if size > MOST:
        raise ValueError(f"memory is at most {readable(MOST)}, got {limit!r}")
    return int(size)


def _read(limit: int | float | str) -> tuple[float | None, float]:
    """A share of the device, or None and a number of bytes."""
    if isinstance(limit, str):
        text = limit.strip().lower()
        if match := re.fullmatch(rf"({NUMBER})\s*%", text):
            return float(match[1]) / 100, 0
        if match := re.fullmatch(rf"({NUMBER})\s*([kmgt]?)(i?b)?", text):
            number, unit, byte = float(match[1]), match[2], match[3]
            if not unit and not byte and number <= 1 and "." in match[1]:
                return number, 0
            return None, number * UNITS[unit]
    elif isinstance(limit, float) and limit <= 1:
        return limit, 0
    elif isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit == limit:
        return None, limit
    raise ValueError(
        "memory is a number of bytes, a share of the device (0.8, 80%) or a size (20GiB), "
        f"got {limit!r}"
    )


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )


def readable(size: float) -> str:
    """``3.2 GiB``"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _cuda() -> Any:
    import torch  # here: printing a size takes no torch

    return torch.cuda


def _status(field: str) -> int:
    return int(_field(Path("/proc/self/status").read_text(), field)) * 1024


def _meminfo(field: str) -> int:
    return int(_field(Path("/proc/meminfo").read_text(), field)) * 1024


def _field(text: str, field: str) -> str:
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert match, f"no {field} in /proc"
    return match[1]


def _reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except (
        OSError
    ):  # not allowed in some containers: the peak is then that of the process's whole life
        return
