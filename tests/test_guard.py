"""The guard: products that are wrong without a word are found, right ones pass, and nothing of the
user's is touched.
"""

import copy
import re

import pytest
import torch
from faults import FAULTS, Applied, KeptSlope, batch_of, network
from faults import objective as objective_of
from menagerie import zoo
from problems import problem
from torch import nn

import blockspec
from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.engine.estimate import plan_spectra
from blockspec.engine.settings import EstimateSettings
from blockspec.integrations import recording
from blockspec.model.doubles import Doubles, twin_of
from blockspec.optim import AdaHessian
from blockspec.products.curvature import Products
from blockspec.products.guard import check_products

ZOO = zoo()
QUICK = (
    "GPT2",
    "Llama",
    "Mixtral",
    "ResNet",
    "Wav2Vec2",
    "kinks at zero",
    "wide ReLU",
    "experts, one of four",
)


def check(objective, curvature="hessian", blocks=None):
    blocks = blocks or partition(objective.model, "tensor")
    return check_products(objective, blocks, curvature, lambda other: Products(other, curvature))


# What is wrong is found, what is right passes.

CASES = [(name, curvature) for name, fault in FAULTS.items() for curvature in fault.curvatures]
SLOW = {"compiled cross entropy"}  # compiling takes seconds


@pytest.mark.filterwarnings("ignore:.*quantized", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("name", "curvature"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in CASES],
)
def test_a_fault_is_found_and_its_place_and_remedy_named(name, curvature):
    with pytest.raises(ValueError, match=r"check=False goes on") as error:
        check(FAULTS[name].objective(), curvature)
    assert re.search(FAULTS[name].blamed, str(error.value)), str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_code_that_was_used_for_a_gradient_before():
    """It is compiled for one backward pass then, and says so in words of its own."""
    objective = FAULTS["compiled cross entropy"].objective()
    objective.gradient()
    with pytest.raises(ValueError, match=r"compiled.*torch\.compile"):
        check(objective)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_no_false_alarm(name):
    found = check(ZOO[name](torch.float32))
    assert found.state == "passed", str(found)
    assert not found.reason


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "residual"])
@pytest.mark.parametrize("name", ["GPT2", "kinks at zero"])
def test_no_false_alarm_for_other_matrices(name, curvature):
    assert check(ZOO[name](torch.float64), curvature).state == "passed"


def test_half_precision_is_compared_in_float64():
    found = check(ZOO["Llama"](torch.bfloat16))
    assert found.state == "passed"
    assert found.error < 1e-2


def test_a_sub_tensor_block_and_a_frozen_rest():
    objective = ZOO["GPT2"](torch.float32)
    objective.model.transformer.wte.requires_grad_(False)
    heads = partition(objective.model, "head", include="*query/head_1")
    assert check(objective, blocks=heads).state == "passed"


def test_where_autograd_itself_says_no_the_kernel_is_named():
    objective = objective_of(nn.Hardsigmoid())
    with pytest.raises(ValueError, match=r"hardsigmoid_backward.*is not implemented"):
        estimate_spectra(objective, partition(objective.model), 1, 2)


# It costs three gradients, once.


class Counted(nn.Module):
    """Counts its forward passes, also those of its copies."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner = inner
        self.register_forward_hook(lambda *_: calls.append(1))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "residual"])
@pytest.mark.parametrize("middle", [nn.Tanh, nn.ReLU], ids=["smooth", "kinks"])
def test_it_costs_three_gradients_at_most(curvature, middle):
    calls = []
    objective = objective_of(middle())
    objective.model = Counted(objective.model, calls)
    gradients = torch.autograd.grad
    counted = []

    def counting(outputs, inputs, *args, **kwargs):
        by_parameters = isinstance(inputs, list) and isinstance(inputs[0], nn.Parameter)
        if by_parameters and not kwargs.get("retain_graph"):  # products keep the graph
            counted.append(1)
        return gradients(outputs, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counting)
        check(objective, curvature)
    assert 2 <= len(counted) <= 3
    assert len(calls) <= 4  # a fisher or ggn reference takes two forward passes and one gradient


def test_an_objective_remembers_what_passed():
    calls = []
    objective = objective_of()
    objective.model = Counted(objective.model, calls)
    everything = partition(objective.model, "tensor")

    def passes(blocks):
        before = len(calls)
        Products(objective).check(blocks)
        return len(calls) - before - 2  # two for whether it is deterministic

    assert passes(everything) == 1 + 3  # one for what its graph will take, once
    assert passes(everything) == passes(everything[:2]) == 0
    with torch.no_grad():
        everything_of = dict(objective.model.named_parameters())
        everything_of[everything[0].name].mul_(1.01)
    assert passes(everything[:2]) == 3
    assert passes(everything) == 3
    objective.loss = losses.Loss(lambda m, b: 2 * m(b[0]), losses.classification.terms)
    assert passes(everything) == 3


def test_the_model_and_random_numbers_are_left_alone():
    objective = ZOO["Wav2Vec2"](torch.float32)
    objective.model.train()
    before = copy.deepcopy(objective.model.state_dict())
    tensors = [*objective.model.parameters(), *objective.model.buffers()]
    versions = [(t._version, t.data_ptr(), t.dtype) for t in tensors]
    numbers = torch.get_rng_state()
    check(objective)
    assert versions == [(t._version, t.data_ptr(), t.dtype) for t in tensors]
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(module.training for module in objective.model.modules())
    assert all(p.grad is None for p in objective.model.parameters())
    torch.testing.assert_close(objective.model.state_dict(), before, rtol=0, atol=0)


# Every caller has it, and can leave it out.


def faulty():
    return objective_of(Applied(KeptSlope.apply))


def _estimate(objective, blocks, **settings):
    return estimate_spectra(objective, blocks, 1, 2, **settings).cost


CALLERS = {
    "estimate_spectra": _estimate,
    "trace": lambda o, b, **s: blockspec.trace(o, b, num_probes=4, **s).cost,
    "xtrace": lambda o, b, **s: blockspec.trace(o, b, "xtrace", num_probes=8, **s).cost,
    "diagonal": lambda o, b, **s: blockspec.diagonal(o, b, num_probes=2, **s).means.cost,
    "coupling": lambda o, b, **s: blockspec.coupling(o, b, num_probes=2, **s).cost,
    "squared_norms": lambda o, b, **s: blockspec.squared_norms(o, b, num_probes=4, **s).cost,
    "top_eigenpairs": lambda o, b, **s: blockspec.top_eigenpairs(o, b[0], 1, **s).cost,
}
WITHOUT_COST = {
    "plan_spectra": lambda o, b, **s: plan_spectra(o, b, 1, 2, **s),
    "norms": lambda o, b, **s: blockspec.norms(estimate_spectra(o, b, 1, 2, **s)),
    "dense": lambda o, b, **s: blockspec.dense(o, b[1], **s),
    "dense, off the diagonal": lambda o, b, **s: blockspec.dense(o, b[1], b[2], **s),
    "landscape": lambda o, b, **s: blockspec.landscape(o, b[0], points=2, **s),
}


@pytest.mark.parametrize("name", [*CALLERS, *WITHOUT_COST])
def test_a_silent_fault_is_found_by_every_caller(name):
    call = (CALLERS | WITHOUT_COST)[name]
    objective = faulty()
    blocks = partition(objective.model, "tensor")
    with pytest.raises(ValueError, match=r"To blame is 2 \(Applied\).*KeptSlope.*check=False"):
        call(objective, blocks)
    cost = call(objective, blocks, check=False)
    assert name in WITHOUT_COST or cost.check == "off"


@pytest.mark.parametrize("name", CALLERS)
def test_a_result_says_that_its_products_passed(name):
    objective = objective_of()
    assert CALLERS[name](objective, partition(objective.model, "tensor")).check == "passed"


def test_the_plug_ins_check_finds_it_before_training(tmp_path):
    objective = faulty()
    with pytest.raises(ValueError, match=r"To blame is 2 \(Applied\)"):
        recording.check(tmp_path, objective, partition(objective.model), EstimateSettings())


def test_adahessian_finds_it_where_it_is_asked():
    objective = faulty()
    optimizer = AdaHessian(objective.model.named_parameters())
    with pytest.raises(RuntimeError, match=r"To blame is 2 \(Applied\).*KeptSlope"):
        optimizer.check(objective)
    sound = objective_of()
    assert AdaHessian(sound.model.parameters()).check(sound).state == "passed"


def test_adahessian_finds_functions_that_lose_the_graph_by_itself():
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, slope):
            with torch.no_grad():
                return 2 * ctx.saved_tensors[0] * slope

    model = network(Applied(Lost.apply)).double()
    x, y = batch_of()
    with pytest.raises(RuntimeError, match=r"Lost has no second derivative"):
        AdaHessian(model.parameters()).backward(nn.functional.cross_entropy(model(x), y))


class Padded(nn.Module):
    """Means over all words, those of padding among them, as much code for classification has."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3, padding_idx=1)
        self.same = nn.Linear(3, 5, bias=False)
        self.same.weight = self.words.weight  # padding has a gradient as a class alone

    def forward(self, ids):
        return self.same(self.words(ids).mean(1).tanh())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_padding_that_move_the_loss_are_constants(tied):
    torch.manual_seed(0)
    model = Padded().double()
    if not tied:
        model.same = nn.Linear(3, 5).double()
    torch.nn.init.normal_(model.words.weight)
    ids, y = torch.tensor([[1, 0, 2], [3, 1, 1], [2, 4, 3]]), torch.tensor([0, 3, 2])
    objective = Objective(model, [(ids, y)], losses.classification)
    assert check(objective).state == "passed"

    def value(weight):
        words = torch.where(torch.arange(5)[:, None] == 1, weight.detach(), weight)[ids]
        out = words.mean(1).tanh() @ (weight if tied else model.same.weight).T
        return nn.functional.cross_entropy(out if tied else out + model.same.bias, y)

    (block,) = partition(model, "tensor", include="words*")
    truth = torch.autograd.functional.hessian(value, model.words.weight).reshape(15, 15)
    found = blockspec.dense(objective, block)
    torch.testing.assert_close(torch.from_numpy(found), truth, rtol=1e-9, atol=1e-12)


# What cannot be checked is said.


def test_a_model_that_cannot_be_copied_is_said_to_be_unchecked():
    objective = objective_of()
    objective.model.lock = torch.jit  # a module cannot be copied
    spectra = estimate_spectra(objective, partition(objective.model), 1, 2)
    assert re.match(
        r"unchecked: it cannot be tried in float64 \(TypeError: cannot pickle", spectra.check
    )
    assert "unchecked" in repr(spectra)


@pytest.mark.parametrize("first", [1, 2])
def test_a_first_batch_without_terms_is_left_out(first):
    x, y = batch_of()
    empty = (x, torch.full_like(y, -100))
    objective = Objective(network().double(), [empty] * first + [(x, y)], losses.classification)
    assert check(objective).state == "passed"


def test_a_loss_of_another_model_is_said_to_be_unchecked():
    model = network().double()
    objective = Objective(model, [batch_of()], lambda _, b: losses.classification(model, b))
    assert "another model than its first argument" in str(check(objective))


def held_in_a_cell(layer):
    forward = layer.forward

    def around(x):
        return forward(x)

    def twice_around(x):
        return around(x)

    return twice_around


def held_as_a_default(layer):
    return lambda x, layer=layer, *, forward=type(layer).forward: forward(layer, x)


def held_as_a_global(layer):
    HELD["forward"] = layer.forward
    return lambda x: HELD["forward"](x)


HELD = {}


def with_dropout():
    """The copy is in eval mode, and what it computes with of the model itself is not."""
    objective = objective_of(nn.Sequential(nn.Linear(6, 6), nn.Dropout()))
    objective.model.train()
    return objective


@pytest.mark.parametrize("around", [held_in_a_cell, held_as_a_default])
def test_functions_that_hold_the_model_are_copied_with_it(around):
    objective = with_dropout()
    objective.model[2].forward = around(objective.model[2])
    assert check(objective).state == "passed"


def test_a_function_that_holds_the_model_out_of_reach_is_no_fault_of_the_model():
    objective = with_dropout()
    objective.model[2].forward = held_as_a_global(objective.model[2])
    assert "cannot be copied with it" in str(check(objective))


def test_too_little_memory_for_a_copy_is_said(monkeypatch):
    monkeypatch.setattr("blockspec.products.trials.memory.total", lambda device: 0)
    assert re.search(r"MemoryError: a copy takes .* KiB, of", str(check(objective_of())))


def test_a_detached_part_is_noted():
    """The gradient is right where it is, and the loss has more to it."""

    class Detached(nn.Module):
        def forward(self, x):
            return x + x.detach() * 0 + torch.zeros(1)

    assert check(objective_of(Detached())).reason == ""
    shifted = losses.Loss(
        lambda m, b: m(b[0]),
        lambda out, b: losses.classification.terms(out, b) + out.detach().sum(1),
    )
    found = check(objective_of(loss=shifted))
    assert found.state == "passed"
    assert "a part of the loss is detached" in found.reason


def test_autocast_around_the_call_is_refused():
    objective = objective_of()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"an autocast to bfloat16 is open around the call"),
    ):
        estimate_spectra(objective, partition(objective.model), 1, 2)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "residual"])
def test_a_loss_that_is_infinite_in_the_last_batch(curvature):
    """Its gradient is zero there, and so are its products: only the value says that nothing of it
    is known.
    """
    terms = losses.classification.terms

    def infinite(outputs, batch):
        return terms(outputs, batch) + (torch.inf if len(batch[1]) == 5 else 0.0)

    loss = losses.Loss(losses.classification.outputs, infinite)
    model = network().double()
    objective = Objective(model, [batch_of(8), batch_of(8), batch_of(5)], loss)
    with pytest.raises(ValueError, match=r"the loss is inf on batch 2 \(counted from 0"):
        estimate_spectra(objective, partition(model), 1, 2, curvature=curvature)


# Its parts.


def test_everything_is_computed_in_float64():
    def narrow(x):
        y = x.float() * torch.ones(3) + torch.zeros(3, dtype=torch.bfloat16)
        return torch.softmax(y.half().to(torch.float32), 0, dtype=torch.float32)

    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    with Doubles():
        wide = narrow(x)
    torch.testing.assert_close(wide, x.softmax(0), rtol=1e-15, atol=0)


def test_a_twin_has_the_hooks_of_parameters():
    model = nn.Linear(2, 1)
    model.weight.register_hook(lambda g: 5 * g)
    twin = twin_of(model)
    x = torch.ones(1, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(twin(x).sum(), twin.weight)
    assert gradient.tolist() == [[5.0, 5.0]]
    assert twin.weight.data_ptr() != model.weight.data_ptr()


def test_a_twin_of_a_model_that_has_run_with_weight_norm():
    model = problem("gpt2").model
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(2, 2))
    module(torch.ones(1, 2))
    twin = twin_of(nn.Sequential(module, nn.Linear(2, 2)))
    assert twin(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert twin_of(model).training is False
