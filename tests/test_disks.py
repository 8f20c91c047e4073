"""Disks that are full, limited, read-only or gone in the middle of a run: one line that says so,
nothing lost that was complete, and the same command goes on to the tables of an unbroken run.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import factories_for_runs as factories
import pandas as pd
import pytest
from launching import forks
from test_cli import invoke, run_arguments

from blockspec.engine import state
from blockspec.runs import record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts are Linux's")
NEW_USER, NEW_MOUNTS = 0x10000000, 0x20000  # of unshare(2)
READ_ONLY, REMOUNT = 1, 32  # of mount(2)
TABLES = ("spectra.parquet", "heterogeneity.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The arguments of a run over two checkpoints, its folder, and how many losses it takes."""
    folder = tmp_path_factory.mktemp("whole")
    paths = factories.write_checkpoints(folder / "checkpoints", [1, 2])
    arguments = ("--checkpoints", json.dumps([str(path) for path in paths]), "--state_every", "0")
    factories.reset()
    assert invoke(*run_arguments(folder / "run"), *arguments).code == 0
    return arguments, folder / "run", factories.calls["loss"]


def again(out, whole):
    """The same command on a sound disk: its tables are right; the number of losses it took."""
    arguments, expected, _ = whole
    factories.reset()
    result = invoke(*run_arguments(out), *arguments)
    assert result.code == 0, result.err
    for name in TABLES:
        pd.testing.assert_frame_equal(
            pd.read_parquet(out / name), pd.read_parquet(expected / name), check_exact=True
        )
    assert sorted(path.name for path in out.iterdir()) == sorted(["run.json", *TABLES])
    return factories.calls["loss"]


def in_a_child(function):
    """What ``function`` gives in a forked process, which may mount what it likes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = [True, function()]
        except BaseException as error:
            told = [False, f"{type(error).__name__}: {error}"]
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        sound, found = json.loads(file.read())
    os.waitpid(child, 0)
    if not sound and "Skipped" in found:
        pytest.skip(found)
    assert sound, found
    return found


def own_mounts():
    """Mounts of this process are its own from here on; needs no rights where user namespaces are
    allowed.
    """
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS):
        pytest.skip("Skipped: this system does not allow user namespaces")
    with contextlib.suppress(OSError):  # older kernels have no such file
        Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(folder, size, flags=0):
    libc, folder = ctypes.CDLL(None, use_errno=True), str(folder).encode()
    if libc.mount(b"none", folder, b"tmpfs", flags, f"size={size}".encode()):
        if ctypes.get_errno() in (errno.EPERM, errno.EACCES):
            pytest.skip("Skipped: this system does not allow mounts")
        raise OSError(ctypes.get_errno(), "mount")


@forks
@pytest.mark.slow
@pytest.mark.parametrize(("size", "complete"), [("44k", []), ("168k", [1])])
def test_a_disk_that_fills_up(tmp_path, whole, size, complete):
    """By the first state, and by a state of the second checkpoint."""

    def fill():
        own_mounts()
        mount(tmp_path, size)
        out = tmp_path / "run"
        full = invoke(*run_arguments(out), *whole[0])
        assert full.code == 1
        assert "No space left on device" in full.err
        assert "what was saved before is kept" in full.err
        names = [str(path) for path in out.rglob("*")] if out.exists() else []
        assert not [name for name in names if name.endswith(".partial")]
        assert steps_of(out) == complete
        mount(tmp_path, "10m", REMOUNT)
        return again(out, whole)

    taken = in_a_child(fill)
    assert taken < whole[2] if complete else taken <= whole[2]


def steps_of(out):
    """Which stages a run's record has as complete."""
    if not (out / "run.json").exists():
        return []
    return [stage["step"] for stage in json.loads((out / "run.json").read_text())["stages"]]


@forks
@pytest.mark.slow
def test_a_folder_that_becomes_read_only(tmp_path, whole, monkeypatch):
    def freeze():
        own_mounts()
        mount(tmp_path, "10m")
        out, save = tmp_path / "run", state.Keeper.save

        def saving(keeper, schedule):
            save(keeper, schedule)
            if keeper.folder.name == "step_2":
                mount(tmp_path, "10m", REMOUNT | READ_ONLY)

        state.Keeper.save = saving
        frozen = invoke(*run_arguments(out), *whole[0])
        state.Keeper.save = save
        assert frozen.code == 1
        assert "Read-only file system" in frozen.err
        assert len(frozen.err.strip().split("blockspec: error:")[-1].splitlines()) == 1
        assert steps_of(out) == [1]
        mount(tmp_path, "10m", REMOUNT)
        return again(out, whole)

    assert in_a_child(freeze) < whole[2] / 2 + 8


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself sets it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 4000])
def test_a_limit_on_the_size_of_files(tmp_path, whole, size, monkeypatch):
    """Met by a state, and by what is written at the end of a stage."""
    out = tmp_path / "run"
    with largest_file(size), monkeypatch.context() as patched:
        if size > 1000:  # states are larger than tables: they are let through
            patched.setattr(state.Keeper, "save", lambda *_: None)
        limited = invoke(*run_arguments(out), *whole[0])
    assert limited.code == 1
    assert "File too large" in limited.err
    assert str(out) in limited.err
    assert steps_of(out) == []
    again(out, whole)


@pytest.mark.slow
def test_a_folder_that_is_deleted_between_sweeps(tmp_path, whole, monkeypatch):
    """The states that follow make it anew; what is lost is measured again."""
    out, save = tmp_path / "run", state.Keeper.save

    def saving(keeper, schedule):
        if keeper.folder.name == "step_2":
            shutil.rmtree(out, ignore_errors=True)
        save(keeper, schedule)

    with monkeypatch.context() as patched:
        patched.setattr(state.Keeper, "save", saving)
        deleted = invoke(*run_arguments(out), *whole[0])
    assert deleted.code == 1
    assert "was the folder deleted or moved? The same command measures them again" in deleted.err
    again(out, whole)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, whole):
    _, expected, _ = whole
    out = tmp_path / "run"
    shutil.copytree(expected, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with largest_file(100), pytest.raises(OSError, match=r"run\.json"):
        record.write_record(out, json.loads(before["run.json"]))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
