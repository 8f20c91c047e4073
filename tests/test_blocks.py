import time
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import (
    nanogpt,
    timm_vit,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_resnet,
    tiny_vgg,
    tiny_vit,
)
from torch import nn

import blockspec
import blockspec.optim
from blockspec.model.architectures import role
from blockspec.model.blocks import GRANULARITIES, Block, gather, partition, scatter

KINDS = {"query", "key", "value", "qkv", "attention_output", "mlp_in", "mlp_out", "mlp_gate"}
KINDS |= {"embedding", "position", "norm", "head", "conv", "bias", "other", "layer", "full"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
QUIET = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def hf(name, **settings):
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **QUIET, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).double()


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


LANGUAGE = {
    "gpt2": tiny_gpt2,
    "nanogpt": nanogpt,
    "llama": tiny_llama,
    "bert": tiny_bert,
    "qwen2": lambda: hf("qwen2", intermediate_size=24, num_key_value_heads=2),
    "phi3": lambda: hf("phi3", intermediate_size=24, num_key_value_heads=2),
    "gpt_neox": lambda: hf("gpt_neox", intermediate_size=32),
    "falcon_one_key": lambda: hf("falcon", multi_query=True),
    "falcon_all_keys": lambda: hf("falcon", multi_query=False, bias=True),
    "falcon_grouped": lambda: hf("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "bigcode": lambda: hf("gpt_bigcode", multi_query=False, n_positions=16),
    "bigcode_one_key": lambda: hf("gpt_bigcode", multi_query=True, n_positions=16),
    "opt": lambda: hf("opt", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16),
}
VISION = {"vit": tiny_vit, "timm_vit": timm_vit, "resnet": tiny_resnet, "vgg": tiny_vgg}
MODELS = {
    **LANGUAGE,
    **VISION,
    "encoder": encoder,
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def named(blocks):
    assert len({b.name for b in blocks}) == len(blocks)
    return {block.name: block for block in blocks}


def marked(model, block):
    """1 where the block has an entry, by way of numpy's indexing."""
    marks = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for piece in block.pieces:
        where = [slice(None)] * marks[piece.parameter].ndim
        if piece.axis is not None:
            where[piece.axis] = list(piece.index) if isinstance(piece.index, tuple) else piece.index
        marks[piece.parameter].numpy()[tuple(where)] += 1
    return marks


@pytest.mark.parametrize("by", GRANULARITIES)
def test_disjoint_and_complete(model, by):
    blocks = partition(model, by=by)
    named(blocks)
    totals = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for block in blocks:
        marks = marked(model, block)
        assert block.numel == sum(m.sum() for m in marks.values())
        assert set(block.parameters) == {name for name, m in marks.items() if m.any()}
        assert block.kind in KINDS
        for name in block.parameters:
            totals[name] += marks[name]
    assert all((total == 1).all() for total in totals.values())


@pytest.mark.parametrize("by", GRANULARITIES)
def test_vectors_and_tensors(model, by):
    tensors = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    for block in partition(model, by=by)[::7]:
        vector = gather(block, tensors)
        assert vector.shape == (block.numel,)
        back = scatter(block, vector, tensors)
        assert tuple(back) == block.parameters
        marks = marked(model, block)
        for name, tensor in back.items():
            torch.testing.assert_close(tensor, tensors[name] * marks[name], rtol=0, atol=0)
        torch.testing.assert_close(gather(block, back), vector, rtol=0, atol=0)


def test_scatter_shares_memory_with_a_whole_tensor():
    model = tiny_gpt2()
    like = dict(model.named_parameters())
    (block,) = partition(model, include="*.h.0.mlp.c_fc.weight")
    vector = torch.randn(block.numel, dtype=torch.float64)
    assert scatter(block, vector, like)[block.name].data_ptr() == vector.data_ptr()
    assert gather(block, like).data_ptr() != like[block.name].data_ptr()
    narrow = {name: p.detach().float() for name, p in like.items()}
    assert scatter(block, vector, narrow)[block.name].dtype == torch.float32


class Complex(nn.Module):
    """A product with complex numbers that are kept as pairs, as state-space models do."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.pairs = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x):
        return (torch.view_as_complex(self.pairs) * x * self.odd).exp().real


def test_pairs_that_are_read_as_complex_numbers_lie_at_even_places():
    torch.manual_seed(0)
    model, x = Complex(), torch.randn(2, 3, dtype=torch.float64)

    def squares(odd, pairs):
        made = (pairs[:, 0] * x * odd).exp() * (pairs[:, 1] * x * odd).cos()
        return made.square().sum() / 2

    loss = lambda model, x: (model(x).square().sum(), len(x))  # noqa: E731
    found = blockspec.dense(blockspec.Objective(model, [x], loss), *partition(model, "model"))
    parts = torch.autograd.functional.hessian(squares, (model.odd, model.pairs))
    rows = [torch.cat([b.reshape(a, 3 * n) for n, b in enumerate(row, 1)], 1)
            for a, row in zip((3, 6), parts, strict=True)]  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(found), torch.cat(rows), rtol=1e-9, atol=1e-12)
    optimizer = blockspec.optim.AdaHessian(model.parameters(), lr=1e-3)
    with optimizer.second_order(model):
        optimizer.backward(model(x).square().sum())
    optimizer.step()


# Which numbers of the attention a block moves, seen at the attention kernel itself.


def attention_inputs(model, monkeypatch):
    """Query, key and value (B, heads, T, head size) of the first attention call."""
    calls = []
    kernel = F.scaled_dot_product_attention

    def recorded(query, key, value, *args, **kwargs):
        calls.append((query.detach(), key.detach(), value.detach()))
        return kernel(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            if isinstance(model, nn.TransformerEncoder):
                model(torch.randn(2, 5, 16, dtype=torch.float64))
            elif any(isinstance(m, nn.Conv2d) for m in model.modules()):
                model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
            else:
                model(torch.randint(0, 32, (2, 5)))
    return calls[0]


def moved(model, block, monkeypatch):
    """For query, key and value: which heads change when the block does."""
    before = attention_inputs(model, monkeypatch)
    parameters = dict(model.named_parameters())
    step = scatter(block, torch.rand(block.numel, dtype=torch.float64) + 0.5, parameters)
    with torch.no_grad():
        for name, change in step.items():
            parameters[name] += change
        after = attention_inputs(model, monkeypatch)
        for name, change in step.items():
            parameters[name] -= change
    changes = [
        (new - old).abs().amax(dim=(0, 2, 3)) > 1e-9 for old, new in zip(before, after, strict=True)
    ]
    return [set(torch.nonzero(change).flatten().tolist()) for change in changes]


@pytest.mark.parametrize("family", [*LANGUAGE, "vit", "timm_vit", "encoder"])
def test_query_key_and_value_are_what_the_attention_receives(family, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[family]()
    model.train(family == "encoder")  # in eval mode it takes a fused path past the kernel
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    blocks = [b for b in partition(model, by="head") if b.layer == 0]
    kinds = {b.name: b.kind for b in blocks}
    found = set()
    for block in blocks:
        kind = kinds.get(block.name.replace("bias", "weight"))
        if kind not in ("query", "key", "value"):
            continue
        place = ("query", "key", "value").index(kind)
        heads = moved(model, block, monkeypatch)
        received = attention_inputs(model, monkeypatch)[place].shape[1]
        if kind == "value":
            expected = set(range(received))
        else:
            siblings = sum(
                b.kind == block.kind
                and kinds.get(b.name.replace("bias", "weight")) == kind
                and b.pieces[0].parameter == block.pieces[0].parameter
                for b in blocks
            )
            number, repeats = int(block.name.rpartition("_")[2]), received // siblings
            assert siblings == (4 if kind == "query" else key_heads(family))
            expected = set(range(number * repeats, (number + 1) * repeats))
        assert heads == [expected if i == place else set() for i in range(3)], block.name
        found.add(kind)
    assert found == {"query", "key", "value"}


def key_heads(family):
    return {
        "llama": 2,
        "qwen2": 2,
        "phi3": 2,
        "falcon_grouped": 2,
        "falcon_one_key": 1,
        "bigcode_one_key": 1,
    }.get(family, 4)


# What a neuron and a token are, seen at the outputs of their module.


@pytest.mark.parametrize(
    "family", ["gpt2", "nanogpt", "llama", "bert", "vit", "timm_vit", "encoder"]
)
def test_a_neuron_moves_one_output_and_a_token_one_row(family):
    torch.manual_seed(0)
    model = MODELS[family]()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    units = [b for b in partition(model, by="neuron") if "neuron_" in b.name or "token_" in b.name]
    units = [b for b in units if "in_proj" not in b.name]  # not a module of its own
    seen = set()
    for block in units[::5]:
        (name,) = block.parameters
        module = modules[name.removesuffix(".weight")]
        unit, number = block.name.rpartition("/")[2].split("_")
        inputs = (
            torch.arange(32)
            if isinstance(module, nn.Embedding)
            else torch.rand(3, linear_inputs(module)).double()
        )
        with torch.no_grad():
            before = module(inputs)
            change = scatter(block, torch.ones(block.numel, dtype=torch.float64), parameters)[name]
            parameters[name] += change
            difference = module(inputs) - before
            parameters[name] -= change
        axis = 0 if isinstance(module, nn.Embedding) else 1
        touched = torch.nonzero(difference.abs().amax(dim=1 - axis) > 1e-9).flatten().tolist()
        offset = (
            2 * difference.shape[1] // 3 if block.name.endswith(f"/value/{unit}_{number}") else 0
        )
        assert touched == [offset + int(number)], block.name
        assert unit == ("token" if block.kind in ("embedding", "head") else "neuron")
        seen.add(block.kind)
    expected = {"value", "attention_output", "mlp_in", "mlp_out"}
    expected |= {"embedding"} if family in LANGUAGE else set()
    assert seen - {"mlp_gate", "head"} == expected - ({"value"} if family == "encoder" else set())


def linear_inputs(module):
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]


def test_the_rule_of_adam_mini_on_gpt2():
    blocks = named(partition(tiny_gpt2(), by="neuron"))
    layer = {"query/head_": 4, "key/head_": 4, "value/neuron_": 16}
    for part, count in layer.items():
        assert (
            sum(fnmatch(n, f"transformer.h.1.attn.c_attn.weight/{part}*") for n in blocks) == count
        )
    assert sum("h.1.mlp.c_fc.weight/neuron_" in name for name in blocks) == 64
    assert sum("h.1.mlp.c_proj.weight/neuron_" in name for name in blocks) == 16
    assert sum("wte.weight/token_" in name for name in blocks) == 32
    whole = [
        "transformer.wpe.weight",
        "transformer.h.1.ln_1.weight",
        "transformer.h.1.mlp.c_fc.bias",
    ]
    assert not {
        *whole,
        "transformer.h.1.attn.c_attn.bias/value",
        "transformer.h.1.attn.c_attn.bias/query/head_2",
    } - set(blocks)
    assert "lm_head.weight/token_31" in named(partition(tiny_llama(), by="neuron"))
    vit = named(partition(tiny_vit(), by="neuron"))
    assert {"classifier.weight", "vit.embeddings.patch_embeddings.projection.weight"} <= set(vit)
    mlm = named(partition(tiny_bert(), by="neuron"))
    assert {
        "bert.embeddings.word_embeddings.weight/token_3",
        "bert.embeddings.token_type_embeddings.weight",
    } <= set(mlm)


# Names and kinds.

EXPECTED = {
    "gpt2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position",
        "transformer.h.0.ln_1.weight": "norm",
        "transformer.h.0.ln_1.bias": "norm",
        "transformer.h.0.attn.c_attn.weight/query": "query",
        "transformer.h.0.attn.c_attn.weight/key": "key",
        "transformer.h.0.attn.c_attn.weight/value": "value",
        "transformer.h.0.attn.c_attn.bias/query": "bias",
        "transformer.h.0.attn.c_attn.bias/key": "bias",
        "transformer.h.0.attn.c_attn.bias/value": "bias",
        "transformer.h.0.attn.c_proj.weight": "attention_output",
        "transformer.h.0.attn.c_proj.bias": "bias",
        "transformer.h.0.ln_2.weight": "norm",
        "transformer.h.0.ln_2.bias": "norm",
        "transformer.h.0.mlp.c_fc.weight": "mlp_in",
        "transformer.h.0.mlp.c_fc.bias": "bias",
        "transformer.h.0.mlp.c_proj.weight": "mlp_out",
        "transformer.h.0.mlp.c_proj.bias": "bias",
        "transformer.ln_f.weight": "norm",
        "transformer.ln_f.bias": "norm",
    },
    "llama": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "query",
        "model.layers.0.self_attn.k_proj.weight": "key",
        "model.layers.0.self_attn.v_proj.weight": "value",
        "model.layers.0.self_attn.o_proj.weight": "attention_output",
        "model.layers.0.mlp.gate_proj.weight": "mlp_gate",
        "model.layers.0.mlp.up_proj.weight": "mlp_in",
        "model.layers.0.mlp.down_proj.weight": "mlp_out",
        "model.layers.0.input_layernorm.weight": "norm",
        "model.layers.0.post_attention_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    },
    "timm_vit": {
        "cls_token": "embedding",
        "pos_embed": "position",
        "patch_embed.proj.weight": "embedding",
        "patch_embed.proj.bias": "bias",
        "blocks.0.norm1.weight": "norm",
        "blocks.0.norm1.bias": "norm",
        "blocks.0.attn.qkv.weight/query": "query",
        "blocks.0.attn.qkv.weight/key": "key",
        "blocks.0.attn.qkv.weight/value": "value",
        "blocks.0.attn.qkv.bias/query": "bias",
        "blocks.0.attn.qkv.bias/key": "bias",
        "blocks.0.attn.qkv.bias/value": "bias",
        "blocks.0.attn.proj.weight": "attention_output",
        "blocks.0.attn.proj.bias": "bias",
        "blocks.0.norm2.weight": "norm",
        "blocks.0.norm2.bias": "norm",
        "blocks.0.mlp.fc1.weight": "mlp_in",
        "blocks.0.mlp.fc1.bias": "bias",
        "blocks.0.mlp.fc2.weight": "mlp_out",
        "blocks.0.mlp.fc2.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "head.weight": "head",
        "head.bias": "bias",
    },
    "vgg": {
        "features.0.weight": "conv",
        "features.0.bias": "bias",
        "features.3.weight": "conv",
        "features.3.bias": "bias",
        "features.5.weight": "conv",
        "features.5.bias": "bias",
        "classifier.0.weight": "head",
        "classifier.0.bias": "bias",
        "classifier.3.weight": "head",
        "classifier.3.bias": "bias",
        "classifier.6.weight": "head",
        "classifier.6.bias": "bias",
    },
    "plain": {"0.weight": "other", "0.bias": "bias", "1.weight": "other", "1.bias": "bias"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_names_and_kinds_of_matrices(family):
    kinds = {b.name: b.kind for b in partition(MODELS[family]()) if b.layer != 1 or family == "vgg"}
    kinds = {name: kind for name, kind in kinds.items() if ".1." not in name}
    assert kinds == EXPECTED[family]


@pytest.mark.parametrize(
    ("family", "name", "kind"),
    [
        ("bert", "bert.encoder.layer.1.attention.self.query.weight", "query"),
        ("bert", "bert.encoder.layer.1.attention.output.dense.weight", "attention_output"),
        ("bert", "bert.encoder.layer.1.attention.output.LayerNorm.bias", "norm"),
        ("bert", "bert.encoder.layer.1.intermediate.dense.weight", "mlp_in"),
        ("bert", "bert.encoder.layer.1.output.dense.weight", "mlp_out"),
        ("bert", "bert.embeddings.word_embeddings.weight", "embedding"),
        ("bert", "bert.embeddings.token_type_embeddings.weight", "embedding"),
        ("bert", "bert.embeddings.position_embeddings.weight", "position"),
        ("bert", "cls.predictions.transform.dense.weight", "head"),
        ("bert", "cls.predictions.bias", "bias"),
        ("vit", "vit.embeddings.cls_token", "embedding"),
        ("vit", "vit.embeddings.position_embeddings", "position"),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight", "embedding"),
        ("vit", "classifier.weight", "head"),
        ("resnet", "resnet.encoder.stages.0.layers.1.layer.0.convolution.weight", "conv"),
        ("resnet", "resnet.encoder.stages.0.layers.1.layer.0.normalization.bias", "norm"),
        ("resnet", "classifier.1.weight", "head"),
        ("nanogpt", "transformer.wte.weight", "embedding"),
        ("nanogpt", "transformer.h.1.ln_2.bias", "norm"),
        ("nanogpt", "transformer.h.1.mlp.c_proj.weight", "mlp_out"),
        ("gpt_neox", "gpt_neox.layers.1.attention.dense.weight", "attention_output"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight", "mlp_out"),
        ("opt", "model.decoder.layers.1.fc2.weight", "mlp_out"),
        ("encoder", "layers.1.linear1.weight", "mlp_in"),
        ("encoder", "layers.1.self_attn.in_proj_bias/key", "bias"),
    ],
)
def test_kinds(family, name, kind):
    assert named(partition(MODELS[family]()))[name].kind == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # transformers 4
        ("vit.encoder.layer.0.attention.attention.query.weight", "query"),
        ("vit.encoder.layer.0.attention.output.dense.weight", "attention_output"),
        ("vit.encoder.layer.0.intermediate.dense.weight", "mlp_in"),
        ("vit.encoder.layer.0.output.dense.weight", "mlp_out"),
        ("blocks.3.mlp_tokens.fc1.weight", "mlp_in"),
        ("blocks.3.mlp_channels.fc2.weight", "mlp_out"),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", "mlp_in"),  # torchvision
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "adapter"),
        ("bert.pooler.dense.weight", "head"),
        ("fc1.weight", "other"),  # of a plain network, not of a transformer's layer
        ("fc.weight", "head"),
    ],
)
def test_kinds_of_names(name, kind):
    assert role(name, nn.Linear(2, 2)).kind == kind


def test_fused_tensors_stay_whole_by_tensor():
    blocks = named(partition(tiny_gpt2(), by="tensor"))
    assert list(blocks) == [name for name, _ in tiny_gpt2().named_parameters()]
    assert blocks["transformer.h.0.attn.c_attn.weight"].kind == "qkv"
    assert blocks["transformer.h.0.attn.c_attn.bias"].kind == "bias"
    (model,) = partition(tiny_gpt2(), by="model")
    assert (model.name, model.kind, model.layer) == ("model", "full", None)


def test_without_a_number_of_heads_matrices_stay_whole():
    model = nn.ModuleDict(
        {"q_proj": nn.Linear(4, 4), "qkv": nn.Linear(4, 12), "query_key_value": nn.Linear(4, 12)}
    )
    names = [b.name for b in partition(model, by="head") if b.kind != "bias"]
    assert names == [
        "q_proj.weight",
        "qkv.weight/query",
        "qkv.weight/key",
        "qkv.weight/value",
        "query_key_value.weight",
    ]
    assert named(partition(model))["query_key_value.weight"].kind == "qkv"
    model.num_heads = 3  # does not divide 4
    assert "q_proj.weight" in named(partition(model, by="head"))


def test_the_nearest_number_of_heads_counts():
    attention = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "k_proj": nn.Linear(16, 8)})
    model = nn.ModuleDict({"attention": attention})
    model.config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1)

    def counts():
        names = [b.name for b in partition(model, by="head")]
        return [max(sum(f"{p}_proj.weight" in name for name in names), 1) for p in "qk"]

    assert counts() == [2, 1]
    attention.num_heads = 8  # of the model around it nothing holds then, nor do its key heads
    assert counts() == [8, 1]  # how many keys is not known: whole
    attention.config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=4)
    assert counts() == [8, 4]
    attention.num_key_value_heads = 2
    assert counts() == [8, 2]


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_wrapped_models(attribute):
    wrapper = nn.Module()
    wrapper.add_module(attribute, tiny_gpt2())
    for by in ("head", "layer"):
        plain, wrapped = partition(tiny_gpt2(), by=by), partition(wrapper, by=by)
        described = [(f"{attribute}.{b.name}", b.kind, b.layer, b.numel) for b in plain]
        assert [(b.name, b.kind, b.layer, b.numel) for b in wrapped] == described


# Layers.


def test_layers_are_numbered_in_order_and_frozen_ones_count():
    layers = {b.name: b.layer for b in partition(tiny_resnet(), by="layer") if b.layer is not None}
    prefix = "resnet.encoder.stages"
    assert layers == {
        f"{prefix}.0.layers.0": 0,
        f"{prefix}.0.layers.1": 1,
        f"{prefix}.1.layers.0": 2,
    }
    model = tiny_gpt2(layers=3)
    model.transformer.h[0].requires_grad_(False)
    model.transformer.wte.requires_grad_(False)
    blocks = partition(model, by="layer")
    assert [(b.name, b.kind, b.layer) for b in blocks] == [
        ("transformer.wpe.weight", "position", None),
        ("transformer.h.1", "layer", 1),
        ("transformer.h.2", "layer", 2),
        ("transformer.ln_f.weight", "norm", None),
        ("transformer.ln_f.bias", "norm", None),
    ]
    assert blocks[1].numel == sum(p.numel() for p in model.transformer.h[1].parameters())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer1.0.conv1", 0),
        ("encoder.layers.0.blocks.1.fc", 0),
        ("encoder.layers.encoder_layer_7.ln", 0),
        ("fc", None),
    ],
)
def test_containers_of_layers(name, layer):
    model = nn.Module()
    parent = model
    for part in name.split("."):
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.weight = nn.Parameter(torch.ones(2))
    (block,) = partition(model, by="layer")
    assert block.layer == layer
    assert block.name == (f"{name.rpartition('.')[0]}" if layer == 0 else f"{name}.weight")


# Choosing, and blocks of one's own.


def test_the_blocks_of_the_paper():
    layers = ("0", "6", "11")
    timm = ["patch_embed.proj.weight", "head.weight"]
    timm += [
        f"blocks.{l}.{m}.weight"
        for l in layers
        for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    blocks = partition(timm_vit(layers=12), by="tensor", include=timm)
    assert sorted(b.name for b in blocks) == sorted(timm)
    assert len(blocks) == 14
    parts = (
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    hf_names = ["vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"]
    hf_names += [f"vit.layers.{l}.{part}.weight" for l in layers for part in parts]
    model = tiny_vit(layers=12)
    assert sorted(b.name for b in partition(model, include=hf_names)) == sorted(hf_names)
    fused = {f"blocks.{l}.qkv": f"vit.layers.{l}.attention.[qkv]_proj.weight" for l in layers}
    rest = [name for name in hf_names if not fnmatch(name, "*[qkv]_proj*")]
    others = {
        name: name
        for name, _ in model.named_parameters()
        if not any(fnmatch(name, g) for g in fused.values())
    }
    chosen = partition(model, by={**others, **fused}, include=[*fused, *rest])
    assert len(chosen) == 14
    assert named(chosen)["blocks.6.qkv"].numel == 3 * 16 * 16


def test_include_and_exclude():
    model = tiny_gpt2()
    names = [b.name for b in partition(model, include=["*/query", "*wte*"], exclude="*.bias/*")]
    assert names == ["transformer.wte.weight"] + [
        f"transformer.h.{l}.attn.c_attn.weight/query" for l in (0, 1)
    ]
    everything = partition(model)
    assert [b.name for b in partition(model, exclude="*.bias*")] == [
        b.name for b in everything if ".bias" not in b.name
    ]


OWN = {
    "attention": ["*.attn.c_attn.weight", "*.attn.c_proj.*", "*attn.bias/[qkv]*"],
    "rest": ["*mlp*", "*w?e*", "*ln_*"],
}


def test_own_blocks():
    model = tiny_gpt2()
    attention, rest = partition(model, by=OWN)
    assert (attention.name, attention.kind, attention.layer) == ("attention", "other", None)
    assert attention.numel == sum(
        p.numel() for h in model.transformer.h for p in h.attn.parameters()
    )
    assert attention.numel + rest.numel == sum(p.numel() for p in model.parameters())
    assert all(
        piece.axis is None for piece in attention.pieces
    )  # the three parts of c_attn together are the tensor


def test_own_blocks_of_parts_of_tensors():
    model = tiny_gpt2()
    rest = ["*/query", "*/value", "*.c_proj.*", "*mlp.c_fc*", "*w?e*", "*ln_*"]
    blocks = partition(model, by={"keys0": "*.0.*/key", "keys1": "*.1.*/key", "rest": rest})
    assert [b.layer for b in blocks] == [0, 1, None]
    assert blocks[0].numel == 16 * 16 + 16
    tensors = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    whole = {name: torch.zeros_like(t) for name, t in tensors.items()}
    for block in blocks:
        for name, tensor in scatter(block, gather(block, tensors), tensors).items():
            whole[name] += tensor
    torch.testing.assert_close(whole, tensors, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {**OWN, "mlp": "*mlp.c_fc.bias"},
            r"blocks 'rest' and 'mlp' overlap: both hold transformer\.h\.0\.mlp\.c_fc\.bias",
        ),
        (
            {"attention": OWN["attention"]},
            r"no block holds transformer\.wte\.weight, .* and \d+ more: .*exclude=",
        ),
        ({**OWN, "head": "lm_haed*"}, r"block 'head': 'lm_haed\*' matches no block"),
    ],
)
def test_refused_own_blocks(own, message):
    with pytest.raises(ValueError, match=message):
        partition(tiny_gpt2(), by=own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "column"}, r"by='column' is not one of tensor, matrix, head, neuron, layer, model"),
        (
            {"include": "transformer.h.0.mlp.c_fd.weight"},
            r"include: .*c_fd.* matches no block; the nearest .*h\.0\.mlp\.c_fc\.weight",
        ),
        ({"exclude": ["*wte*", "*key*", "*wke*"]}, r"exclude: '\*wke\*' matches no block"),
        (
            {"by": "neuron", "include": "transformer.wte.weight/tokens_3"},
            r"nearest .*wte\.weight/token_\*",
        ),
        (
            {"include": "*wte*", "exclude": "*w?e*"},
            r"partition is empty: include='\*wte\*' without exclude='\*w\?e\*'",
        ),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        partition(tiny_gpt2(), **arguments)


def test_a_frozen_model_is_refused():
    with pytest.raises(
        ValueError,
        match=r"no parameter of GPT2LMHeadModel requires gradients.*requires_grad_\(True\)",
    ):
        partition(tiny_gpt2().requires_grad_(False))


def test_a_block_is_equal_to_the_one_loaded_from_a_file():
    block = partition(tiny_gpt2())[0]
    assert block == Block(block.name, block.kind, block.layer, block.numel)
    assert block.pieces
    assert Block("a", "other", None, 3).parameters == ()


@pytest.mark.slow
def test_every_neuron_of_gpt2_in_seconds():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    start = time.process_time()
    blocks = partition(model, by="neuron")
    assert time.process_time() - start < 10
    layer = (
        2 * 12 + 768 + 2 * 12 + 1 + 768 + 3072 + 768 + 3 + 4
    )  # weights, fused biases, other biases, norms
    assert len(blocks) == 50257 + 1 + 12 * layer + 2
    assert sum(block.numel for block in blocks) == 124439808
