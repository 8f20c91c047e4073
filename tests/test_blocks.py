import time
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import nanogpt, timm_vit, tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet, tiny_vgg, tiny_vit
from torch import nn

from blockspec.architectures import role
from blockspec.blocks import GRANULARITIES, Block, gather, partition, scatter

KINDS = set(
    "query key value qkv attention_output mlp_in mlp_out mlp_gate embedding position norm head conv bias other".split()
)
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
MODELS = {**LANGUAGE, **VISION, "encoder": encoder, "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))}


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
    changes = [(new - old).abs().amax(dim=(0, 2, 3)) > 1e-9 for old, new in zip(before, after, strict=True)]
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
    return {"llama": 2, "qwen2": 2, "phi3": 2, "falcon_grouped": 2, "falcon_one_key": 1, "bigcode_one_key": 1}.get(
        family, 4
    )
