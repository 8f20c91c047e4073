"""Dense curvature matrices, built without anything of blockspec's engine: the oracle of the tests."""

import contextlib
import math

import torch
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def _eval_with_math_attention(model):
    flag = model.training
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        yield
    model.train(flag)


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
    """Where the block's entries stand in the flat vector of all parameters, in the block's own order."""
    _, flat = flat_parameters(model)
    tensors = unflatten(model, torch.arange(len(flat)))
    pieces = []
    for piece in block.pieces:
        tensor = tensors[piece.parameter]
        if piece.axis is not None:
            index = range(tensor.shape[piece.axis])[piece.index] if isinstance(piece.index, slice) else piece.index
            tensor = tensor.index_select(piece.axis, torch.tensor(list(index)))
        pieces.append(tensor.reshape(-1))
    return torch.cat(pieces)


def _mean_terms(model, batches, terms):
    """Function of the flat parameters: all loss terms of all batches, in one vector."""

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
    function = _mean_terms(model, batches, terms)
    with _eval_with_math_attention(model):
        return hessian(lambda flat: function(flat).mean())(flat).detach()


def finite_difference_hessian(model, batches, terms, *, epsilon=1e-5):
    """(P, P) by central differences of the gradient: shares not even double backward; good to about 1e-8."""
    _, flat = flat_parameters(model)
    function = _mean_terms(model, batches, terms)

    def gradient(point):
        point = point.clone().requires_grad_()
        return torch.autograd.grad(function(point).mean(), point)[0]

    rows = []
    with _eval_with_math_attention(model):
        for i in range(len(flat)):
            shift = torch.zeros_like(flat)
            shift[i] = epsilon
            rows.append((gradient(flat + shift) - gradient(flat - shift)) / (2 * epsilon))
    return torch.stack(rows)


def dense_fisher(model, batches, terms):
    """(P, P) mean over loss terms of g g'."""
    _, flat = flat_parameters(model)
    with _eval_with_math_attention(model):
        jacobian = jacrev(_mean_terms(model, batches, terms))(flat).detach()  # (N, P)
    return jacobian.T @ jacobian / len(jacobian)


def dense_ggn_of_cross_entropy(model, batches, logits):
    """(P, P) mean over rows of J' (diag(p) - p p') J, for ``logits(call, batch) -> (N, C)`` rows of loss terms."""
    _, flat = flat_parameters(model)
    total, count = 0.0, 0
    with _eval_with_math_attention(model):
        for batch in batches:
            function = _mean_terms(model, [batch], logits)
            rows = function(flat).detach()  # (N, C)
            jacobian = jacrev(function)(flat).detach()  # (N, C, P)
            p = rows.softmax(-1)
            middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            total = total + torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian)
            count += len(rows)
    return total / count


def eigenvalues(matrix, index=None):
    """Ascending eigenvalues of a diagonal block."""
    if index is not None:
        matrix = matrix[index][:, index]
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


def relative_error(a, b):
    return abs(a - b) / max(abs(b), math.ulp(0.0))
