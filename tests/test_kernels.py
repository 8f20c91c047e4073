"""Attention that can be differentiated twice, whatever the model came with, and everything as it
was afterwards.
"""

import copy
import warnings
from contextlib import nullcontext, suppress
from threading import Event, Thread

import dense_truth
import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from problems import Problem, bert, causal, gpt2, llama, nanogpt, roughened, timm_vit, tokens, vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as attend  # as some models import it
from transformers.models.gemma2 import modeling_gemma2 as gemma2_code

from blockspec import Objective, dense, estimate_spectra, losses, partition
from blockspec.engine.estimate import plan_spectra
from blockspec.model import implementations, kernels, lengths, torch_parts
from blockspec.model.attention import attention
from blockspec.model.kernels import paused, resumed, twice_differentiable
from blockspec.products.curvature import Products

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


def test_functions_are_watched_while_a_forward_pass_is_made_and_not_between():
    """A pause may lie within another one, and an error leaves all as it was."""
    it = nanogpt()
    with twice_differentiable(it.model):
        mode = torch_parts.function_mode()
        assert mode is not None
        with suppress(KeyError), paused(), paused():
            assert torch_parts.function_mode() is None
            with resumed(), resumed():
                assert torch_parts.function_mode() is mode
                with paused():
                    assert torch_parts.function_mode() is None
                assert torch_parts.function_mode() is mode
            assert torch_parts.function_mode() is None
            raise KeyError
        assert torch_parts.function_mode() is mode
        with resumed():
            assert torch_parts.function_mode() is mode
    with paused(), resumed():
        assert torch_parts.function_mode() is None
    products = Products(it.objective())
    whole = partition(it.model, "model")[0]
    vector = torch.ones(whole.numel).double()
    (expected,) = products.sweep([(whole, vector)])
    products.forget()
    with products.opened():
        assert torch_parts.function_mode() is None
        (found,) = products.sweep([(whole, vector)])
        assert torch_parts.function_mode() is None
    torch.testing.assert_close(found, expected)


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


@pytest.mark.slow
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
def test_implementations_are_restored_and_no_flag_of_the_process_is_touched(fails):
    model = models.tiny_gpt2()
    part = copy.deepcopy(model.config)
    part._attn_implementation = "flex_attention"
    model.transformer.h[1].config = part  # a part with a config of its own
    model.config._attn_implementation = "flash_attention_2"
    before = enabled()
    try:
        with twice_differentiable(model):
            assert enabled() == before
            assert model.config._attn_implementation == part._attn_implementation == "sdpa"
            if fails:
                raise KeyError("on the way")
    except KeyError:
        assert fails
    assert (model.config._attn_implementation, part._attn_implementation) == (
        "flash_attention_2",
        "flex_attention",
    )


def test_two_threads_leave_everything_as_it_was():
    """Their models share a config; the first to enter is the first to leave."""
    first, second = models.tiny_gpt2(), models.tiny_gpt2()
    first.config._attn_implementation = "flex_attention"
    for module in second.modules():
        if getattr(module, "config", None) is second.config:
            module.config = first.config
    second.config = first.config
    before = enabled()
    entered, left = Event(), Event()
    found = []

    def early():
        with twice_differentiable(first):
            entered.set()
            both.wait(60)
        left.set()

    def late():
        entered.wait(60)
        with twice_differentiable(second):
            both.set()
            left.wait(60)
            found.append(second.config._attn_implementation)
            found.append(second_derivative(second, {"input_ids": tokens(1, 5)}))

    both = Event()
    threads = [Thread(target=early), Thread(target=late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == "sdpa"
    assert all(torch.isfinite(g).all() for g in found[1])
    assert first.config._attn_implementation == "flex_attention"
    assert enabled() == before


class OwnContext(torch.nn.Module):
    """Attention within a context of its own, as torchtitan, x-transformers and vit-pytorch have
    it.
    """

    def __init__(self, own):
        super().__init__()
        self.own = own
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.qkv = torch.nn.Linear(4, 12, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind()
        with self.own():
            return attend(q, k, v, is_causal=True).flatten(1).square()


@pytest.mark.parametrize(
    "own",
    [
        lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
        lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]),
        lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True),
    ],
    ids=["flash", "no kernel for a CPU", "priorities"],
)
@pytest.mark.parametrize("tokens_from", [1, 10**6], ids=["strips", "matrices"])
def test_models_that_open_a_context_of_their_own(monkeypatch, own, tokens_from):
    monkeypatch.setitem(lengths.LONG, "cpu", (tokens_from, tokens_from))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    batch = (x, torch.tensor([1, 7]))
    model = OwnContext(own)
    objective = Objective(model, [batch], losses.classification)
    found = dense(objective, *partition(model, by="model"))
    plain = OwnContext(lambda: sdpa_kernel(SDPBackend.MATH))
    truth = dense_truth.dense_hessian(
        plain, [batch], lambda call, b: F.cross_entropy(call(b[0]), b[1], reduction="none")
    )
    torch.testing.assert_close(torch.as_tensor(found), truth, rtol=1e-9, atol=1e-12)


def test_two_threads_that_estimate_at_once_find_what_one_finds():
    problems = [gpt2(), llama()]

    def estimate(it):
        blocks = partition(it.model, include="*attn*weight*")
        found = estimate_spectra(it.objective(), blocks, num_probes=1, num_steps=2)
        return [spectrum.nodes for spectrum in found.values()]

    expected, before = [estimate(it) for it in problems], enabled()
    found = [[], []]

    def work(place):
        for _ in range(3):
            found[place].append(estimate(problems[place]))

    threads = [Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for nodes, estimates in zip(expected, found, strict=True):
        assert len(estimates) == 3
        assert all(
            np.array_equal(a, b) for other in estimates for a, b in zip(nodes, other, strict=True)
        )
    assert enabled() == before


def test_compiled_models_call_past_python():
    plain = OwnContext(nullcontext)
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, before = torch.jit.trace(plain, (x,)), enabled()

    def product(module):
        with twice_differentiable(module):
            weight = dict(module.named_parameters())["qkv.weight"]
            (g,) = torch.autograd.grad(module(x).sum(), weight, create_graph=True)
            return torch.autograd.grad(g.square().sum(), weight)[0]

    torch.testing.assert_close(product(model), product(plain))
    assert enabled() == before


def test_caches_of_keys_and_values_are_off():
    model = models.tiny_llama()
    batch = {"input_ids": tokens(1, 5)}
    assert model(**batch).past_key_values is not None
    with twice_differentiable(model):
        assert model(**batch).past_key_values is None
    assert model(**batch).past_key_values is not None


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
    """Anything that calls scaled_dot_product_attention works, with a mask and with grouped
    heads.
    """

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


def padded_bert():
    it = bert()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batches = [batch | {"attention_mask": mask} for batch in it.batches]
    inputs = ("input_ids", "attention_mask")

    def logits(call, batch):
        return call(**{name: batch[name] for name in inputs}).logits[batch["labels"] != -100]

    return Problem(it.model, batches, it.loss, logits, it.labels)


def of_windows(config, model, **settings):
    """Layers in turns with a window of 3 tokens and without; 4 query heads share 2 key heads."""
    small = {
        "vocab_size": 12,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config(**small | settings)).double()
    return causal(roughened(made))


def gemma2():
    return of_windows(
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        attn_logit_softcapping=0.5,
        attn_implementation="eager",  # before transformers 5.23, sdpa, without soft caps, is meant
    )


def gemma3():
    return of_windows(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)


def gpt_oss():
    it = of_windows(
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        num_local_experts=2,
        num_experts_per_tok=2,
    )
    it.model.set_experts_implementation("eager")
    return it


MODELS = {  # and what float32 inside of the model leaves of float64
    gpt2: 1e-10,
    nanogpt: 1e-10,
    llama: 1e-10,
    vit: 1e-10,
    timm_vit: 1e-10,
    padded_bert: 1e-10,
    gemma2: 1e-5,
    gemma3: 1e-5,
    gpt_oss: 1e-5,
}


@pytest.mark.parametrize("make", MODELS)
def test_products_without_matrices_are_those_with_matrices_and_those_of_differences(
    monkeypatch, make
):
    calls = []

    def counted(*given, **settings):
        calls.append(settings)
        return attention(*given, **settings)

    monkeypatch.setattr(kernels, "attention", counted)
    monkeypatch.setattr(implementations, "attention", counted)
    it = make()
    (block,) = partition(it.model, by="model")
    vector = torch.randn(
        block.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def product(tokens_from):
        monkeypatch.setitem(lengths.LONG, "cpu", (tokens_from, tokens_from))
        return Products(it.objective()).sweep([(block, vector)])[0]

    with_matrices = product(10**6)
    assert not calls
    without = product(1)
    assert calls
    size = float(with_matrices.abs().max())
    torch.testing.assert_close(without, with_matrices, rtol=0, atol=MODELS[make] * size)
    if MODELS[make] < 1e-6:
        truth = dense_truth.finite_difference_product(it.model, it.batches, it.terms, vector)
        torch.testing.assert_close(without, truth, rtol=0, atol=1e-6 * size)


def test_sinks_and_soft_caps_reach_the_function(monkeypatch):
    """Through Hugging Face's registry, with boolean masks or none."""
    monkeypatch.setitem(lengths.LONG, "cpu", (1, 1))
    found = []

    def watched(q, k, v, **settings):
        found.append(settings)
        return attention(q, k, v, **settings)

    monkeypatch.setattr(implementations, "attention", watched)
    for make, name in ((gemma2, "softcap"), (gpt_oss, "sinks")):
        it = make()
        found.clear()
        with twice_differentiable(it.model):
            it.model(input_ids=tokens(1, 6))
        window, full = found[1::2]  # each is compared on the first tokens before
        assert window[name] is not None
        assert full[name] is not None
        assert window["mask"].dtype is torch.bool
        assert full["mask"] is None
        assert full["causal"]
        assert it.model.config._attn_implementation == "eager"


def test_a_model_that_computes_something_else_keeps_its_own_function(monkeypatch):
    """What an eager function does beyond its settings cannot be known: it is compared on the first
    tokens.
    """
    it = gemma2()
    with torch.no_grad():
        plain = it.model(input_ids=tokens(1, 6)).logits
    original = gemma2_code.eager_attention_forward

    def other(module, query, *given, **settings):
        return original(module, query * 2, *given, **settings)

    monkeypatch.setattr(gemma2_code, "eager_attention_forward", other)
    monkeypatch.setitem(lengths.LONG, "cpu", (1, 1))
    lengths.say_once.cache_clear()
    with torch.no_grad():
        changed = it.model(input_ids=tokens(1, 6)).logits
        with (
            pytest.warns(UserWarning, match="Gemma2Attention.*grows with the square"),
            twice_differentiable(it.model),
        ):
            found = it.model(input_ids=tokens(1, 6)).logits
    torch.testing.assert_close(found, changed, rtol=1e-6, atol=1e-6)
    assert (changed - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"dropout_p": 0.5}, "dropout"),
        ({"attn_mask": torch.zeros(4, 4, requires_grad=True)}, "a mask that requires gradients"),
    ],
    ids=["dropout", "mask"],
)
def test_what_cannot_be_done_without_matrices_is_done_with_them_and_said_once(
    monkeypatch, how, reason
):
    monkeypatch.setitem(lengths.LONG, "cpu", (1, 1))
    lengths.say_once.cache_clear()
    q = torch.randn(1, 2, 4, 3, requires_grad=True)
    with warnings.catch_warnings(record=True) as said, twice_differentiable(torch.nn.Identity()):
        warnings.simplefilter("always")
        for _ in range(2):
            gradient = torch.autograd.grad(attend(q, q, q, **how).sum(), q, create_graph=True)[0]
            assert torch.autograd.grad(gradient.square().sum(), q)[0].isfinite().all()
    assert [reason in str(w.message) for w in said] == [True]


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (2, 2, 4, 3), (2, 1, 2, 4, 3)], ids=len)
@pytest.mark.parametrize("mask", [None, "boolean", "additive", "lower right"])
def test_every_number_of_dimensions_and_every_mask_is_what_pytorch_computes(
    monkeypatch, shape, mask
):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    scores = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    masks = {"boolean": scores > 0, "additive": scores, "lower right": causal_lower_right(4, 4)}
    given = {"attn_mask": masks.get(mask), "is_causal": mask is None, "scale": 0.4}
    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.grad(attend(q, k, v, **given).square().sum(), (q, k, v))
    for tokens_from in (1, 10**6):
        monkeypatch.setitem(lengths.LONG, "cpu", (tokens_from, tokens_from))
        with twice_differentiable(torch.nn.Identity()):
            out = attend(q, k, v, **given)
        for mine, other in zip(
            torch.autograd.grad(out.square().sum(), (q, k, v)), truth, strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens_from", [1, 10**6], ids=["strips", "matrices"])
def test_under_autocast_inputs_are_cast_as_pytorch_casts_them(monkeypatch, tokens_from):
    monkeypatch.setitem(lengths.LONG, "cpu", (tokens_from, tokens_from))
    q = torch.randn(1, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        truth = attend(q, q, q)
        with twice_differentiable(torch.nn.Identity()):
            found = attend(q, q, q)
    assert found.dtype is truth.dtype is torch.bfloat16
    torch.testing.assert_close(found, truth, rtol=2e-2, atol=2e-2)


def test_the_choice_is_by_length():
    cpu = torch.device("cpu")
    if_causal, if_not = lengths.LONG["cpu"]
    assert lengths.is_long(if_causal, if_causal, cpu, causal=True)
    assert not lengths.is_long(if_causal, if_causal - 1, cpu, causal=True)
    assert not lengths.is_long(if_causal, if_causal, cpu, causal=False)
    assert lengths.is_long(if_not, if_not, cpu, causal=False)


@pytest.mark.slow
def test_the_plan_knows_memory_and_operations(monkeypatch):
    """Matrices are (4, 600, 600) float64, 11 MiB each, and several; strips leave out what is above
    the diagonal.
    """
    model = models.tiny_gpt2(n_positions=600, layers=1)
    batches = [{"input_ids": tokens(1, 600)}]
    objective = Objective(model, batches, losses.next_token)
    (block,) = partition(model, include="*c_attn.weight/query")
    plans = {}
    for tokens_from in (512, 10**6):
        monkeypatch.setitem(lengths.LONG, "cpu", (tokens_from, tokens_from))
        plans[tokens_from] = plan_spectra(objective, block, num_probes=1, num_steps=2)
    assert plans[10**6].peak - plans[512].peak > 30 * 2**20
    ours, theirs = (plans[tokens_from].table["flops"].iloc[0] for tokens_from in (512, 10**6))
    assert 0.4 * theirs < ours < theirs
