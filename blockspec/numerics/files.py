"""Files that are whole or not there, whatever happens on the way."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system: two commands at once are then not noticed
    fcntl = None  # type: ignore[assignment]

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file in the same folder to write to; it takes the place of ``path`` when the block ends
    without an error.

    Nobody else's file is written through: the name is new, so a symbolic link cannot lie in wait
    there.

    Raises:
        OSError: The disk is full, read-only, limited or gone; with the path and the remedy.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield partial
        _to_disk(partial)
        partial.replace(path)
    except OSError as error:  # most of them name neither the file nor a remedy
        raise OSError(
            f"{path} cannot be written ({error}); what was saved before is kept: make the folder "
            "writable and large enough, and the same command goes on from there"
        ) from error
    finally:
        with suppress(OSError):  # the folder may be gone: the error under way tells
            partial.unlink(missing_ok=True)


def remove_partials(folder: Path, names: re.Pattern[str]) -> None:
    """Removes what killed programs left of files with these names; only for who alone writes
    there.
    """
    for path in folder.glob(".*.partial"):
        if (match := PARTIAL.fullmatch(path.name)) and names.fullmatch(match[1]):
            path.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds a folder for one program at a time; leaves no file in it, and ends with the process.

    Raises:
        ValueError: Another program holds the folder.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        _lock(number, folder)
        yield
    finally:
        os.close(number)
        if new:
            with suppress(OSError):  # not empty: something was written
                folder.rmdir()


def _lock(number: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another program is writing to {folder} at this moment: wait until it has ended, "
            "or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        return


def _to_disk(path: Path) -> None:
    """A name must not reach the disk before the content that it stands for."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
