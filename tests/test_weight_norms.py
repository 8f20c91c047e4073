"""Weight norm's second derivative, which PyTorch's own fused function gets wrong."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

from blockspec import Objective, losses, partition
from blockspec.model.weight_norms import elementary_weight_norms, weight_norm
from blockspec.optim import AdaHessian
from blockspec.toolbox.matrices import dense

STEP = 1e-5


def old_style(module, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, dim=dim)


def parametrized(module, dim):
    return parametrizations.weight_norm(module, dim=dim)


KINDS = [old_style, parametrized]


def model_of(kind, dim):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution = kind(nn.Conv1d(2, 3, 2, dtype=torch.float64), dim)
        last = nn.Linear(9, 2, dtype=torch.float64)
        return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), last)


def batch_of(shape=(3, 2, 4)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.arange(3) % 2


def moved(objective, parameter, change):
    """Gradient by the parameter where it is changed."""
    with torch.no_grad():
        parameter.add_(change)
        gradients = objective.gradient()
        parameter.sub_(change)
    return gradients


def differences(objective, block):
    """(P, P) Hessian of a block of whole tensors by central differences of the gradient."""
    columns = []
    for name in block.parameters:
        parameter = objective.parameters()[name]
        for unit in torch.eye(parameter.numel(), dtype=parameter.dtype):
            change = STEP * unit.view_as(parameter)
            ahead, behind = (moved(objective, parameter, sign * change) for sign in (1, -1))
            columns.append(torch.cat([(ahead[n] - behind[n]).flatten() for n in block.parameters]))
    return (torch.stack(columns, 1) / (2 * STEP)).numpy()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_derivatives_are_those_of_the_function(dim):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    g = (1.1 * torch.norm_except_dim(v, 2, dim)).detach().requires_grad_()
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
    assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, dim).sin(), (v, g))


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hessian_of_weight_norm_is_that_of_central_differences(kind, dim):
    objective = Objective(model_of(kind, dim), [batch_of()], losses.classification)
    (block,) = partition(objective.model, "model")
    np.testing.assert_allclose(
        dense(objective, block), differences(objective, block), rtol=1e-6, atol=1e-8
    )


def test_wav2vec2_has_symmetric_products():
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (4,), "conv_kernel": (3,), "conv_stride": (2,)}
    positions = {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(
        intermediate_size=8, num_labels=2, classifier_proj_size=4, num_feat_extract_layers=1,
        **sizes, **convolutions, **positions,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Wav2Vec2ForSequenceClassification(config).double()
    objective = Objective(model, [batch_of((3, 32))], losses.classification)
    positional = partition(model, "tensor", include="*pos_conv_embed*")
    assert len(positional) == 3
    for one in positional:
        np.testing.assert_allclose(
            dense(objective, one), differences(objective, one), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_left_as_it_was(kind):
    model = model_of(kind, 0)
    before = [dict(vars(module)) for module in model.modules()]
    hooks = [dict(vars(h)) for m in model.modules() for h in m._forward_pre_hooks.values()]
    with pytest.raises(KeyError), elementary_weight_norms(model):
        raise KeyError
    assert [set(vars(module)) for module in model.modules()] == [set(b) for b in before]
    after = [dict(vars(h)) for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert after == hooks


def test_adahessian_measures_through_it():
    model = model_of(parametrized, 0)
    (v,) = (p for name, p in model.named_parameters() if name.endswith("original1"))
    optimizer = AdaHessian([v], seed=3)
    x, y = batch_of()
    with optimizer.second_order(model):
        optimizer.backward(nn.functional.cross_entropy(model(x), y))
    (signs,) = optimizer._signs([v], 0)
    objective = Objective(model, [(x, y)], losses.classification)
    name = "0.parametrizations.weight.original1"
    ahead, behind = (moved(objective, v, sign * STEP * signs)[name] for sign in (1, -1))
    torch.testing.assert_close(
        optimizer._gathered[v], signs * (ahead - behind) / (2 * STEP), rtol=1e-6, atol=1e-9
    )
