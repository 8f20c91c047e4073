"""Attention that can be differentiated twice, whatever the model came with, and everything as it was afterwards."""

import copy

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Problem, gpt2, llama, nanogpt, tokens, vit
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.model.attention import twice_differentiable

BACKENDS = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
}


def enabled():
    return {name: on() for name, on in BACKENDS.items()}


def second_derivative(model, batch):
    """Whether the gradient of a gradient can be taken."""
    total, _ = losses.next_token(model, batch)
    weights = [p for p in model.parameters() if p.ndim == 2]
    gradients = torch.autograd.grad(total, weights, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)


@pytest.mark.parametrize("make", [gpt2, nanogpt, llama, vit])
def test_default_models_need_the_replacement(make):
    """They fail without it: the tests of this file could fail."""
    it = make()
    it.model.eval()
    total, _ = it.loss(it.model, it.batches[1])
    weights = [p for p in it.model.parameters() if p.ndim == 2]
    gradients = torch.autograd.grad(total, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_every_implementation_gives_the_same_spectrum(make, implementation):
    it = make()
    blocks = [block for block in partition(it.model) if block.kind in ("query", "key")]
    eager = copy.deepcopy(it.model)
    eager.config._attn_implementation = "eager"
    expected = estimate_spectra(
        Objective(eager, it.batches, it.loss), blocks, num_probes=1, num_steps=4
    )
    it.model.config._attn_implementation = implementation
    spectra = estimate_spectra(it.objective(), blocks, num_probes=1, num_steps=4)
    tolerance = 1e-5 if make is llama else 1e-9  # Llama's eager softmax is float32
    for name in expected:
        difference = np.abs(spectra[name].nodes - expected[name].nodes).max()
        assert difference <= tolerance * expected[name].norm + 1e-15, name
    assert it.model.config._attn_implementation == implementation


def test_nanogpt_with_its_flash_flag_is_as_without():
    fused, plain = nanogpt(flash=True), nanogpt(flash=False)
    plain.model.load_state_dict(fused.model.state_dict(), strict=False)
    blocks = partition(fused.model, include="*query*")
    a = estimate_spectra(fused.objective(), blocks, num_probes=1, num_steps=4)
    b = estimate_spectra(plain.objective(), blocks, num_probes=1, num_steps=4)
    for name in a:
        torch.testing.assert_close(
            torch.tensor(a[name].nodes), torch.tensor(b[name].nodes), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("fails", [False, True])
def test_implementations_and_backends_are_restored(fails):
    model = models.tiny_gpt2()
    part = copy.deepcopy(model.config)
    part._attn_implementation = "flex_attention"
    model.transformer.h[1].config = part  # a part with a config of its own
    model.config._attn_implementation = "flash_attention_2"
    before = enabled()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        chosen = enabled()
        try:
            with twice_differentiable(model):
                assert enabled() == dict.fromkeys(BACKENDS, False) | {"math": True}
                assert model.config._attn_implementation == part._attn_implementation == "sdpa"
                if fails:
                    raise KeyError("on the way")
        except KeyError:
            assert fails
        assert enabled() == chosen
    assert enabled() == before
    assert (model.config._attn_implementation, part._attn_implementation) == (
        "flash_attention_2",
        "flex_attention",
    )


def test_what_can_be_differentiated_already_is_left_alone():
    model = models.tiny_gpt2(attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with twice_differentiable(model):
        assert model.config._attn_implementation == "eager"
    batch = {"input_ids": tokens(1, 5)}
    assert all(torch.isfinite(g).all() for g in second_derivative(model, batch))


def test_a_kernel_that_cannot_be_replaced_is_an_error_with_a_remedy():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x):
            q = self.query(x).view(1, 3, 1, 4).transpose(1, 2)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].flatten(1)

    x = torch.randn(1, 3, 4, dtype=torch.float64)
    objective = Objective(Fused(), [(x, torch.tensor([1]))], losses.classification)
    with pytest.raises(
        ValueError, match=r"cannot be differentiated twice.*attn_implementation='eager'"
    ):
        estimate_spectra(objective, partition(objective.model), num_probes=1, num_steps=2)


def square(backward):
    """x^2 as a function of somebody's own."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

    Square.backward = staticmethod(backward)

    class Model(torch.nn.Linear):
        def forward(self, x):
            return Square.apply(super().forward(x))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(4, 3, dtype=torch.float64)


def plainly(ctx, slope):
    return 2 * ctx.saved_tensors[0] * slope


def untracked(ctx, slope):
    with torch.no_grad():  # as a kernel that autograd knows nothing of
        return 2 * ctx.saved_tensors[0] * slope


BATCH = (torch.ones(1, 4, dtype=torch.float64), torch.tensor([1]))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "backward",
    [torch.autograd.function.once_differentiable(plainly), untracked],
    ids=["once", "untracked"],
)
def test_a_backward_pass_without_a_derivative_is_an_error_and_not_a_wrong_number(
    backward, curvature
):
    """autograd leaves such terms out without a word."""
    objective = Objective(square(backward), [BATCH], losses.classification)
    with pytest.raises(
        ValueError, match=r"cannot be differentiated twice.*switch it off in the model"
    ):
        estimate_spectra(
            objective, partition(objective.model), num_probes=1, num_steps=2, curvature=curvature
        )


def test_a_function_of_ones_own_that_can_be_differentiated_twice_is_fine():
    own = Objective(square(plainly), [BATCH], losses.classification)
    squared = losses.Loss(lambda model, batch: model(batch[0]) ** 2, losses.classification.terms)
    plain = Objective(torch.nn.Linear(4, 3, dtype=torch.float64), [BATCH], squared)
    plain.model.load_state_dict(own.model.state_dict())
    one, two = (
        estimate_spectra(o, partition(o.model), num_probes=1, num_steps=12)["weight"]
        for o in (own, plain)
    )
    np.testing.assert_allclose(one.nodes, two.nodes, atol=1e-12)
    assert one.norm > 0.1


def test_values_are_unchanged_by_the_replacement():
    it = gpt2()
    it.model.eval()
    batch = {"input_ids": tokens(2, 6)}
    plain = it.model(**batch).logits
    with twice_differentiable(it.model):
        replaced = it.model(**batch).logits
    torch.testing.assert_close(replaced, plain, rtol=1e-12, atol=1e-12)


def test_attention_of_a_models_own_making_through_the_functional_interface():
    """Anything that calls scaled_dot_product_attention works, with a mask and with grouped heads."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = (torch.nn.Linear(8, width, dtype=torch.float64) for width in (8, 4))

        def forward(self, x):
            q, k = (
                self.q(x).view(2, 5, 4, 2).transpose(1, 2),
                self.k(x).view(2, 5, 2, 2).transpose(1, 2),
            )
            mask = torch.ones(5, 5, dtype=torch.bool).tril()
            y = F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
            return y.transpose(1, 2).reshape(2, 5, 8)[:, -1]

    torch.manual_seed(0)
    model, x = Own(), torch.randn(2, 5, 8, dtype=torch.float64)
    it = Problem(
        model,
        [(x, torch.tensor([1, 7]))],
        losses.classification,
        lambda call, b: call(b[0]),
        lambda b: b[1],
    )
    (block,) = partition(model, include="q.weight")
    spectrum = estimate_spectra(it.objective(), block, num_probes=1, num_steps=3)["q.weight"]
    assert spectrum.norm > 0
