"""Dense curvature matrices, built without anything of blockspec's engine: the oracle of the
tests.
"""

import contextlib
import math
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.func import functional_call, grad, hessian, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def of_primitives(model):
    """Eval mode, with attention and norms that every way of differentiating gets right."""
    flag = model.training
    model.eval()
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.multiple(F, layer_norm=_layer_norm, batch_norm=_batch_norm),
    ):
        yield
    model.train(flag)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """Out of primitives: in torch 2.13 ``torch.func.hessian`` of the built-in norms with weights is
    wrong, by as much as the matrix itself; their double backward is right.
    """
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _batch_norm(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = x.mean(axes), x.var(axes, correction=0)
    shape = [-1] + [1] * (x.ndim - 2)
    normed = (x - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
    normed = normed if weight is None else normed * weight.view(shape)
    return normed if bias is None else normed + bias.view(shape)


def flat_parameters(model):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return list(named), torch.cat([p.detach().reshape(-1) for p in named.values()])


def unflatten(model, flat):
    tensors, start = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[name] = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
    return tensors


def positions(model, block):
    """Where the block's entries stand in the flat vector of all parameters, in the block's own
    order.
    """
    _, flat = flat_parameters(model)
    tensors = unflatten(model, torch.arange(len(flat)))
    pieces = []
    for piece in block.pieces:
        tensor = tensors[piece.parameter]
        if piece.axis is not None:
            index = (
                range(tensor.shape[piece.axis])[piece.index]
                if isinstance(piece.index, slice)
                else piece.index
            )
            tensor = tensor.index_select(piece.axis, torch.tensor(list(index)))
        pieces.append(tensor.reshape(-1))
    return torch.cat(pieces)


def _joined(model, batches, terms):
    """Function of the flat parameters: the terms of all batches, put together."""

    def function(flat):
        tensors = unflatten(model, flat)

        class Call:
            def __call__(self, *args, **kwargs):
                return functional_call(model, tensors, args, kwargs, tie_weights=True)

        return torch.cat([terms(Call(), batch) for batch in batches])

    return function


def dense_hessian(model, batches, terms):
    """(P, P) Hessian of the mean of ``terms(call, batch) -> (N,)`` by forward-over-reverse."""
    _, flat = flat_parameters(model)
    function = _joined(model, batches, terms)
    with of_primitives(model):
        return hessian(lambda flat: function(flat).mean())(flat).detach()


def finite_difference_product(model, batches, terms, vector, *, epsilon=1e-5):
    """(P,) H v by central differences of the gradient: shares not even double backward; good to
    about 1e-8.
    """
    _, flat = flat_parameters(model)
    function = _joined(model, batches, terms)

    def gradient(point):
        point = point.clone().requires_grad_()
        return torch.autograd.grad(function(point).mean(), point)[0]

    flag = model.training
    model.eval()
    difference = gradient(flat + epsilon * vector) - gradient(flat - epsilon * vector)
    model.train(flag)
    return difference / (2 * epsilon)


def largest_eigenvalue(model, batches, terms, index=None):
    """Of the Hessian, or of a diagonal block, without forming it: forward-over-reverse and ARPACK;
    good to 1e-9.
    """
    _, flat = flat_parameters(model)
    function = _joined(model, batches, terms)
    index = torch.arange(len(flat)) if index is None else index

    def product(vector):
        tangent = torch.zeros_like(flat)
        tangent[index] = torch.from_numpy(np.ascontiguousarray(vector.ravel()))
        return (
            jvp(grad(lambda point: function(point).mean()), (flat,), (tangent,))[1]
            .detach()[index]
            .numpy()
        )

    with of_primitives(model):
        operator = LinearOperator((len(index), len(index)), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).normal(size=len(index))
        return float(
            eigsh(operator, k=1, which="LA", return_eigenvectors=False, tol=1e-6, v0=start)[0]
        )


def jacobian(model, batches, outputs):
    """(..., P) of ``outputs(call, batch)``, batches put together along the first axis."""
    _, flat = flat_parameters(model)
    with of_primitives(model):
        return jacrev(_joined(model, batches, outputs))(flat).detach()


def dense_fisher(model, batches, terms):
    """(P, P) mean over loss terms of g g'."""
    gradients = jacobian(model, batches, terms)  # (N, P)
    return gradients.T @ gradients / len(gradients)


def dense_ggn_of_cross_entropy(model, batches, logits):
    """(P, P) mean over rows of J' (diag(p) - p p') J, for ``logits(call, batch) -> (N, C)`` rows of
    loss terms.
    """
    _, flat = flat_parameters(model)
    with of_primitives(model):
        rows = _joined(model, batches, logits)(flat)
    jacobians = jacobian(model, batches, logits)  # (N, C, P)
    p = rows.softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobians, middle, jacobians) / len(rows)


def eigenvalues(matrix, index=None):
    """Ascending eigenvalues of a diagonal block."""
    if index is not None:
        matrix = matrix[index][:, index]
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


def relative_error(a, b):
    return abs(a - b) / max(abs(b), math.ulp(0.0))
