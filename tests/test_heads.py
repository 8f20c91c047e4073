"""Logits that are never held whole give the numbers of logits that are."""

from dataclasses import replace

import pytest
import torch
from models import nanogpt, tiny_bert, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import blockspec
from blockspec import losses
from blockspec.model import heads
from blockspec.products.curvature import Products


def batch_of(model, *, ignored):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.config.vocab_size, (3, 7), generator=generator)
    labels = tokens.clone()
    if ignored:
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    return {"input_ids": tokens, "labels": labels}


CASES = {
    "tied": (lambda: tiny_gpt2(), losses.next_token),
    "untied": (lambda: tiny_gpt2(tie_word_embeddings=False), losses.next_token),
    "with a bias": (lambda: tiny_bert(), losses.masked_token),
}


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_whole_logits(monkeypatch, case, ignored, rows):
    monkeypatch.setattr(heads, "CHUNK_ROWS", rows)
    monkeypatch.setattr(heads, "CHUNK_ENTRIES", {"cpu": 1})
    make, loss = CASES[case]
    model = make()
    batches = [batch_of(model, ignored=ignored)]
    blocks = [*blockspec.partition(model, "tensor"), *blockspec.partition(model, "model")]
    requests = [(block, torch.randn(block.numel, dtype=torch.float64)) for block in blocks]
    objectives = [
        blockspec.Objective(model, batches, replace(loss, chunked=chunked))
        for chunked in (True, False)
    ]
    chunked, whole = (Products(objective).sweep(requests) for objective in objectives)
    for block, ours, expected in zip(blocks, chunked, whole, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-9, atol=1e-12 + 1e-11 * float(expected.norm()), msg=block.name
        )
    values = [objective.value() for objective in objectives]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_second_derivatives_numerically():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((5, 3), (6, 3), (6,))
    )
    labels = torch.randint(6, (5,), generator=generator)

    def terms(hidden, weight, bias):
        return 1.0 * heads.cross_entropies(heads.Logits(hidden, weight, bias), labels)

    torch.autograd.gradcheck(terms, (hidden, weight, bias))
    torch.autograd.gradgradcheck(terms, (hidden, weight, bias))


class LargestAlive(TorchDispatchMode):
    """How many tensors of at least ``entries`` entries are alive at once, at most."""

    def __init__(self, entries):
        super().__init__()
        self.entries, self.most, self.alive = entries, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.numel() >= self.entries
                and tensor._base is None
            ):
                self.alive[tensor.untyped_storage()] = True
        self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize(("chunked", "expected"), [(True, 1), (False, 4)])
def test_one_tensor_of_the_size_of_the_logits_is_held(monkeypatch, chunked, expected):
    """The probabilities; without chunks, logits, their gradient and tangents too."""
    monkeypatch.setattr(heads, "CHUNK_ENTRIES", {"cpu": 1})
    monkeypatch.setattr(heads, "CHUNK_ROWS", 16)
    model = tiny_gpt2(vocab_size=512, n_positions=64)
    tokens = torch.randint(512, (4, 64))
    objective = blockspec.Objective(
        model, [{"input_ids": tokens}], replace(losses.next_token, chunked=chunked)
    )
    blocks = blockspec.partition(model, "matrix", include="*weight*")
    with LargestAlive(4 * 63 * 512) as counted:
        Products(objective).sweep(
            [(block, torch.ones(block.numel, dtype=torch.float64)) for block in blocks]
        )
    assert counted.most == expected if chunked else counted.most >= expected


class Capped(torch.nn.Module):
    """A model that does more with its logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model, model.lm_head

    def forward(self, input_ids):
        return 2 * torch.tanh(self.model(input_ids=input_ids).logits / 2)


def test_a_model_that_goes_on_with_its_logits_gets_them():
    inner = tiny_gpt2(tie_word_embeddings=False)
    model = Capped(inner)
    tokens = {"input_ids": batch_of(inner, ignored=False)["input_ids"]}
    values = [
        blockspec.Objective(model, [tokens], replace(losses.next_token, chunked=c)).gradient()
        for c in (True, False)
    ]
    for name, gradient in values[0].items():
        torch.testing.assert_close(gradient, values[1][name])


def test_nanogpt_and_its_own_loss():
    model = nanogpt()
    tokens = torch.randint(model.config.vocab_size, (2, 6))
    pair = (tokens[:, :-1], tokens[:, 1:])
    objectives = [
        blockspec.Objective(model, [pair], replace(losses.next_token, chunked=c))
        for c in (True, False)
    ]
    for name, gradient in objectives[0].gradient().items():
        torch.testing.assert_close(gradient, objectives[1].gradient()[name])


def test_the_head_is_given_back():
    model = tiny_gpt2()
    with pytest.raises(ZeroDivisionError), heads.deferred(model):
        _ = 1 / 0
    assert "forward" not in vars(model.lm_head)
    assert type(model(torch.zeros(1, 2, dtype=torch.long)).logits) is torch.Tensor


class Changed(torch.nn.Module):
    """A model that does something to its logits before it hands them out."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.lm_head, self.change = model, model.lm_head, change

    def forward(self, input_ids):
        hidden = self.model.transformer(input_ids=input_ids).last_hidden_state
        return self.change(self.lm_head, hidden)


def masked(head, hidden):
    logits = head(hidden)
    logits[..., :5] = -10.0
    return logits


def scaled(head, hidden):
    logits = head(hidden)
    logits.mul_(0.5)  # its value is not used
    return logits


def where_differentiable(head, hidden):
    logits = head(hidden)
    return logits * 2 if logits.requires_grad else logits


def transposed(head, hidden):
    return head(hidden).mT.mT


def in_autocast(head, hidden):
    with torch.autocast("cpu", torch.bfloat16):
        return head(hidden)


def vmapped(head, hidden):
    return torch.func.vmap(head)(hidden)


def measured(head, hidden):
    logits = head(hidden)
    assert logits.size(-1) == logits.shape[-1] == 32
    assert (logits.dim(), len(logits)) == (3, 3)
    assert logits.numel() == 3 * 7 * 32
    assert logits.is_floating_point()
    assert getattr(logits, "_computed", None) is None
    return logits


CHANGES = [masked, scaled, where_differentiable, transposed, in_autocast, vmapped, measured]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_model_does_to_its_logits_counts(change):
    inner = tiny_gpt2(tie_word_embeddings=False, layers=1)
    tokens = {"input_ids": batch_of(inner, ignored=False)["input_ids"]}
    ours, theirs = (
        blockspec.Objective(Changed(inner, change), [tokens], replace(losses.next_token, chunked=c))
        for c in (True, False)
    )
    assert ours.value() == pytest.approx(theirs.value(), rel=1e-12)
    for name, gradient in ours.gradient().items():
        torch.testing.assert_close(gradient, theirs.gradient()[name])


def test_an_input_that_is_changed_before_the_logits_are_made_is_an_error():
    def change(head, hidden):
        logits = head(hidden.detach())
        hidden.mul_(0)
        return logits

    inner = tiny_gpt2(tie_word_embeddings=False, layers=1)
    tokens = {"input_ids": batch_of(inner, ignored=False)["input_ids"]}
    objective = blockspec.Objective(Changed(inner, change), [tokens], losses.next_token)
    with pytest.raises(RuntimeError, match=r"changed in place.*replacements=False"):
        objective.gradient()


def test_switched_off_the_head_is_the_models_own():
    model = tiny_gpt2(layers=1)
    objective = blockspec.Objective(
        model, [batch_of(model, ignored=True)], losses.next_token, replacements=False
    )
    with objective.prepared(), heads.deferred(model):
        hidden = torch.zeros(1, 2, 16, dtype=torch.float64)
        assert type(model.lm_head(hidden)) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_ready_losses_without_gradients(mode):
    model = tiny_gpt2(layers=1)
    batch = batch_of(model, ignored=True)
    expected, _count = losses.next_token(model.eval(), batch)
    with mode():
        for chunked in (True, False):
            found, _ = replace(losses.next_token, chunked=chunked)(model, batch)
            torch.testing.assert_close(found, expected.detach())
