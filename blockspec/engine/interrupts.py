"""Ctrl-C where a state can be saved: the sweep that is under way is finished first, so that none of
its products are lost.

A launcher of several processes passes Ctrl-C on, or sends SIGTERM; one process may hear of it a
sweep before the others. So they agree after each sweep, see :class:`blockspec.engine.state.Keeper`.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from blockspec.numerics.ranks import is_first

SAVED = "its sweeps are saved"
ECHO = 1.0  # seconds in which the terminal and the launcher send the same Ctrl-C
DEFAULT = (signal.default_int_handler, signal.SIG_DFL)


@contextmanager
def held_back(*, wanted: bool, several: bool = False) -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed; a second one stops at once.

    Args:
        wanted: False changes nothing, and the function always says no. So it is where somebody
            handles the signal already, and outside of the main thread.
        several: A launcher has started several processes, and may say it by SIGTERM.
    """
    signals = (signal.SIGINT, signal.SIGTERM) if several else (signal.SIGINT,)
    before = {number: signal.getsignal(number) for number in signals}
    main = threading.current_thread() is threading.main_thread()
    if not (wanted and main and all(handler in DEFAULT for handler in before.values())):
        yield lambda: False
        return
    pressed: float | None = None

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed is None:
            pressed = time.monotonic()
            if is_first():
                print(f"\n{_told(several)}", file=sys.stderr, flush=True)
        elif not several or time.monotonic() - pressed > ECHO:
            raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, note)
    try:
        yield lambda: pressed is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(several: bool) -> str:
    told = "blockspec: stopping after this sweep, which is saved; Ctrl-C again stops at once"
    if not several:
        return told
    return f"{told}. A launcher may not wait so long: torchrun has --shutdown-timeout (30 s)"
