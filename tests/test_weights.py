"""Weights that stay where they are, in another type or in files, while a layer at a time computes."""

import copy
import weakref

import pytest
import torch
from accelerate import init_empty_weights
from models import tiny_gpt2
from safetensors import safe_open
from safetensors.torch import save_file
from test_cli import TINY, invoke, run_arguments, save_tokenizer
from test_layerwise import Block, Net, assert_same, classified, requests_of, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import blockspec
from blockspec import load_spectra, losses
from blockspec.engine.estimate import plan_spectra
from blockspec.model.differentiability import check_twice_differentiable
from blockspec.model.identity import differences, identity_of
from blockspec.model.weights import map_weights
from blockspec.numerics import memory
from blockspec.products.curvature import Products

BATCH = {"input_ids": tokens()}


def low(layers=3, **settings):
    return tiny_gpt2(dtype=torch.bfloat16, layers=layers, **settings)


def truth_of(model, requests, curvature="hessian"):
    objective = blockspec.Objective(copy.deepcopy(model).double(), [BATCH], losses.next_token)
    return Products(objective, curvature, guarded=False, products="whole").sweep(requests)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_products_are_those_of_the_converted_model(curvature, tied):
    model = low(tie_word_embeddings=tied)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    requests = requests_of(objective)
    operator = Products(objective, curvature, guarded=False)
    found = operator.sweep(requests)
    assert_same(found, truth_of(model, requests, curvature))
    assert_same(operator.sweep(requests), found)
    assert operator.way.layerwise
    for name, p in model.named_parameters():
        assert (id(p), p.dtype) == (before[name][0], torch.bfloat16)
        assert torch.equal(p, before[name][1])


@pytest.fixture
def brought(monkeypatch):
    """Calls a function, and gives the most entries of parameters made by it that lived at once."""

    def most_of(function):
        living, most = {}, [0]
        original = nn.Parameter.__new__

        def counted(cls, data=None, requires_grad=True):
            parameter = original(cls, data, requires_grad)
            number = len(most)
            living[number] = parameter.numel()
            weakref.finalize(parameter, living.pop, number)
            most.append(sum(living.values()))
            return parameter

        with monkeypatch.context() as patch:
            patch.setattr(nn.Parameter, "__new__", counted)
            function()
        return max(most)

    return most_of


def test_no_more_than_one_layer_is_brought_at_a_time(brought):
    model = low(layers=4)
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    requests = requests_of(objective, include="*mlp.c_fc.weight")
    most = brought(lambda: Products(objective, guarded=False).sweep(requests))
    layer = sum(p.numel() for p in model.transformer.h[0].parameters())
    around = sum(p.numel() for p in model.parameters()) - 4 * layer
    # Two copies of a layer: in the first pass each is called twice, and compared.
    assert around + layer <= most <= around + 2 * layer


LOOKS = {
    "value": lambda objective: objective.value(),
    "check": lambda objective: objective.check(),
    "differentiability": lambda objective: check_twice_differentiable(
        objective, objective.parameters()
    ),
    "identity": lambda objective: identity_of(objective, [], {}),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_asked_before_and_beside_products_brings_one_layer_at_a_time(brought, look):
    model = low(layers=5)
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    layer = sum(p.numel() for p in model.transformer.h[0].parameters())
    around = sum(p.numel() for p in model.parameters()) - 5 * layer
    most = brought(lambda: LOOKS[look](objective))
    assert around + layer <= most <= around + 2 * layer


class Silent(torch.autograd.Function):
    """Its backward pass loses the graph."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.detach()


def with_silent(layer, index):
    original = layer.forward
    layer.forward = lambda *args, **named: Silent.apply(original(*args, **named))
    return index


@pytest.mark.parametrize("index", [0, 2])
def test_functions_without_a_second_derivative_are_found_in_a_layer(index):
    model = low()
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    check_twice_differentiable(objective, objective.parameters())
    with_silent(model.transformer.h[index], index)
    with pytest.raises(ValueError, match="Silent has no second derivative"):
        check_twice_differentiable(objective, objective.parameters())
    with pytest.raises(ValueError, match="Silent has no second derivative"):
        check_twice_differentiable(objective, ["transformer.h.0.ln_1.weight"])
    head = ["transformer.ln_f.weight"]  # no direction from there leads through a layer
    check_twice_differentiable(objective, head)


def test_an_identity_notices_another_function():
    found = []
    for change in (
        lambda m: m,
        lambda m: m,
        lambda m: setattr(m.transformer.h[0].mlp, "act", nn.SiLU()),
    ):
        model = low()
        change(model)
        objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
        found.append(identity_of(objective, [], {}))
    assert not differences(found[0], found[1])
    assert min(found[0]["objective"][name] for name in ("gradient", "product")) > 0
    assert differences(found[0], found[2])
    for name in ("gradient", "product"):
        assert found[0]["objective"][name] != pytest.approx(found[2]["objective"][name], rel=1e-5)


@pytest.mark.slow
def test_a_plan_is_made_a_layer_at_a_time(brought):
    model = low(layers=5)
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    blocks = blockspec.partition(model, include="*h.2.mlp.c_fc.weight")
    settings = {"num_probes": 1, "num_steps": 2, "check": False}
    most = brought(lambda: plan_spectra(objective, blocks, **settings))
    layer = sum(p.numel() for p in model.transformer.h[0].parameters())
    assert most <= sum(p.numel() for p in model.parameters()) - 3 * layer


def test_the_value_and_an_estimate_need_no_whole_model():
    model = low()
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    plain = blockspec.Objective(copy.deepcopy(model).double(), [BATCH], losses.next_token)
    assert objective.value() == pytest.approx(plain.value(), rel=1e-12)
    blocks = blockspec.partition(model, include="*h.1*/value")
    settings = {"num_probes": 1, "num_steps": 4}
    found = blockspec.estimate_spectra(objective, blocks, **settings)
    truth = blockspec.estimate_spectra(plain, blocks, **settings)
    for name, spectrum in truth.items():
        assert found[name].nodes == pytest.approx(spectrum.nodes, rel=1e-8)


def test_what_needs_the_weights_themselves_is_refused():
    """The graph holds copies: a gradient by the weights would be all zeros."""
    model = low()
    objective = blockspec.Objective(model, [BATCH], losses.next_token, dtype=torch.float64)
    with pytest.raises(ValueError, match="weights stay elsewhere"):
        objective.gradient()
    with pytest.raises(ValueError, match="weights stay elsewhere"):
        blockspec.directional(objective, blockspec.partition(model), {})


def test_weights_on_disk_are_mapped_and_not_read(tmp_path):
    model = low()
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    with init_empty_weights(include_buffers=False):
        empty = tiny_gpt2(dtype=torch.bfloat16, layers=3)
    mapped = map_weights(empty, tmp_path)
    objective = blockspec.Objective(mapped, [BATCH], losses.next_token, dtype=torch.float64)
    requests = requests_of(objective, include="*h.2*c_proj.weight")
    assert_same(Products(objective, guarded=False).sweep(requests), truth_of(model, requests))


def test_mapped_files_do_not_stay_in_the_resident_set(tmp_path):
    """Their pages are let go; what somebody has written to them is not."""
    size = 2**24
    save_file({"a": torch.arange(size // 4, dtype=torch.float32)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        tensor = file.get_tensor("a")
    ordinary = torch.arange(size // 4, dtype=torch.float32)
    total = tensor.double().sum()
    before = memory.resident()
    memory.let_go(tensor.data_ptr(), tensor.nbytes)
    memory.let_go(ordinary.data_ptr(), ordinary.nbytes)
    assert before - memory.resident() > 0.9 * size
    assert tensor.double().sum() == total == ordinary.double().sum()
    tensor[size // 8] = -1
    before = memory.resident()
    memory.let_go(tensor.data_ptr(), tensor.nbytes)
    assert abs(memory.resident() - before) < size / 10
    assert tensor[size // 8] == -1


def test_files_that_lack_a_parameter_are_refused(tmp_path):
    model = low()
    with pytest.raises(ValueError, match=r"are read from safetensors files; .* has none"):
        map_weights(model, tmp_path)
    some = {n: p.detach() for n, p in model.named_parameters() if "ln_f" not in n}
    save_file(some, tmp_path / "model.safetensors")
    with init_empty_weights(include_buffers=False):
        empty = tiny_gpt2(dtype=torch.bfloat16, layers=3)
    with pytest.raises(ValueError, match=r"have no 'transformer.ln_f.weight' \(2 parameters"):
        map_weights(empty, tmp_path)


def test_a_model_that_cannot_be_cut_is_refused():
    model = classified(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))).model
    batch = (torch.randn(5, 6), torch.arange(5) % 3)
    objective = blockspec.Objective(model, [batch], losses.classification, dtype=torch.float32)
    with pytest.raises(ValueError, match="weights that stay elsewhere need products a layer"):
        Products(objective, guarded=False).sweep(requests_of(objective, "tensor"))


def test_the_model_is_as_it_was_when_a_layer_fails():
    model = Net(Block).to(torch.bfloat16)
    batch = (torch.randn(5, 6), torch.arange(5) % 3)
    objective = blockspec.Objective(model, [batch], losses.classification, dtype=torch.float64)
    before = {path: dict(module._parameters) for path, module in model.named_modules()}
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("on the way")

    model.blocks[1].inner.register_forward_hook(failing)
    with pytest.raises(KeyError, match="on the way"):
        Products(objective, guarded=False).sweep(requests_of(objective, "tensor"))
    after = {path: dict(module._parameters) for path, module in model.named_modules()}
    assert all(p is after[path][n] for path, own in before.items() for n, p in own.items())


@pytest.mark.slow
def test_a_run_computes_with_weights_on_disk(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    special = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>"}
    save_tokenizer(tmp_path / "model", special)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 10)
    given = ["--model_args.text", str(tmp_path / "text.txt"), "--model_args.num_batches", "1"]
    found = []
    for where in ([], ["--weights_device", "cpu"], ["--weights_device", "disk"]):
        out = tmp_path / f"run{len(found)}"
        arguments = [a.replace(TINY, str(tmp_path / "model")) for a in run_arguments(out)]
        arguments[arguments.index("--blocks.include") + 1] = '["*.1.*o_proj.weight"]'
        result = invoke(*arguments, *given, "--blocks.full", "false", *where)
        assert result.code == 0, result.err
        found.append(next(iter(load_spectra(out / "spectra.parquet").values())).nodes)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
