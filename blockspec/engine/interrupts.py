"""Ctrl-C where a state can be saved: the sweep that is under way is finished first, so that none of
its products are lost.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back(*, wanted: bool) -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed; a second one stops at once.

    Args:
        wanted: False changes nothing, and the function always says no. So it is where somebody
            handles the signal already, and outside of the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (wanted and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: False
        return
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        told = "blockspec: stopping after this sweep, which is saved; Ctrl-C again stops at once"
        print(f"\n{told}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
