"""Attention in strips: a second derivative that is right, that keeps no matrix, and that computes
what is asked for.
"""

import itertools
import math
from functools import partial
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from blockspec.model.attention import attention, strips

MASKS = (None, "boolean", "additive", "padding", "of heads")
SHAPES = ((2, 2, 5, 5), (4, 2, 4, 7), (4, 1, 7, 4), (1, 1, 1, 3))  # H, G, T, S
GRID = list(itertools.product((False, True), (None, 2), (None, 1.5), (False, True)))
"""causal, window, soft cap, sinks"""


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Several strips, the last of them shorter, even of a few tokens."""
    monkeypatch.setattr(strips, "ROWS", 3)


def normal(generator, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def made(place, mask, sinks, *, batches=2, dtype=torch.float64):
    """q, k, v, sinks (or None), mask (or None) of the place-th shape."""
    generator = torch.Generator().manual_seed(place)
    heads, groups, rows, keys = SHAPES[place % len(SHAPES)]
    q = normal(generator, batches, heads, rows, 3, dtype=dtype)
    k = normal(generator, batches, groups, keys, 3, dtype=dtype)
    v = normal(generator, batches, groups, keys, 2, dtype=dtype)
    scores = normal(generator, batches, heads, rows, keys, dtype=dtype)
    blind = scores[:1, :1].clone()
    blind[..., -1, :] = -math.inf  # the last row sees no key
    masks = {
        None: None,
        "boolean": scores[:, :1] > -0.3,
        "additive": blind[0, 0],
        "padding": (torch.arange(keys) < torch.tensor([[1], [keys]][:batches]))[:, None, None],
        "of heads": torch.where(scores[:1] > 0.5, -math.inf, scores[:1]),
    }
    s = normal(generator, heads, dtype=dtype) if sinks else None
    return (
        [t.requires_grad_() for t in (q, k, v)],
        s if s is None else s.requires_grad_(),
        masks[mask],
    )


def matrices(q, k, v, *, causal, mask, window, softcap, sinks, scale=None):
    """The same function, as one writes it down."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    if causal:
        scores = scores.masked_fill(j > i, -math.inf)
    if window is not None:
        scores = scores.masked_fill((i - j).abs() >= window, -math.inf)
    if mask is not None:
        added = mask if mask.is_floating_point() else torch.where(mask, 0.0, -math.inf)
        scores = scores + added
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch._safe_softmax(scores, -1)
    return weights[..., : k.shape[2]] @ v


def derivatives(function, inputs):
    """The value, the gradient, and the gradient of an inner product of the gradient."""
    generator = torch.Generator().manual_seed(7)
    out = function()
    g = normal(generator, *out.shape).to(out).requires_grad_()
    first = torch.autograd.grad(out, inputs, g, create_graph=True)
    tangents = [normal(generator, *t.shape).to(t) for t in first]
    second = torch.autograd.grad(first, [g, *inputs], tangents, materialize_grads=True)
    return [out.detach(), *(t.detach() for t in first), *second]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("entries", [1, 10**6], ids=["a head at a time", "all heads at once"])
def test_value_gradient_and_double_gradient_are_those_of_matrices(monkeypatch, entries, mask):
    monkeypatch.setitem(strips.STRIP_ENTRIES, "cpu", entries)
    for place, (causal, window, softcap, sinks) in enumerate(GRID):
        tensors, s, m = made(place, mask, sinks)
        how = {"causal": causal, "window": window, "softcap": softcap, "mask": m, "sinks": s}
        inputs = tensors if s is None else [*tensors, s]
        ours = derivatives(partial(attention, *tensors, **how), inputs)
        truth = derivatives(partial(matrices, *tensors, **how), inputs)
        for mine, other in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, msg=f"{place} {how}")


@pytest.mark.parametrize("place", range(len(GRID)))
def test_gradcheck_and_gradgradcheck(place):
    causal, window, softcap, sinks = GRID[place]
    tensors, s, m = made(place, MASKS[place % len(MASKS)], sinks, batches=1)

    def function(q, k, v, *sinks):
        s = sinks[0] if sinks else None
        return attention(q, k, v, causal=causal, window=window, softcap=softcap, mask=m, sinks=s)

    inputs = tensors if s is None else [*tensors, s]
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_the_third_derivative_is_right_too():
    tensors, sinks, _ = made(0, None, True, batches=1)

    def gradient(q, k, v, sinks):
        out = attention(q, k, v, causal=True, sinks=sinks).square().sum()
        return torch.autograd.grad(out, (q, k), create_graph=True)

    inputs = [*(t[:, :1, :3].detach().requires_grad_() for t in tensors), sinks[:1].detach()]
    assert gradgradcheck(gradient, inputs)


def test_it_is_what_pytorch_computes():
    (q, k, v), _, _ = made(0, None, False)
    for how in ({"is_causal": True}, {"attn_mask": torch.rand(5, 5) > 0.5}, {"scale": 0.3}):
        ours = {"is_causal": "causal", "attn_mask": "mask"}
        named = {ours.get(name, name): value for name, value in how.items()}
        with sdpa_kernel(SDPBackend.MATH):
            truth = derivatives(
                lambda how=how: F.scaled_dot_product_attention(q, k, v, **how), [q, k, v]
            )
        found = derivatives(lambda named=named: attention(q, k, v, **named), [q, k, v])
        for mine, other in zip(found, truth, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_alone(wanted):
    """The others may not even require gradients."""
    tensors, _, _ = made(1, None, False)
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    asked = [inputs[i] for i in wanted]
    how = {"causal": True, "window": None, "softcap": 2.0, "mask": None, "sinks": None}
    ours = derivatives(lambda: attention(*inputs, **how), asked)
    truth = derivatives(lambda: matrices(*inputs, **how), asked)
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_rows_that_see_nothing_are_zero_and_so_is_all_that_comes_from_them():
    (q, k, v), _, _ = made(0, None, False)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    found = derivatives(lambda: attention(q, k, v, mask=mask), [q, k, v])
    assert all(not t.any() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_scores_do_not_overflow(dtype):
    tensors, _, _ = made(0, None, False, dtype=dtype)
    q, k, v = (
        t.detach().mul(size).requires_grad_()
        for t, size in zip(tensors, (1e4, 1e4, 1), strict=True)
    )
    found = derivatives(lambda: attention(q, k, v, causal=True), [q, k, v])
    assert all(t.isfinite().all() for t in found)
    highest = (q.double() @ k.double().mT).masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf)
    rows = torch.arange(2)[:, None, None], torch.arange(2)[:, None], highest.argmax(-1)
    torch.testing.assert_close(found[0], v[rows])  # the softmax is a maximum


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_precision_of_the_smaller_dtypes(dtype, error):
    tensors, sinks, mask = made(1, "of heads", True, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (*tensors, sinks)]
    how = {"causal": True, "window": None, "softcap": 3.0}
    found = derivatives(
        lambda: attention(*tensors, sinks=sinks, mask=mask, **how), [*tensors, sinks]
    )
    truth = derivatives(
        lambda: matrices(*exact[:3], sinks=exact[3], mask=mask.double(), **how), exact
    )
    for mine, other in zip(found, truth, strict=True):
        assert mine.dtype is dtype
        assert (mine - other).abs().max() <= error * other.abs().max()


def test_equal_to_the_bit_between_calls():
    tensors, sinks, mask = made(1, "boolean", True, dtype=torch.float32)
    once, again = (
        derivatives(lambda: attention(*tensors, sinks=sinks, mask=mask), [*tensors, sinks])
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


class Watched(TorchDispatchMode):
    """Entries of the largest tensor that any operation gave, and multiplications in products of
    matrices.
    """

    entries = multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.untyped_storage().nbytes() // out.itemsize)
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default):
            self.multiplications += out.numel() * args[-1].shape[1]
        return out


@pytest.mark.parametrize("how", [{}, {"causal": True}, {"window": 5}], ids=str)
def test_the_largest_tensor_grows_with_the_number_of_tokens_and_not_with_its_square(how):
    entries = []
    for tokens in (32, 64, 128):
        inputs = [
            normal(torch.Generator().manual_seed(0), 1, 2, tokens, 2).requires_grad_()
            for _ in range(3)
        ]
        with Watched() as watched:
            derivatives(lambda inputs=inputs: attention(*inputs, **how), inputs)
        entries.append(watched.entries)
    assert entries[2] <= 2.1 * entries[1] <= 4.5 * entries[0]
    assert entries[2] <= 128 * 2 * 3  # of q, or of a strip of 3 rows


def multiplications(function):
    with Watched() as watched:
        function()
    return watched.multiplications


def product(tokens, asked, **how):
    """A product through one layer, with the part for ``asked`` alone, as a function."""
    inputs = [
        normal(torch.Generator().manual_seed(i), 1, 1, tokens, 2).requires_grad_() for i in range(3)
    ]
    wanted = [inputs[i].view_as(inputs[i]) for i in range(3)]
    g = torch.ones(1, 1, tokens, 2, dtype=torch.float64, requires_grad=True).view(1, 1, tokens, 2)
    first = torch.autograd.grad(attention(*wanted, **how), wanted, g, create_graph=True)
    sources = [first[i] for i in asked]
    return lambda: torch.autograd.grad(
        sources,
        [inputs[i] for i in asked],
        [torch.ones_like(s) for s in sources],
        retain_graph=True,
    )


def test_hidden_keys_cost_nothing():
    full = multiplications(product(48, (0, 1, 2)))
    assert multiplications(product(48, (0, 1, 2), causal=True)) == pytest.approx(full / 2, rel=0.1)
    assert multiplications(product(48, (0, 1, 2), causal=True, window=4)) <= 0.15 * full
    band = torch.ones(48, 48, dtype=torch.bool).tril().triu(-3)
    assert multiplications(product(48, (0, 1, 2), mask=band)) <= 0.15 * full
    padded = (torch.arange(48) < 12)[None, None, None]
    assert multiplications(product(48, (0, 1, 2), mask=padded)) == pytest.approx(full / 4)


def test_a_product_computes_what_is_asked_for_alone():
    """Of q, k and v: scores, twice their change, e, f, two by q, two by k, one by v."""
    unit = 48 * 48 * 2
    assert multiplications(product(48, (0, 1, 2))) == 10 * unit
    assert multiplications(product(48, (0,))) == 4 * unit  # scores, their change, e, by q
    assert multiplications(product(48, (2,))) == unit  # scores: the output is linear in values


def test_transforms_and_masks_with_gradients_go_another_way():
    (q, k, v), _, _ = made(0, None, False)
    hessian = torch.func.hessian(lambda v: attention(q, k, v, causal=True).square().sum())(v)
    truth = torch.func.hessian(
        lambda v: F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()
    )
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(hessian, truth(v))
    bias = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda bias: attention(q, k, v, mask=bias), bias)


def test_autocast_does_not_reach_inside():
    tensors, _, _ = made(0, None, False, dtype=torch.float32)
    plain = derivatives(lambda: attention(*tensors), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = derivatives(lambda: attention(*tensors), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_two_threads_at_once():
    """Nothing is shared."""
    tensors, _, _ = made(0, None, False)
    expected = derivatives(lambda: attention(*tensors, causal=True), tensors)
    found = []
    threads = [
        Thread(
            target=lambda: found.append(
                derivatives(lambda: attention(*tensors, causal=True), tensors)
            )
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for run in found for a, b in zip(run, expected, strict=True))


Q = torch.zeros(2, 4, 5, 3)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"q": Q[0]}, ValueError, "four dimensions"),
        ({"k": torch.zeros(2, 3, 5, 3)}, ValueError, r"G divides H.*\(2, 3, 5, 3\)"),
        ({"v": torch.zeros(2, 4, 6, 3)}, ValueError, r"G divides H.*\(2, 4, 6, 3\)"),
        ({"k": Q.double()}, TypeError, "one floating point dtype"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, r"\(2, 4, 5, 5\); got \(4, 5\)"),
        ({"mask": torch.ones(5, 5, dtype=torch.long)}, TypeError, r"mask.bool\(\)"),
        ({"sinks": torch.zeros(3)}, ValueError, r"\(4,\); got \(3,\)"),
        ({"window": 0}, ValueError, "window .* got 0"),
        ({"softcap": -1.0}, ValueError, "softcap .* got -1"),
        ({"scale": math.nan}, ValueError, "scale .* got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_an_error(changed, error, text):
    with pytest.raises(error, match=text):
        attention(**{"q": Q, "k": Q, "v": Q} | changed)
