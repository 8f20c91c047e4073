"""The objective: a mean over terms, the same whatever the batches; and a model that comes back as
it was.
"""

import copy
import warnings
from dataclasses import dataclass

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import VOCABULARY, gpt2, nanogpt, problem, resnet, tokens, vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.model.objective import placed
from blockspec.numerics.content import fingerprint


def mean_of_terms(it):
    """Of an eval copy, without blockspec."""
    model = copy.deepcopy(it.model).eval()
    return torch.cat([it.terms(model, batch) for batch in it.batches]).mean(), model


@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "bert", "vit", "resnet"])
def test_value_and_gradient_are_those_of_the_mean_over_terms(name):
    it = problem(name)
    value, model = mean_of_terms(it)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    assert it.objective().value() == pytest.approx(value.item(), rel=1e-12)
    ours = it.objective().gradient()
    assert list(ours) == [name for name, _ in it.model.named_parameters()]
    for gradient, expected in zip(ours.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def curvature_of(model, batches, loss=losses.next_token):
    objective = Objective(model, batches, loss)
    blocks = [
        *partition(model, include=["*h.0*c_attn.weight/value", "*wte*"]),
        *partition(model, "model"),
    ]
    spectra = estimate_spectra(objective, blocks, num_probes=1, num_steps=6)
    return objective.value(), np.stack([s.nodes for s in spectra.values()])


def test_unequal_masks_and_sizes_of_batches_change_nothing():
    """The mean over batch means would: the second half holds a quarter of the terms."""
    model = problem("gpt2").model
    ids = tokens(4, 6)
    mask = torch.tensor([[1] * 6, [1] * 6, [1] * 3 + [0] * 3, [1] * 2 + [0] * 4])
    whole = [{"input_ids": ids, "attention_mask": mask}]
    halves = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    single = [{"input_ids": ids[[i]], "attention_mask": mask[[i]]} for i in (3, 0, 2, 1)]
    value, nodes = curvature_of(model, whole)
    for batches in (halves, single):
        other_value, other_nodes = curvature_of(model, batches)
        assert other_value == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(other_nodes, nodes, rtol=1e-9, atol=1e-12)
    means = [curvature_of(model, [half])[0] for half in halves]
    assert np.mean(means) != pytest.approx(value, rel=1e-3)


def test_the_same_batch_given_again_changes_nothing():
    model = problem("gpt2").model
    batch = {"input_ids": tokens(2, 6)}
    value, nodes = curvature_of(model, [batch])
    for times in (2, 4):
        again_value, again_nodes = curvature_of(model, [batch] * times)
        assert again_value == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(again_nodes, nodes, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_the_size_of_a_micro_batch_changes_nothing(micro_batch, curvature):
    model = problem("gpt2").model
    mask = torch.tensor([[1] * 6, [1] * 6, [1] * 3 + [0] * 3, [1] * 2 + [0] * 4])
    batches = [{"input_ids": tokens(4, 6), "attention_mask": mask}, {"input_ids": tokens(2, 5)}]
    blocks = [*partition(model, include="*wte*"), *partition(model, "model")]
    whole, parts = (
        Objective(model, batches, losses.next_token, micro_batch=size)
        for size in (None, micro_batch)
    )
    assert parts.value() == pytest.approx(whole.value(), rel=1e-12)
    one, two = (
        estimate_spectra(objective, blocks, 1, 5, curvature=curvature)
        for objective in (whole, parts)
    )
    for name in one:
        np.testing.assert_allclose(two[name].nodes, one[name].nodes, rtol=1e-9, atol=1e-12)


def test_a_micro_batch_of_images_and_pairs():
    it = vit()
    sizes = []
    whole, parts = it.objective(), it.objective(micro_batch=2)
    parts.value()  # tries on a few examples which tensors carry them
    it.model.register_forward_hook(lambda model, inputs, output: sizes.append(len(inputs[0])))
    assert parts.value() == pytest.approx(whole.value(), rel=1e-12)
    assert sizes == [2, 1, 2, 3, 2]


def test_batches_are_not_cut_where_their_statistics_matter():
    it = resnet()
    whole, parts = (
        it.objective(batch_norm="train", micro_batch=size).value() for size in (None, 1)
    )
    assert whole == parts


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_batch_without_terms_changes_nothing(place):
    it = gpt2()
    empty = {"input_ids": tokens(1, 5), "labels": torch.full((1, 5), -100)}
    value, nodes = curvature_of(it.model, it.batches)
    other_value, other_nodes = curvature_of(
        it.model, [*it.batches[:place], empty, *it.batches[place:]]
    )
    assert other_value == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(other_nodes, nodes, rtol=1e-9, atol=1e-12)


class OnlyIterable:
    def __init__(self, batches):
        self.read = batches

    def __iter__(self):
        yield from self.read


@pytest.mark.parametrize("holder", [list, tuple, iter, OnlyIterable])
def test_batches_may_be_held_by_anything_finite(holder):
    it = problem("gpt2")
    objective = Objective(it.model, holder(it.batches), it.loss)
    assert objective.value() == pytest.approx(it.objective().value(), rel=1e-12)
    assert objective.value() == objective.value()  # a second pass finds the batches again


def test_an_unshuffled_loader_is_a_list_of_batches():
    it = problem("vit")
    x, y = (torch.cat(parts) for parts in zip(*it.batches, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    objective = Objective(it.model, loader, it.loss)
    objective.check()
    assert objective.value() == pytest.approx(it.objective().value(), rel=1e-12)


def test_a_tensor_as_a_batch():
    model = nn.Linear(3, 1, dtype=torch.float64)
    loss = losses.Loss(
        lambda model, batch: model(batch)[:, 0], lambda outputs, batch: outputs.square()
    )
    batches = [torch.ones(2, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)]
    objective = Objective(model, batches, loss)
    expected = (2 * model(batches[0][:1]).square() + model(batches[1]).square()) / 3
    assert objective.value() == pytest.approx(expected.item(), rel=1e-12)


def state_of(model):
    """All that an estimate could leave changed."""
    return {
        "flags": [module.training for module in model.modules()],
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "identities": [id(p) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()
        ],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
        "random": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if key == "attention":
            assert a[key] == b[key]
        else:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=f"{key} changed")


def disturbed(it):
    """Mixed training flags, gradients on some parameters, one frozen, a fused attention
    implementation.
    """
    for number, module in enumerate(it.model.modules()):
        module.training = number % 3 == 0
    for number, p in enumerate(it.model.parameters()):
        p.grad = torch.full_like(p, 7.0) if number % 2 else None
    next(iter(it.model.parameters())).requires_grad_(False)
    if hasattr(it.model.config, "_attn_implementation") and it.model.config.model_type == "gpt2":
        it.model.config._attn_implementation = "flex_attention"
    return it


def exploding(it, *, at_call):
    """The loss raises at its n-th call; the n is counted over value, check and sweeps."""
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == at_call:
            raise RuntimeError("in the middle")
        return it.loss(model, batch)

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("make", [gpt2, resnet])
def test_the_model_comes_back_as_it_was(make, batch_norm, curvature):
    it = disturbed(make())
    before = state_of(it.model)
    objective = it.objective(batch_norm=batch_norm)
    objective.value()
    objective.gradient()
    estimate_spectra(
        objective, partition(it.model)[:3], num_probes=1, num_steps=2, curvature=curvature
    )
    assert_same(state_of(it.model), before)


@pytest.mark.parametrize("at_call", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("make", [gpt2, resnet])
def test_the_model_comes_back_also_while_an_exception_is_held(make, batch_norm, at_call):
    it = disturbed(make())
    before = state_of(it.model)
    objective = Objective(
        it.model, it.batches, exploding(it, at_call=at_call), batch_norm=batch_norm
    )
    with pytest.raises(RuntimeError, match="in the middle") as held:  # the guard tries again
        estimate_spectra(objective, partition(it.model)[:3], 1, 4, check=False)
    assert held.tb is not None  # every frame of the traceback is still alive
    assert_same(state_of(it.model), before)


def test_the_model_comes_back_while_an_error_of_a_product_is_held():
    it = disturbed(gpt2())
    before = state_of(it.model)

    class Bad(torch.autograd.Function):
        """Raises in the second derivative only."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return Slope.apply(ctx.saved_tensors[0], slope)

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slope):
            return slope.clone()

        @staticmethod
        def backward(ctx, slope):
            raise RuntimeError("in a product")

    def loss(model, batch):
        total, count = it.loss(model, batch)
        return Bad.apply(total * 1.0), count

    with pytest.raises(RuntimeError, match="in a product") as held:
        estimate_spectra(
            Objective(it.model, it.batches, loss),
            partition(it.model)[:2],
            num_probes=1,
            num_steps=2,
        )
    assert held.tb is not None
    assert_same(state_of(it.model), before)


@pytest.mark.parametrize("failing", ["value", "gradient", "check"])
def test_the_model_comes_back_from_every_method(failing):
    it = disturbed(gpt2())
    before = state_of(it.model)
    objective = Objective(it.model, it.batches, exploding(it, at_call=2))
    with pytest.raises(RuntimeError, match="in the middle"):
        getattr(objective, failing)()
    assert_same(state_of(it.model), before)


def test_an_estimate_works_where_gradients_are_switched_off():
    it = problem("gpt2")
    (block,) = partition(it.model, include="*h.0*weight/value")
    expected = estimate_spectra(it.objective(), block, num_probes=1, num_steps=3)
    with torch.no_grad():
        spectra = estimate_spectra(it.objective(), block, num_probes=1, num_steps=3)
        assert not torch.is_grad_enabled()
    np.testing.assert_array_equal(spectra[block.name].nodes, expected[block.name].nodes)


def test_dropout_in_training_mode_changes_nothing():
    it = gpt2()
    (block,) = partition(it.model, include="*h.0*weight/value")
    nodes = []
    for training in (True, False):
        it.model.train(training)
        nodes.append(
            estimate_spectra(it.objective(), block, num_probes=1, num_steps=3)[block.name].nodes
        )
    np.testing.assert_array_equal(*nodes)


class AlwaysDropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)  # training=True whatever the mode


class NeverQuiet(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


def dropping(kind):
    it = nanogpt()
    it.model.transformer.drop = kind()
    return it.objective()


def noisy_loss(model, batch):
    total, count = losses.next_token(model, batch)
    return total * (1 + 1e-6 * torch.rand((), dtype=torch.float64)), count


def shuffled():
    data = TensorDataset(torch.randn(64, 3, 8, 8, dtype=torch.float64), torch.arange(64) % 5)
    return Objective(
        problem("vit").model, DataLoader(data, batch_size=4, shuffle=True), losses.classification
    )


class Augmented:
    def __iter__(self):
        for x, y in problem("vit").batches:
            yield x + 0.01 * torch.randn(()), y


RANDOM = {
    "dropout by function": (
        lambda: dropping(AlwaysDropping),
        r"not deterministic.*dropout that ignores eval mode",
    ),
    "dropout by flag": (
        lambda: dropping(NeverQuiet),
        r"not deterministic.*dropout that ignores eval mode",
    ),
    "loss": (
        lambda: Objective(nanogpt().model, nanogpt().batches, noisy_loss),
        r"not deterministic.*a loss",
    ),
    "shuffled data": (shuffled, r"not the same when they are read again.*shuffle=False"),
    "augmented data": (
        lambda: Objective(problem("vit").model, Augmented(), losses.classification),
        r"not the same when they are read again.*random augmentation",
    ),
}


@pytest.mark.parametrize(("make", "message"), RANDOM.values(), ids=RANDOM)
def test_an_objective_that_is_not_deterministic_is_found_before_the_work(make, message):
    objective = make()
    sweeps = []
    blocks = partition(objective.model)[:2]
    with pytest.raises(ValueError, match=message):
        estimate_spectra(
            objective, blocks, num_probes=1, num_steps=2, progress=lambda *done: sweeps.append(done)
        )
    assert not sweeps


@pytest.mark.parametrize("change", ["other", "fewer", "more"])
def test_data_that_changes_after_the_checks_is_found(change):
    """An augmentation that is drawn rarely may leave both readings of the checks as they were."""
    first, second, other = (tokens(2, 6, seed=seed) for seed in (1, 2, 3))
    kinds = {"other": [first, other], "fewer": [first], "more": [first, second, other]}

    class Late:
        readings = 0

        def __iter__(self):
            self.readings += 1
            batches = [first, second] if self.readings < 6 else kinds[change]
            yield from ({"input_ids": ids} for ids in batches)

    batches = Late()
    objective = Objective(problem("gpt2").model, batches, losses.next_token)
    (block,) = partition(objective.model, include="*h.0*c_fc.bias")
    with pytest.raises(ValueError, match=r"read again \(batch [12] differs\)"):
        estimate_spectra(objective, block, num_probes=1, num_steps=8)
    batches.readings = 0
    estimate_spectra(objective, block, num_probes=1, num_steps=1)  # it checks anew


MISFITS = {
    "numpy arrays": (lambda ids: {"input_ids": ids.numpy()}, r"'input_ids'.*numpy array"),
    "lists": (lambda ids: {"input_ids": ids.tolist()}, r"'input_ids'.*list of numbers"),
    "an array of a pair": (lambda ids: (ids.numpy(), ids), r"0 of the batch is a numpy array"),
    "one example": (lambda ids: {"input_ids": ids[0]}, r"shape \(6,\).*DataLoader\(dataset"),
}


@pytest.mark.parametrize(("made", "message"), MISFITS.values(), ids=MISFITS)
def test_a_batch_that_is_no_batch_of_tensors_is_told_so(made, message):
    model = problem("gpt2").model
    objective = Objective(model, [made(tokens(2, 6))], losses.next_token)
    with pytest.raises((TypeError, ValueError), match=message):
        objective.check()


def test_data_that_changes_in_a_later_batch_only_is_found():
    """The first batch is the same every time; the others are drawn anew."""

    class Later:
        def __iter__(self):
            yield tokens(2, 6, seed=2), tokens(2, 6, seed=3)
            yield torch.randint(1, VOCABULARY, (2, 6)), tokens(2, 6, seed=5)

    model = nanogpt().model
    objective = Objective(model, Later(), losses.next_token)
    with pytest.raises(ValueError, match="not the same"):
        estimate_spectra(objective, partition(model)[:2], num_probes=1, num_steps=3)


def test_a_deterministic_objective_passes():
    for name in ("gpt2", "resnet"):
        problem(name).objective().check()


def test_check_gives_no_warnings_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem("gpt2").objective().check()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_batches_of_every_form_are_moved(device):
    device = torch.device(device)
    x = torch.ones(2)
    pair, mapping, nested = (
        placed(batch, device, None) for batch in ((x, x), {"a": x}, [x, {"b": (x, 3)}])
    )
    assert isinstance(pair, tuple)
    found = [*pair, mapping["a"], nested[0], nested[1]["b"][0]]
    assert {tensor.device.type for tensor in found} == {device.type}
    assert nested[1]["b"][1] == 3


def test_floating_point_numbers_of_batches_take_the_dtype_of_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)).double()
    batch = {"x": torch.ones(4, 2), "labels": torch.arange(4)}
    (found,) = Objective(model, [batch], losses.classification).batches()
    assert (found["x"].dtype, found["labels"].dtype) == (torch.float64, torch.int64)
    model[1].float()  # of two dtypes: left as it is
    (found,) = Objective(model, [batch], losses.classification).batches()
    assert found["x"].dtype == torch.float32


@pytest.mark.parametrize("form", ["BatchEncoding", "BatchFeature", "namedtuple", "dict"])
def test_batches_of_other_kinds_keep_their_content(form):
    from collections import namedtuple

    from transformers import BatchEncoding, BatchFeature

    content = {"input_ids": tokens(1, 4)}
    batch = {
        "BatchEncoding": lambda: BatchEncoding(content),
        "BatchFeature": lambda: BatchFeature(content),
        "namedtuple": lambda: namedtuple("Batch", ["x", "y"])(tokens(1, 4), tokens(1, 4)),
        "dict": lambda: content,
    }[form]()
    model = (
        models.tiny_gpt2(vocab_size=VOCABULARY, layers=1)
        if form != "namedtuple"
        else nanogpt().model
    )
    objective = Objective(model, [batch], losses.next_token)
    assert np.isfinite(objective.value())


@dataclass(frozen=True, slots=True)
class Words:
    ids: torch.Tensor
    weight: torch.Tensor


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_batch_may_be_a_dataclass_and_its_terms_weighted(micro_batch):
    """Its tensors are moved and cut as those of a mapping are; counts that are sums of weights are
    equal to rounding only.
    """
    model = torch.nn.Linear(3, 2).double()
    batch = Words(torch.randn(7, 3), torch.linspace(0.1, 0.7, 7))

    def loss(model, batch):
        return (model(batch.ids).square().sum(1) * batch.weight).sum(), batch.weight.sum()

    objective = Objective(model, [batch], loss, micro_batch=micro_batch)
    parts = list(objective.batches())
    assert [len(part.ids) for part in parts] == ([1] * 7 if micro_batch else [7])
    assert {part.ids.dtype for part in parts} == {torch.float64}
    terms = model(batch.ids.double()).square().sum(1) @ batch.weight.double()
    assert objective.value() == pytest.approx(terms.item() / batch.weight.sum().item(), rel=1e-6)


def test_a_loss_may_take_things_out_of_its_batch():
    model, x = torch.nn.Linear(3, 2).double(), torch.ones(2, 3)
    batch = {"x": x, "rest": [x, x]}

    def loss(model, batch):
        return model(batch.pop("x") + batch["rest"].pop()).square().sum(), len(batch["rest"])

    objective = Objective(model, [batch], loss)
    objective.check()
    assert objective.value() == objective.value()
    assert len(batch["rest"]) == len(batch) == 2


class Held:
    """A batch of somebody's own class."""

    def __init__(self, x):
        self.x = x


def test_fingerprints_tell_batches_apart():
    x, y = tokens(2, 4), tokens(2, 4, seed=1)
    assert fingerprint({"a": x, "b": y}) == fingerprint({"a": x.clone(), "b": y.clone()})
    many = torch.arange(2000)  # its repr leaves out the middle
    other = many.index_fill(0, torch.tensor([900]), 0)
    assert fingerprint(Words(many, many)) != fingerprint(Words(many, other))
    others = [
        {"a": y, "b": x},
        {"a": x},
        {"a": x, "c": y},
        {"a": x.int(), "b": y},
        {"a": x.view(4, 2), "b": y},
    ]
    assert len({fingerprint(batch) for batch in [{"a": x, "b": y}, *others]}) == 6
    assert fingerprint(x.numpy()) == fingerprint(x) != fingerprint(y.numpy())
    assert fingerprint(Held(x)) == fingerprint(Held(x.clone())) != fingerprint(Held(y))
    assert fingerprint(torch.ones(2, dtype=torch.bfloat16)) != fingerprint(
        torch.zeros(2, dtype=torch.bfloat16)
    )
    assert fingerprint(torch.tensor(1.5)) == fingerprint(torch.tensor(1.5))
