"""Ctrl-C: the sweep is finished and saved, and the same call goes on from there."""

import os
import signal

import numpy as np
import problems
import pytest

from blockspec import estimate_spectra, partition

SETTINGS = {"num_probes": 2, "num_steps": 4}


@pytest.fixture(autouse=True)
def _ctrl_c():
    """As in a terminal: a shell starts what runs in its background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stopped_estimate_goes_on_where_its_sweep_ended(tmp_path, capsys):
    it = problems.nanogpt()
    arguments = it.objective(), partition(it.model, include="*h.0*c_attn*")
    expected = estimate_spectra(*arguments, **SETTINGS)
    told = []

    def press(done, total):
        told.append(done)
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        estimate_spectra(*arguments, **SETTINGS, state=tmp_path, progress=press)
    assert len(told) == 2
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this sweep, which is saved" in capsys.readouterr().err
    rest = []
    found = estimate_spectra(
        *arguments, **SETTINGS, state=tmp_path, progress=lambda done, total: rest.append(done)
    )
    assert rest[0] > told[-1]
    for name in expected:
        np.testing.assert_array_equal(found[name].nodes, expected[name].nodes)


def test_without_a_state_it_stops_at_once():
    it = problems.nanogpt()
    told = []

    def press(done, total):
        told.append(done)
        os.kill(os.getpid(), signal.SIGINT)
        told.append("went on")

    with pytest.raises(KeyboardInterrupt):
        estimate_spectra(it.objective(), partition(it.model), **SETTINGS, progress=press)
    assert len(told) == 1
