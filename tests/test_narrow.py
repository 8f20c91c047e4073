"""A model that computes in 16 bits, in all or in parts, is told of; others are not."""

import warnings

import pytest
import torch
from torch import nn

from blockspec import Objective, estimate_spectra, losses, partition


class Casting(nn.Module):
    """As nanochat does: activations in 16 bits, logits in 32."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.how = how

    def forward(self, x):
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.first(x).tanh()
        elif self.how == "cast":
            hidden = nn.functional.linear(x.bfloat16(), self.first.weight.bfloat16()).tanh()
        else:
            hidden = self.first(x).tanh()
        return self.last(hidden.float())


def objective(how):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Casting(how)
        batch = (torch.randn(16, 4), torch.arange(16) % 3)
    return Objective(model, [batch], losses.classification)


@pytest.mark.parametrize(
    ("how", "where"), [("autocast", r"first \(Linear\)"), ("cast", r"the model \(Casting\)")]
)
def test_rounding_within_a_model_is_said(how, where):
    it = objective(how)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in it.model.modules()]
    with pytest.warns(UserWarning, match=rf"{where} computes in bfloat16.*do not hold it"):
        estimate_spectra(it, partition(it.model), 1, 4, check=False)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in it.model.modules()]


def test_what_is_said_is_true():
    """The largest eigenvalue is off, by more than its residual."""
    values = []
    for how in ("", "cast"):
        it = objective(how)
        (block,) = partition(it.model, include="first.weight")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = estimate_spectra(it, block, 1, 32, check=False)[block.name]
        values.append((found.largest.value, found.largest.residual))
    (right, _), (rounded, residual) = values
    assert abs(rounded - right) > 2 * residual


def of_type(dtype, part=None):
    it = objective("")
    it.model.forward = lambda x: it.model.last(it.model.first(x.to(dtype)).tanh().to(part or dtype))
    it.model.to(dtype)
    if part is not None:
        it.model.last.to(part)
    return it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_of_one_type_is_not_blamed(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_type(dtype).check()


@pytest.mark.parametrize("part", [None, torch.float32])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, "0.4 %"), (torch.float16, "0.05 %")])
def test_parameters_of_16_bits_are_said(dtype, size, part):
    """The stated error of an exact spectrum was zero, and eigenvalues were off by 0.5 %."""
    short = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=rf"in {short} \('first.weight' and . more\).*{size}"):
        of_type(dtype, part).check()
