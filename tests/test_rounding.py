"""Blocks whose products are rounding: they are said, their errors hold it, and they take no data."""

import warnings

import numpy as np
import pytest
import torch
from problems import problem, tokens

from blockspec import FunctionOperator, Objective, estimate_spectra, losses, partition


def attention(units=2, dtype=torch.float32):
    it = problem("gpt2")
    model = type(it.model)(it.model.config)  # the problem's own is shared
    model.load_state_dict(it.model.state_dict())
    batches = [{"input_ids": tokens(1, 6, seed=seed)} for seed in range(units)]
    objective = Objective(model.to(dtype), batches, losses.next_token)
    return objective, partition(model, include="*h.0.attn.c_attn.bias/*")


def said(**settings):
    objective, blocks = attention(settings.pop("units", 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectra = estimate_spectra(objective, blocks, **settings)
    return spectra, [str(w.message) for w in caught if "rounding" in str(w.message)]


@pytest.mark.parametrize("steps", [6, 100])
def test_the_bias_of_keys_is_rounding_and_its_error_says_so(steps):
    """Scores of one query all rise by the same with it, which the softmax takes away."""
    spectra, (message,) = said(num_probes=2, num_steps=steps)
    assert "c_attn.bias/key': products are rounding in float32" in message
    assert "more blocks" not in message
    for name, spectrum in spectra.items():
        size = np.abs(spectrum.weights * spectrum.nodes).sum() / spectrum.num_probes
        if name.endswith("/key"):
            assert spectrum.error > size / 2  # the truth is zero
            assert spectrum.largest.residual > 0.02 * spectrum.norm
        else:
            assert spectrum.precision_error == 0


@pytest.mark.slow
def test_rounding_takes_no_more_data():
    settings = {"num_probes": "auto", "num_steps": "auto", "tolerance": 0.2, "data": "auto"}
    spectra, messages = said(units=40, **settings)
    assert len(messages) == 1
    (key,) = (s for name, s in spectra.items() if name.endswith("/key"))
    assert key.units == 16
    assert max(s.units for s in spectra.values()) > 16


@pytest.mark.filterwarnings("ignore:.*products are rounding:UserWarning")
def test_a_resumed_estimate_knows_the_rounding_of_columns(tmp_path):
    objective, blocks = attention()
    settings = {"num_probes": 1, "num_steps": 100, "state": tmp_path / "state", "keep_state": True}
    first, again = (estimate_spectra(objective, blocks, **settings) for _ in range(2))
    for one, other in zip(first.values(), again.values(), strict=True):
        assert one.precision_error == other.precision_error
        assert one.largest == other.largest
    assert max(s.precision_error for s in again.values()) > 0


@pytest.mark.parametrize("steps", [10, 40])
def test_a_matrix_that_is_not_symmetric_is_said(steps):
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    sound = torch.diag(torch.linspace(1, 3, 40, dtype=torch.float64))

    def spectrum(share):
        operator = FunctionOperator(lambda v: (sound + share * (skew - skew.T)) @ v, 40)
        return estimate_spectra(None, operator.block(), 1, steps, curvature=operator)[0]

    assert spectrum(0.0).precision_error == 0
    assert 0.005 < spectrum(0.002).precision_error < 0.4
    with pytest.warns(UserWarning, match="not symmetric"):
        assert spectrum(0.5).error > 1
