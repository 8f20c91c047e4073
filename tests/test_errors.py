"""Mistakes that users make: each is answered before the expensive part, with the value, what was
allowed and the remedy.
"""

import copy

import numpy as np
import pytest
import torch
from problems import gpt2, nanogpt, problem, tokens
from quadratics import decaying, matrix_of, objective_of
from torch import nn

import blockspec
from blockspec import Objective, estimate_spectra, load_spectra, losses, partition


def linear(inputs=3, outputs=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs, dtype=torch.float64)


def pairs(count=1, inputs=3):
    x = torch.ones(2, inputs, dtype=torch.float64)
    return [(x, torch.tensor([0, 1])) for _ in range(count)]


def estimate(model=None, batches=None, loss=losses.classification, blocks=None, **settings):
    model = linear() if model is None else model
    objective = Objective(model, pairs() if batches is None else batches, loss)
    return estimate_spectra(objective, partition(model) if blocks is None else blocks, **settings)


# Blocks.


@pytest.mark.parametrize("by", ["matrices", "Layer", ""])
def test_an_unknown_partition(by):
    with pytest.raises(
        ValueError, match=rf"'{by}' is not one of tensor, matrix, head, neuron, layer, model"
    ):
        partition(linear(), by=by)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_an_unknown_block_pattern_is_answered_with_the_nearest_names(argument):
    model = problem("gpt2").model
    with pytest.raises(
        ValueError,
        match=rf"{argument}: 'transformer\.h\.0\.attn\.c_atn\.weight/query'.*nearest.*0\.attn\.c_attn",
    ) as error:
        partition(model, **{argument: "transformer.h.0.attn.c_atn.weight/query"})
    assert "transformer.h.0.attn.c_attn.weight/query" in str(error.value)


def test_an_empty_partition():
    with pytest.raises(
        ValueError, match=r"the partition is empty: include='\*weight'.*exclude='\*'"
    ):
        partition(linear(), include="*weight", exclude="*")
    with pytest.raises(
        ValueError, match=r"no blocks: the partition is empty; see blockspec\.partition"
    ):
        estimate(blocks=())


def test_a_frozen_model():
    model = linear().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no parameter of Linear requires gradients.*requires_grad_\(True\)"
    ):
        partition(model)
    with pytest.raises(
        ValueError,
        match=r"'weight', which is no parameter of the model that requires gradients.*after "
        r"freezing",
    ):
        estimate(model, blocks=partition(linear()))


def test_blocks_of_another_model():
    with pytest.raises(
        ValueError,
        match=r"block '.*wte.*no parameter of the model that requires gradients; make the "
        r"partition",
    ):
        estimate(blocks=partition(problem("gpt2").model, include="*wte*"))


def test_blocks_of_the_same_name():
    blocks = partition(linear())
    with pytest.raises(
        ValueError, match=r"blocks with the same name: \['weight'\]; names must differ"
    ):
        estimate(blocks=[*blocks, blocks[0]])


def test_a_block_from_a_file(tmp_path):
    spectra = estimate(num_probes=1, num_steps=2)
    spectra.save(tmp_path / "s.parquet")
    loaded = load_spectra(tmp_path / "s.parquet")["weight"].block
    with pytest.raises(
        ValueError, match=r"block 'weight' has no parameters \(from a file\?\): make it with"
    ):
        estimate(blocks=loaded)


# The objective's parts.


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match=r"model is a torch\.nn\.Module; got a str"):
        Objective("gpt2", pairs(), losses.classification)


def test_a_loss_that_is_none():
    with pytest.raises(
        TypeError,
        match=r"loss is a function \(model, batch\) -> \(sum, number of terms\); got a str",
    ):
        Objective(linear(), pairs(), "cross entropy")


@pytest.mark.parametrize(
    "single", [torch.zeros(2), {"input_ids": torch.zeros(2)}], ids=["tensor", "mapping"]
)
def test_a_single_batch_that_is_not_in_a_list(single):
    with pytest.raises(TypeError, match=r"got a single (Tensor|dict): put it in a list"):
        Objective(linear(), single, losses.classification)


@pytest.mark.parametrize("batches", [[], (), iter([]), {}.items()])
def test_no_batches(batches):
    with pytest.raises(ValueError, match=r"no batches: .* pass a list of at least one batch"):
        Objective(linear(), batches, losses.classification)


def test_an_iterable_that_ends_at_once():
    class Ended:
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="no batches: the iterable of batches ended at once"):
        estimate(batches=Ended())
    spent = iter(pairs())
    list(spent)
    with pytest.raises(ValueError, match="the iterator had ended"):
        estimate(batches=spent)


def test_another_mode_of_batch_norm():
    with pytest.raises(ValueError, match=r"batch_norm is one of \('eval', 'train'\), got 'frozen'"):
        Objective(linear(), pairs(), losses.classification, batch_norm="frozen")


@pytest.mark.parametrize("loss", [losses.classification, losses.next_token])
def test_a_batch_of_another_shape(loss):
    if loss is losses.next_token:
        model, batch = problem("gpt2").model, {"input_ids": tokens(2, 6), "labels": tokens(2, 5)}
    else:
        model, batch = linear(), (torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 1, 1]))
    with pytest.raises(
        ValueError, match=r"logits of shape .* need labels of shape .*, got .*: check the batch"
    ):
        estimate(model, [batch], loss)


def test_a_loss_that_gives_one_value():
    with pytest.raises(
        TypeError, match=r"it must give two: \(sum of the loss terms, number of terms\)"
    ):
        estimate(loss=lambda model, batch: model(batch[0]).sum())


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda model, batch: (torch.zeros(3), 1), "a vector"),
        (lambda model, batch: (model(batch[0]).sum().item(), 1), "a number"),
    ],
)
def test_a_loss_that_gives_no_scalar_tensor(loss, kind):
    with pytest.raises(TypeError, match="the loss must give a scalar tensor and a count; it gave"):
        estimate(loss=loss)


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_a_loss_without_a_graph(how):
    def loss(model, batch):
        with torch.set_grad_enabled(how == "detach"):
            total = model(batch[0]).sum()
        return total.detach() if how == "detach" else total, 2

    with pytest.raises(
        ValueError, match=r"the loss has no graph.*frozen model.*requires_grad_\(True\)"
    ):
        estimate(loss=loss)


def test_a_loss_without_terms():
    model = problem("gpt2").model
    batches = [{"input_ids": tokens(1, 4), "labels": torch.full((1, 4), -100)}] * 2
    with pytest.raises(ValueError, match=r"the loss has 0 terms.*labels -100"):
        estimate(model, batches, losses.next_token)


def test_a_number_of_terms_that_is_none():
    loss = lambda model, batch: (model(batch[0]).sum(), float("nan"))  # noqa: E731
    with pytest.raises(ValueError, match=r"the loss gave nan for the number of terms"):
        estimate(loss=loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value):
    model = linear()
    with torch.no_grad():
        model.bias[0] = value
    with pytest.raises(
        ValueError, match=rf"the loss is ({value}|nan) on the first batch.*check the checkpoint"
    ):
        estimate(model)


def test_a_product_that_is_not_finite_names_its_block():
    """The loss and its gradient are fine; the second derivative of |b|^1.5 is not, at zero."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))

        def forward(self):
            return self.good.square().sum() + (self.bad.abs() ** 1.5).sum()

    with pytest.raises(
        ValueError, match=r"block 'bad' holds NaN or infinite values; check the checkpoint"
    ):
        estimate(
            Model(), [torch.zeros(1)], lambda model, batch: (model(), 1), num_probes=1, num_steps=2
        )


def test_data_that_is_not_finite_in_a_later_batch_names_a_block():
    batches = pairs(2)
    batches[1][0][:] = float("nan")
    with pytest.raises(ValueError, match=r"(block 'weight' holds NaN|the loss is nan)"):
        estimate(batches=batches, num_probes=1, num_steps=2)


# Settings.


@pytest.mark.parametrize("name", ["num_probes", "num_steps"])
@pytest.mark.parametrize("value", [0, -3])
def test_too_few_probes_or_steps(name, value):
    with pytest.raises(ValueError, match=rf"{name} is a whole number >= 1.*, got {value}"):
        estimate(**{name: value})


@pytest.mark.parametrize("name", ["num_probes", "num_steps"])
@pytest.mark.parametrize("value", [2.5, "many", None])
def test_probes_or_steps_that_are_no_whole_number(name, value):
    with pytest.raises(TypeError, match=rf"{name} is a whole number >= 1.*, got {value!r}"):
        estimate(**{name: value})


def test_numpy_integers_are_whole_numbers():
    assert estimate(num_probes=np.int64(1), num_steps=np.int32(2))["weight"].num_probes == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"curvature": "Hessian"},
            r"curvature is one of \('hessian', 'ggn', 'fisher'.*\), got 'Hessian'",
        ),
        (
            {"distribution": "normal"},
            r"distribution is one of \('gaussian', 'rademacher'\), got 'normal'",
        ),
    ],
)
def test_unknown_words(settings, message):
    with pytest.raises(ValueError, match=message):
        estimate(num_probes=1, num_steps=2, **settings)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_curvatures_that_need_to_know_the_outputs(curvature):
    def loss(model, batch):
        return losses.classification(model, batch)

    with pytest.raises(
        ValueError, match=rf"curvature '{curvature}' needs a loss that is split.*losses\.Loss"
    ):
        estimate(loss=loss, curvature=curvature)


def test_more_steps_than_parameters_is_no_mistake():
    spectra = estimate(num_steps=1000, num_probes=1)
    assert all(spectrum.exact for spectrum in spectra.values())


# Before the expensive part.


@pytest.mark.parametrize(
    "mistake",
    [
        {"num_probes": 0},
        {"num_steps": 0},
        {"distribution": "x"},
        {"curvature": "x"},
        {"blocks": ()},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_wrong_setting_costs_no_pass_over_the_data(mistake):
    model, calls = linear(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError):  # noqa: PT011
        estimate(model, **mistake)
    assert not calls


def test_a_frozen_part_is_fine():
    it = gpt2()
    it.model.transformer.wte.requires_grad_(False)
    blocks = partition(it.model, include="*ln_f*")
    assert len(estimate_spectra(it.objective(), blocks, num_probes=1, num_steps=2)) == 2


@pytest.mark.slow
def test_too_little_memory_says_what_would_fit():
    objective = objective_of({"a": matrix_of(decaying(2000))})
    blocks = partition(objective.model)
    with (
        pytest.warns(UserWarning, match="not a layer at a time: the model has no container"),
        pytest.raises(
            ValueError, match=r"memory of 1 MiB is too little: .* are in use, .* would fit"
        ) as error,
    ):
        estimate_spectra(objective, blocks, num_probes=2, num_steps=100, memory="1MiB")
    remedy = str(error.value)
    assert "reorthogonalize=False" in remedy


def test_memory_that_is_no_size():
    objective = nanogpt().objective()
    for wrong in ("much", "-3GiB"):
        with pytest.raises(
            ValueError,
            match=r"memory is a number of bytes, a share of the device .* got '(much|-3GiB)'",
        ):
            estimate_spectra(objective, partition(objective.model)[:1], 1, 2, memory=wrong)
    with pytest.raises(ValueError, match="memory must be positive, got 0"):
        estimate_spectra(objective, partition(objective.model)[:1], 1, 2, memory=0)


def test_an_error_leaves_the_model_as_it_was():
    model = copy.deepcopy(problem("gpt2").model).train()
    with pytest.raises(ValueError, match="need labels"):
        estimate(model, [{"input_ids": tokens(2, 6), "labels": tokens(2, 5)}], losses.next_token)
    assert all(module.training for module in model.modules())


def test_a_norm_of_zero_is_suspected_where_the_gradient_is_finite():
    loss = lambda model, batch: ((model(batch[0]) * 0).norm(), 1)  # noqa: E731
    with pytest.raises(ValueError, match=r"NaN.*norm of exactly 0 has no second derivative"):
        estimate(loss=loss)


TYPES = {
    "model": (lambda o, b: estimate_spectra(o.model, b, 1, 2), r"objective is a .*got.*Linear"),
    "names": (
        lambda o, b: estimate_spectra(o, ["weight"], 1, 2),
        r"got 'weight': partition\(model",
    ),
    "a name": (lambda o, b: blockspec.trace(o, "weight"), r"got 'weight': partition\(model"),
    "blocks": (lambda o, b: blockspec.dense(o, b), r"block is one Block, got.*type Blocks"),
    "k": (lambda o, b: blockspec.top_eigenpairs(o, b[0], 1.5), r"k is a whole number, got 1\.5"),
    "seed": (lambda o, b: blockspec.trace(o, b, seed=0.5), r"seed is a whole number, got 0\.5"),
    "points": (lambda o, b: blockspec.landscape(o, b[0], points=2.5), r"points is a whole number"),
    "direction": (
        lambda o, b: blockspec.directional(o, b, o.model),
        r"is a mapping, parameter name",
    ),
}


@pytest.mark.parametrize(("call", "message"), TYPES.values(), ids=TYPES)
def test_things_of_another_kind_are_named(call, message):
    objective = Objective(linear(), pairs(), losses.classification)
    with pytest.raises(TypeError, match=message):
        call(objective, partition(objective.model))


VALUES = {
    "max_products": (
        lambda o, b: blockspec.top_eigenpairs(o, b[0], max_products=0),
        r"max_products is at least 1, got 0",
    ),
    "radius": (
        lambda o, b: blockspec.landscape(o, b[0], radius=float("nan")),
        r"radius is a positive number.*got nan",
    ),
    "direction": (
        lambda o, b: blockspec.directional(o, b, {"bias": torch.full((2,), torch.nan).double()}),
        r"direction of 'bias' holds NaN",
    ),
    "micro_batch": (
        lambda o, b: Objective(o.model, pairs(), o.loss, micro_batch=1.5),
        r"micro_batch is a whole number",
    ),
    "by": (lambda o, b: partition(o.model, ["matrix"]), r"by=\['matrix'\] is not one of"),
}


@pytest.mark.parametrize(("call", "message"), VALUES.values(), ids=VALUES)
def test_values_that_mean_nothing_are_named(call, message):
    objective = Objective(linear(), pairs(), losses.classification)
    with pytest.raises(ValueError, match=message):
        call(objective, partition(objective.model))


def test_a_state_that_is_no_folder_is_refused_before_the_sweeps(tmp_path):
    """A short estimate would save none, and a long one its first after hours."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"state is a folder.*file.*is no folder"):
            estimate(state=folder)
    assert len(estimate(state=tmp_path / "new" / "below")) == 2
    assert not (tmp_path / "new").exists()
