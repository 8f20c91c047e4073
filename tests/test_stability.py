"""The edge of stability that follows from an optimizer's settings, and trainings that settle at it."""

import numpy as np
import pytest
import torch
from torch import nn

import blockspec
from blockspec import Objective, Preconditioner, partition, stability_thresholds
from blockspec.figures.plots import edges_by_block

LR = 0.02


def diverges(make, curvature):
    """Whether theta <- step of curvature theta^2 / 2 leaves its place."""
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([theta])
    for _ in range(600):
        theta.grad = curvature * theta.detach()
        optimizer.step()
    return bool(theta.abs() > 1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2 / LR),
        ({"momentum": 0.9}, 3.8 / LR),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8 / LR),
        ({"momentum": 0.9, "dampening": 0.5}, 7.6 / LR),
    ],
)
def test_gradient_descent_diverges_just_above_its_threshold_and_not_below(settings, expected):
    def make(parameters):
        return torch.optim.SGD(parameters, LR, **settings)

    (found,) = stability_thresholds(make([nn.Parameter(torch.ones(1))]))
    assert found.value == pytest.approx(expected)
    assert not found.preconditioned
    assert diverges(make, 1.02 * expected)
    assert not diverges(make, 0.98 * expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_averaged_momentum_diverges_just_above_its_threshold(nesterov):
    """Adam with P held at 1: the steps of its momentum, written out."""
    cls = torch.optim.NAdam if nesterov else torch.optim.Adam
    (found,) = stability_thresholds(cls([nn.Parameter(torch.ones(1))], LR))
    assert found.preconditioned
    for factor, expected in ((1.02, True), (0.98, False)):
        theta, mean = 1.0, 0.0
        for _ in range(600):
            gradient = factor * found.value * theta
            mean = 0.9 * mean + 0.1 * gradient
            theta -= LR * (0.1 * gradient + 0.9 * mean if nesterov else mean)
        assert (abs(theta) > 1) == expected


def test_adams_is_38_over_the_learning_rate_and_a_saved_state_tells_it_too():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], LR)
    assert stability_thresholds(optimizer)[0].value == pytest.approx(38 / LR)
    p.grad = torch.ones(2)
    optimizer.step()
    assert stability_thresholds(optimizer.state_dict()) == stability_thresholds(optimizer)


def test_groups_with_other_settings_have_thresholds_of_their_own():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr": 2 * LR}, {"params": [c]}]
    found = stability_thresholds(torch.optim.Adam(groups, LR))
    assert [t.value for t in found] == pytest.approx([38 / LR, 19 / LR])


def test_an_optimizer_whose_p_never_settles_is_refused():
    with pytest.raises(ValueError, match="Muon has no edge of stability"):
        stability_thresholds(torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], LR))


def squared(model, batch):
    difference = (model(batch[0]) - batch[1]).square()
    return difference.sum(), difference.numel()


def ratios(make, steps):
    """Largest eigenvalue over the threshold, at some steps of a training by full batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
        model = nn.Sequential(*layers).double()
        x = torch.randn(32, 4).double()
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    optimizer = make(model.parameters())
    (threshold,) = stability_thresholds(optimizer)
    it, block = Objective(model, [(x, y)], squared), partition(model, "model")[0]
    found = []
    for number in range(max(steps)):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if number + 1 in steps:
            p = Preconditioner.from_optimizer(optimizer, model)
            pairs = blockspec.top_eigenpairs(
                it, block, 1, "largest", precondition=p, tolerance=1e-2, check=False
            )
            found.append(pairs.values[0] / threshold.value)
    return np.array(found)


def test_full_batch_adam_settles_near_the_edge_of_stability():
    found = ratios(lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.99)), (20, 600, 750, 900))
    assert found[0] < 0.4
    assert 0.85 < np.median(found[1:]) < 1.1


def test_full_batch_gradient_descent_settles_at_two_over_the_learning_rate():
    found = ratios(lambda p: torch.optim.SGD(p, 0.05), (600, 800, 1000))
    np.testing.assert_allclose(found, 1, atol=0.03)


def test_a_figure_of_edges_shows_the_threshold():
    operator = blockspec.FunctionOperator(lambda v: v, 5)
    spectra = blockspec.estimate_spectra(None, operator.block(), 1, 3, curvature=operator)
    figure = edges_by_block(spectra, thresholds={"Adam: 38 / lr": 7.0})
    axes = figure.axes[0]
    assert axes.get_xlim()[1] > 7.0
    assert "Adam: 38 / lr" in [text.get_text() for text in figure.legends[0].get_texts()]
