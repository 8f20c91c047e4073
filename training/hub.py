"""The Hugging Face hub, or what of it is on this machine; finding out which takes seconds, not
minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets.config
from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE = 5.0  # seconds; the libraries themselves try six times in a row, for every file


def hub_reachable() -> bool:
    """One request, through the same proxies and certificates as the libraries' own."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever the HTTP library calls it
        return False
    return True


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within it, Hugging Face libraries look into their cache only, if the hub cannot be
    reached.
    """
    if hub_reachable():
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise OSError(
            f"{reason}. {constants.ENDPOINT} cannot be reached and this machine has no copy: "
            "give a local file or folder, or connect and try again"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
