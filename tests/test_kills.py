"""A run that is killed at random file operations, over three checkpoints, ends with the tables of
an unbroken one.
"""

import json
import os
import random
import signal
import sys

import factories_for_runs as factories
import pandas as pd
import pytest
from launching import forks
from test_cli import invoke, run_arguments

KILLS = int(os.environ.get("KILLS", "3"))
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def in_a_child(out, fatal, arguments):
    """Exit code of the command in a forked process that is killed at its ``fatal``-th file
    operation in the folder.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def watch(event, given):
        nonlocal count
        if event in WATCHED and any(str(a).startswith(str(out)) for a in given):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os._exit(invoke(*run_arguments(out), *arguments).code)


@forks
@pytest.mark.slow
def test_killed_at_random_file_operations(tmp_path):
    """KILLS=25 is the long version."""
    paths = factories.write_checkpoints(tmp_path / "checkpoints", [1, 2, 3])
    arguments = ("--checkpoints", json.dumps([str(path) for path in paths]), "--state_every", "0")
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert in_a_child(whole, -1, arguments) == 0
    moments, kills = random.Random(0), 0
    while (
        code := in_a_child(out, moments.randrange(1, 60) if kills < KILLS else -1, arguments)
    ) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 1
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("spectra.parquet", "heterogeneity.parquet"):
        tables = [pd.read_parquet(folder / name) for folder in (whole, out)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
