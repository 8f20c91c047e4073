"""As much data as the tolerance needs."""

import math
import warnings

import numpy as np
import pytest
import torch
from populations import SampledOperator
from torch import nn

import blockspec
from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.engine.enough import FIRST, units_needed, with_enough_data
from blockspec.engine.estimate import foresee_data
from blockspec.numerics.measures import wasserstein
from blockspec.runs.report import show_data

POPULATION, SIZE = 1200, 16
SIZES = {"plain": SIZE, "heavy": SIZE}


class Sampled(nn.Module):
    """A quadratic form a block, whose matrix is the mean over examples of outer products."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()}
        )

    def forward(self, rows):
        """rows: block -> (B, size)"""
        return sum((rows[name] @ w) ** 2 / 2 for name, w in self.weights.items())


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, SIZE + 1) ** -0.5
    rows = {name: torch.randn(count, SIZE, generator=generator) * scale for name in SIZES}
    rows["heavy"] *= (0.6 * torch.randn(count, 1, generator=generator)).exp()
    return rows


def spectra(chosen, **settings):
    rows = [
        {name: part[None] for name, part in zip(chosen, each, strict=True)}
        for each in zip(*chosen.values(), strict=True)
    ]
    objective = blockspec.Objective(Sampled(), rows, loss)
    blocks = blockspec.partition(objective.model, "tensor")
    settings = {"num_probes": "auto", "num_steps": "auto", "data": "auto"} | settings
    return blockspec.estimate_spectra(objective, blocks, check=False, **settings)


def loss(model, batch):
    terms = model(batch)
    return terms.sum(), len(terms)


@pytest.mark.slow
def test_each_block_takes_the_data_that_it_needs_and_is_within_the_tolerance():
    everyone = examples(POPULATION, 0)
    truth = {
        f"weights.{name}": np.linalg.eigvalsh((rows.T @ rows / POPULATION).double().numpy())
        for name, rows in everyone.items()
    }
    held = 0
    for seed in range(2):
        order = torch.randperm(POPULATION, generator=torch.Generator().manual_seed(seed))[:600]
        found = spectra(
            {name: rows[order] for name, rows in everyone.items()}, tolerance=0.16, seed=seed
        )
        for name, spectrum in found.items():
            assert FIRST <= spectrum.units < 600
            assert spectrum.total_error <= 0.16 * spectrum.norm
            measure = spectrum.nodes.ravel(), spectrum.weights.ravel() / spectrum.num_probes
            distance = wasserstein(measure, (truth[name], np.full(SIZE, 1 / SIZE)))
            held += distance <= 0.16 * truth[name].max()  # the norm of the population
    assert held >= 3  # of 4


def test_data_that_are_too_few_are_told_with_how_many_would_do():
    with pytest.warns(UserWarning, match=r"with 20 of 20 units; about \d+ units would do") as told:
        found = spectra(examples(20, 0), tolerance=0.02)
    (warning,) = (w for w in told if "would do" in str(w.message))
    said = int(str(warning.message).split("about ")[1].split()[0])
    assert said == max(units_needed(s, 0.02) for s in found.values())
    assert 40 < said < 10_000


def test_units_that_go_through_the_model_in_parts_are_counted_whole():
    """As where memory is short: the objective's units are batches of eight, the sweep's are single
    examples, so that the sweep's are eight times as many.
    """
    rows = examples(800, 0)
    batches = [{name: part[n : n + 8] for name, part in rows.items()} for n in range(0, 800, 8)]
    taken = []

    def measure(part, names, _):
        taken.append(part.num_units())
        single = torch.cat([batch["heavy"] for batch in part.whole_batches()]).double()
        operator = SampledOperator(single[:, :, None] * single[:, None])
        found = blockspec.estimate_spectra(
            None, operator.block(), curvature=operator, num_steps=40, check=False
        )
        assert found["matrix"].units == 8 * taken[-1]
        return list(found.values()), found.cost

    objective = blockspec.Objective(Sampled(), batches, loss)
    spectrum = with_enough_data(objective, ["matrix"], 0.06, 0, measure)[0]["matrix"]
    assert spectrum.total_error <= 0.06 * spectrum.norm
    assert 2 <= len(taken) <= 4
    assert taken[0] < taken[-1] < 100
    with pytest.warns(UserWarning, match=r"with 100 of 100 units; about \d+ units") as told:
        with_enough_data(objective, ["matrix"], 0.012, 0, measure)
    said = int(str(told[0].message).split("about ")[1].split()[0])
    assert 100 < said < 800  # it said eight times as many


@pytest.mark.slow
def test_a_stopped_estimate_goes_on_in_the_round_that_it_was_in(tmp_path):
    rows = examples(160, 1)

    class Stop(Exception):
        pass

    def progress(done, total):
        seen.append(done)
        if len(seen) == 20:
            raise Stop

    seen = []
    whole = spectra(rows, tolerance=0.14, progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert len(seen) > 25
    seen = []
    with pytest.raises(Stop):
        spectra(rows, tolerance=0.14, progress=progress, state=tmp_path, state_every=0.0)
    assert len(list(tmp_path.iterdir())) > 1
    again = spectra(rows, tolerance=0.14, state=tmp_path)
    for name, spectrum in whole.items():
        np.testing.assert_array_equal(spectrum.nodes, again[name].nodes)
        assert spectrum.units == again[name].units
        assert spectrum.data_error == again[name].data_error
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_how_much_data_a_tolerance_takes(capsys):
    rows = examples(64, 1)
    batches = [{name: part[n : n + 2] for name, part in rows.items()} for n in range(0, 64, 2)]
    objective = blockspec.Objective(Sampled(), batches, loss)
    blocks = blockspec.partition(objective.model, "tensor")
    found = foresee_data(objective, blocks, tolerance=0.02, data="auto", check=False)
    assert (found.available, found.terms) == (32, 2.0)
    least, most = sorted(found.units, key=found.units.get)
    assert 100 < found.units[least] < found.units[most] < 10_000
    show_data(found, 0.02)
    told = capsys.readouterr().out.splitlines()
    assert told[-2] == (
        f"data: {most!r} needs the most, about {found.units[most]:,} units, which are "
        f"{2 * found.units[most]:,} loss terms (tokens, or images)"
    )
    assert "a total error of 0.02; the plan above counts all 32 units" in told[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "some"}, "data is one of"),
        ({"data_errors": False}, "needs the errors of the data"),
        ({"reorthogonalize": False}, "needs the errors of the data"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        spectra(examples(20, 0), **settings)


def test_too_few_units_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"at least 16 units.* in 3: .*micro_batch=1"):
        spectra(examples(3, 0))


@pytest.mark.slow
def test_numbers_with_other_units_have_errors_too():
    found = spectra(examples(300, 0), tolerance=0.14)
    assert len({s.units for s in found.values()}) == 2
    errors = [s.trace.data_stderr / (2 * SIZE) for s in found.values()]
    from blockspec.spectra.collection import mean_data_stderr

    assert mean_data_stderr(list(found.values())) == pytest.approx(math.hypot(*errors), rel=1e-6)
    assert blockspec.js0(found).data_stderr > 0
    assert "units" in found.data


@pytest.mark.parametrize("repeated", [0, 3])
def test_units_that_repeat_others_are_said(repeated):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=generator), torch.arange(24) % 2
    x[:repeated], y[:repeated] = x[10 : 10 + repeated].clone(), y[10 : 10 + repeated].clone()
    model = torch.nn.Linear(3, 2)
    objective = Objective(model, [(x, y)], losses.classification, micro_batch=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {"num_probes": "auto", "num_steps": "auto", "tolerance": 0.5, "data": "auto"}
        estimate_spectra(objective, partition(model), **settings)
    said = [str(w.message) for w in caught if "repeat" in str(w.message)]
    assert len(said) == (repeated > 0)
    assert all(text.startswith("3 of 24 units of data repeat") for text in said)
