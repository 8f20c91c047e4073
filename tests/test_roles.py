"""Roles found by watching one forward pass, against truth written by hand, and against what moves
at the kernel.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import zoo
from models import nanogpt, tiny_bert, tiny_gpt2, tiny_llama
from styles import STYLES, VOCABULARY, build
from torch import nn

from blockspec.model.blocks import gather, partition, scatter
from blockspec.model.losses import next_token
from blockspec.model.objective import Objective
from blockspec.model.roles import watch_example

PARTS = ("query", "key", "value")
LLAMA = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention_output",
    "embed_tokens": "embedding",
}
GATED = {"mlp.gate_proj": "mlp_gate", "mlp.up_proj": "mlp_in", "mlp.down_proj": "mlp_out"}
EXPERTS = {"experts.gate_up_proj": "mlp_in", "experts.down_proj": "mlp_out"}
BERT = {
    "self.query": "query",
    "self.key": "key",
    "self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "mlp_in",
    "layer.#.output.dense": "mlp_out",
}
BART = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "attention_output",
    "fc1": "mlp_in",
    "fc2": "mlp_out",
}
CROSS = {f"encoder_attn.{n.partition('.')[2]}": k for n, k in BART.items() if "self_attn" in n}
T5 = {
    "SelfAttention.q": "query",
    "SelfAttention.k": "key",
    "EncDecAttention.v": "value",
    "EncDecAttention.o": "attention_output",
    "DenseReluDense.wi": "mlp_in",
    "DenseReluDense.wo": "mlp_out",
}
SPEECH = {
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
    "attention.out_proj": "attention_output",
    "intermediate_dense": "mlp_in",
    "output_dense": "mlp_out",
}
NEOX = {
    "query_key_value": "qkv",
    "dense": "attention_output",
    "dense_h_to_4h": "mlp_in",
    "dense_4h_to_h": "mlp_out",
}
TRUTH: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        [
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "smollm3",
            "olmo2",
            "granite",
            "cohere",
            "helium",
        ],
        LLAMA | GATED,
    ),
    "starcoder2": LLAMA | {"mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out"},
    "arcee": LLAMA | {"mlp.up_proj": "mlp_in", "mlp.down_proj": "mlp_out"},
    "phi3": {"qkv_proj": "qkv", "o_proj": "attention_output", "mlp.down_proj": "mlp_out"},
    "phi": {"self_attn.dense": "attention_output", "mlp.fc1": "mlp_in", "mlp.fc2": "mlp_out"},
    "gptj": {"mlp.fc_in": "mlp_in", "mlp.fc_out": "mlp_out", "attn.out_proj": "attention_output"},
    "gpt2": {"c_attn": "qkv", "attn.c_proj": "attention_output", "mlp.c_proj": "mlp_out"},
    "gpt_bigcode": {"c_attn": "qkv", "attn.c_proj": "attention_output", "mlp.c_fc": "mlp_in"},
    "codegen": {"qkv_proj": "qkv", "attn.out_proj": "attention_output", "mlp.fc_in": "mlp_in"},
    "gpt_neox": NEOX,
    "bloom": NEOX,
    "mpt": {"Wqkv": "qkv", "attn.out_proj": "attention_output", "down_proj": "mlp_out"},
    "opt": BART,
    "xlm": {"q_lin": "query", "out_lin": "attention_output", "lin1": "mlp_in", "lin2": "mlp_out"},
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "albert": {
        "attention.query": "query",
        "attention.dense": "attention_output",
        "albert_layers.#.ffn": "mlp_in",
        "ffn_output": "mlp_out",
    },
    "mpnet": {"attn.q": "query", "attn.k": "key", "attn.v": "value", "attn.o": "attention_output"},
    "deberta": {"in_proj": "qkv", "attention.output.dense": "attention_output"},
    "modernbert": {"attn.Wqkv": "qkv", "attn.Wo": "attention_output", "mlp.Wo": "mlp_out"},
    "squeezebert": {"attention.query": "query", "post_attention.conv#d": "attention_output"},
    "bart": BART,
    "m2m_100": BART | CROSS,
    "fsmt": BART | CROSS,
    "t5": T5,
    "mt5": {n: k for n, k in T5.items() if n != "DenseReluDense.wi"}
    | {"DenseReluDense.wi_#": None},
    "whisper": BART,
    "wav2vec2": SPEECH,
    "hubert": SPEECH,
    "vit": {"q_proj": "query", "o_proj": "attention_output", "fc1": "mlp_in", "fc2": "mlp_out"},
    "mixtral": LLAMA | EXPERTS | {"mlp.gate": "router"},
    "gpt_oss": LLAMA | EXPERTS | {"mlp.router": "router"},
    "qwen3_next": LLAMA | EXPERTS | {"mlp.gate": "router"},
    "deepseek_v3": {
        "q_a_proj": "query",
        "q_b_proj": "query",
        "kv_b_proj": "qkv",
        "o_proj": "attention_output",
    },
}
"""Model type -> ending of a parameter's module -> what it is."""


def seen_kinds(model, name):
    """Ending -> the kinds that watching alone gives its parameters."""
    found = {}
    for parameter, seen in watch_example(model, zoo.inputs(model)).items():
        path = re.sub(r"\d+", "#", parameter.removesuffix(".weight"))
        for ending in TRUTH[name]:
            if path.endswith("." + re.sub(r"\d+", "#", ending)) and parameter.endswith(
                (ending + ".weight", ending) if "#" not in ending else ("",)
            ):
                found.setdefault(ending, set()).add(seen.kind)
    return found


@pytest.mark.parametrize("name", TRUTH)
def test_roles_by_watching(name):
    wanted = {ending: {kind} for ending, kind in TRUTH[name].items() if kind}
    found = seen_kinds(zoo.build(name), name)
    assert {ending: found.get(ending) for ending in wanted} == wanted


def test_forty_architectures_have_a_truth():
    assert len(TRUTH) >= 40


@pytest.mark.slow
def test_little_is_other_in_120_architectures():
    """Those that build and run here in a fraction of a second."""
    names = [name for table in zoo.TABLES for name in table]
    names = [name for name in dict.fromkeys(names) if name not in zoo.LARGE]
    total = other = watched = 0
    for name in names:
        if watched == 150:  # the others are kept aside
            break
        try:
            model = zoo.build(name)
            small = sum(p.numel() for p in model.parameters()) < 1_000_000
            batch = zoo.inputs(model)
            if small:
                model(**batch)
        except Exception:  # a config that small numbers do not fit, a library that is not here
            continue
        if not small:
            continue
        blocks = partition(model, by="head", example=batch)
        watched += 1
        total += sum(block.numel for block in blocks)
        other += sum(block.numel for block in blocks if block.kind == "other")
    assert watched >= 120
    assert other <= 0.02 * total


# Cuts: what moves at the kernel.


def kernel_inputs(model, batch, monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention

    def recorded(query, key, value, *args, **kwargs):
        calls.append((query.detach(), key.detach(), value.detach()))
        return kernel(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        model(**batch)
    return calls


def check_cuts(model, batch, monkeypatch):
    """Every head of query and key moves itself alone at the kernel, and a value block no query or
    key.
    """
    parameters = dict(model.named_parameters())
    before = kernel_inputs(model, batch, monkeypatch)
    kinds = set()
    blocks = [b for b in partition(model, by="head", example=batch) if b.kind in PARTS]
    first = min(b.layer for b in blocks)  # a layer before may have a recurrence
    for block in [b for b in blocks if b.layer == first]:
        step = scatter(block, torch.rand(block.numel).double() + 0.5, parameters)
        with torch.no_grad():
            for name, change in step.items():
                parameters[name] += change
            after = kernel_inputs(model, batch, monkeypatch)
            for name, change in step.items():
                parameters[name] -= change
        moved = [
            {h for h in range(old.shape[1]) if (new - old)[:, h].abs().max() > 1e-9}
            for old, new in zip(before[0], after[0], strict=True)
        ]
        place = PARTS.index(block.kind)
        assert moved[place]
        assert not any(heads for i, heads in enumerate(moved) if i != place), block.name
        if "/head_" in block.name and block.kind == "query":
            assert moved[0] == {int(block.name.rpartition("_")[2])}
        kinds.add(block.kind)
    assert kinds == {"query", "key", "value"}


FUSED = [
    "gpt2",
    "phi3",
    "falcon",
    "gpt_bigcode",
    "gpt_neox",
    "llama",
    "qwen3_next",
    "persimmon",
]


@pytest.mark.parametrize("name", FUSED)
def test_cuts_are_what_moves_at_the_kernel(name, monkeypatch):
    model = zoo.build(name).double()
    if name == "qwen3_next":
        model.set_experts_implementation("eager")
    check_cuts(model, zoo.inputs(model), monkeypatch)


# Classes of other people's styles, whose names tell nothing.


@pytest.mark.parametrize("name", STYLES)
def test_other_styles(name):
    style = STYLES[name]
    model = build(style)
    tokens = torch.randint(0, VOCABULARY, (2, 7))
    whole = {b.name: b.kind for b in partition(model, by="tensor", example=tokens)}
    found = {n.removeprefix("parts.0."): whole[n] for n in whole if ".p." in n or ".q." in n}
    assert {n: k for n, k in found.items() if not n.endswith("bias")} == style.truth
    assert (whole["t.weight"], whole["s"], whole["z"]) == ("embedding", "position", "head")
    blocks = [b for b in partition(model, by="head", example=tokens) if b.kind != "bias"]
    counts = [
        sum(b.kind == kind and "/head_" in b.name for b in blocks) or 1 for kind in ("query", "key")
    ]
    assert tuple(counts) == style.heads
    tokens_ = [b for b in partition(model, by="neuron", example=tokens) if "/token_" in b.name]
    assert {b.pieces[0].parameter for b in tokens_} == {"t.weight", "z"}
    assert [b.pieces[0].axis for b in tokens_ if b.pieces[0].parameter == "z"] == [1] * VOCABULARY


@pytest.mark.parametrize("name", STYLES)
def test_rows_of_styles_move_what_they_are_called(name):
    """The rows of each head, as gradients of the kernel's own factors would have them: by
    differences.
    """
    model = build(STYLES[name])
    tokens = torch.randint(0, VOCABULARY, (1, 7))
    attention = model.parts[0].p
    blocks = [
        b
        for b in partition(model, by="head", example=tokens)
        if b.kind in ("query", "key", "value") and ".p." in b.name
    ]
    assert sum(b.numel for b in blocks) <= sum(p.numel() for p in attention.parameters())
    if not hasattr(attention, "split"):
        return
    parameters = dict(model.named_parameters())
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    before = attention.split(x)
    for block in blocks:
        step = scatter(block, torch.ones(block.numel, dtype=torch.float64), parameters)
        with torch.no_grad():
            for n, change in step.items():
                parameters[n] += change
            after = attention.split(x)
            for n, change in step.items():
                parameters[n] -= change
        moved = [
            {h for h in range(a.shape[1]) if (a - b)[:, h].abs().max() > 1e-9}
            for a, b in zip(before, after, strict=True)
        ]
        place = ("query", "key", "value").index(block.kind)
        number = block.name.rpartition("head_")[2]
        wanted = {int(number)} if number.isdigit() else set(range(before[place].shape[1]))
        assert moved == [wanted if i == place else set() for i in range(3)], block.name


def test_gate_and_up_in_one_tensor_are_two_blocks():
    for name, gate in (("multi_query", range(24, 48)), ("gated", range(0, 48, 2))):
        model = build(STYLES[name])
        blocks = partition(model, example=torch.randint(0, VOCABULARY, (1, 7)))
        (block,) = [b for b in blocks if b.kind == "mlp_gate"]
        index = block.pieces[0].index
        assert list(range(48)[index] if isinstance(index, slice) else index) == list(gate)
        assert block.name == "parts.0.q.u.weight/mlp_gate"


# Experts.


@pytest.mark.parametrize(("name", "step"), [("mixtral", 1), ("gpt_oss", 2)])
@pytest.mark.parametrize("watched", [True, False])
def test_experts_are_cut_by_expert_and_neuron(name, step, watched):
    model = zoo.build(name)
    example = zoo.inputs(model) if watched else None
    tensors = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    blocks = partition(model, example=example, include="*layers.0*experts.gate_up_proj/*")
    assert [b.name.rpartition("gate_up_proj/")[2] for b in blocks] == [
        f"expert_{e}/{part}" for e in range(4) for part in ("mlp_gate", "mlp_in")
    ]
    fused = tensors[blocks[0].parameters[0]]
    fused = fused if step == 1 else fused.transpose(1, 2)  # (experts, out, in)
    rows = fused[2][:48] if step == 1 else fused[2][::2]
    taken = gather(blocks[4], tensors)
    torch.testing.assert_close(taken.sort().values, rows.flatten().sort().values)
    back = scatter(blocks[4], taken, tensors)[blocks[4].parameters[0]]
    torch.testing.assert_close(back.sum(), rows.sum())
    neurons = partition(model, by="neuron", example=example, include="*layers.0*/expert_3/*")
    assert sum("mlp_gate/neuron_" in b.name for b in neurons) == 48
    assert sum("down_proj/expert_3/neuron_" in b.name for b in neurons) == 32
    marks = sum(
        (
            scatter(b, torch.ones(b.numel), tensors)[b.parameters[0]]
            for b in neurons
            if "gate_up_proj/" in b.name
        ),
        torch.zeros(()),
    )
    assert set(marks[3].unique().tolist()) == {1.0}
    assert marks[:3].abs().max() == 0


# Costs, restoring, disagreement.


def test_at_most_ten_gradients(monkeypatch):
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for name in ("qwen3_next", "deberta"):
        model = zoo.build(name)
        calls.clear()
        partition(model, by="head")
        assert calls == []
        partition(model, by="head", example=zoo.inputs(model))
        assert 5 <= len(calls) <= 10


def test_the_model_is_left_as_it_was():
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()
    model.transformer.wpe.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    partition(model, example={"input_ids": torch.randint(0, 32, (3, 9))})
    assert [m.training for m in model.modules()] == flags
    assert not model.transformer.wpe.weight.requires_grad
    assert model.config.use_cache
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("watched", [False, True])
def test_weights_that_change_by_being_read_in_training_are_left_as_they_were(watched):
    """As spectral norm's vectors do: each look is a step of a power iteration."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).train()
    nn.utils.parametrizations.spectral_norm(model[0])
    before = copy.deepcopy(model.state_dict())
    for by in ("matrix", "model"):
        partition(model, by=by, example=(torch.ones(2, 3),) if watched else None)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_watching_wins_over_names_and_says_so():
    model = build(STYLES["nanogpt"])
    attention = model.parts[0].p
    wrong = nn.Module()
    wrong.add_module("attn", attention)
    attention.k_proj = attention.b  # the output, called a key
    del attention.b
    attention.forward = lambda x: attention.k_proj(
        F.scaled_dot_product_attention(*attention.split(x)).transpose(1, 2).flatten(2)
    )
    model.parts[0].p = attention
    tokens = torch.randint(0, VOCABULARY, (1, 7))
    assert {b.kind for b in partition(model) if "k_proj" in b.name} == {"key"}
    (block,) = [b for b in partition(model, example=tokens) if "k_proj" in b.name]
    assert block.kind == "attention_output"
    assert block.note == "the name says key, the forward pass says attention_output"


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (
            tiny_llama,
            {"input_ids": torch.arange(6).view(2, 3), "labels": torch.arange(6).view(2, 3)},
        ),
        (nanogpt, (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3))),
        (tiny_bert, {"input_ids": torch.arange(6).view(2, 3)}),
    ],
)
def test_families_whose_names_are_right_stay_as_they_are(model, example):
    for by in ("tensor", "matrix", "head", "neuron", "layer", "model"):
        plain, watched = partition(model(), by=by), partition(model(), by=by, example=example)
        assert [(b.name, b.kind, b.layer, b.pieces) for b in plain] == [
            (b.name, b.kind, b.layer, b.pieces) for b in watched
        ]


def test_an_objective_passes_its_first_batch():
    batches = [{"input_ids": torch.randint(0, VOCABULARY, (2, 7))}]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build(STYLES["tinyvit"])

        def forward(self, input_ids):
            return self.inner(input_ids)

    objective = Objective(Wrapped(), batches, next_token)
    kinds = {b.kind for b in objective.partition("head")}
    assert {"query", "key", "value", "attention_output", "mlp_in", "mlp_out", "head"} <= kinds


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"cannot be run on the example, a dict .*example=lambda"):
        partition(tiny_llama(), example={"nothing": torch.ones(2)})
    function = partition(tiny_llama(), example=lambda: tiny_llama()(torch.ones(1, 2).long()))
    assert function
