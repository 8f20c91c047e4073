"""What names alone tell: kinds, cuts and layers of architectures, and where they stay silent."""

import sys

import models
import pytest
import torch
import transformers
from torch import nn

from blockspec.model.architectures import _matched, layer_prefix, role
from blockspec.model.blocks import partition

NAMES = {
    "funnel.encoder.blocks.0.0.attention.q_head.weight": "query",
    "funnel.encoder.blocks.0.0.attention.post_proj.weight": "attention_output",
    "funnel.encoder.blocks.0.0.attention.r_kernel": "position",
    "decoder.decoder_pred.weight": "head",  # ViT-MAE
    "decoder.decoder_embed.weight": "embedding",
    "rwkv.blocks.0.attention.time_mix_key": "mixer",
    "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "conv",
    "model.classification_head.out_proj.weight": "head",  # BART, T5
    "model.layers.0.mamba.out_proj.weight": "mixer",  # Jamba
    "model.layers.0.mamba.in_proj.weight": "mixer",
    "rwkv.blocks.0.feed_forward.key.weight": "mlp_in",
    "rwkv.blocks.0.feed_forward.value.weight": "mlp_out",
    "encoder.block.1.layer.1.mlp.router.classifier.weight": "router",  # Switch
    "model.layers.0.block_sparse_moe.gate.weight": "router",  # Mixtral, transformers 4
    "model.layers.0.self_attn.dense.weight": "attention_output",  # phi
    "transformer.h.0.mlp.fc_in.weight": "mlp_in",  # GPT-J
    "transformer.h.0.mlp.fc_out.weight": "mlp_out",
    "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight": "mlp_in",
    "wav2vec2.encoder.layers.0.feed_forward.output_dense.weight": "mlp_out",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "mlp_in",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight": "mlp_out",
    "mpnet.encoder.layer.0.attention.attn.q.weight": "query",
    "mpnet.encoder.layer.0.attention.attn.o.weight": "attention_output",
    "model.layers.0.self_attn.q_a_proj.weight": "query",  # latent attention
    "model.layers.0.self_attn.kv_b_proj.weight": "qkv",
    "model.layers.0.self_attn.g_proj.weight": "attention_gate",
    "transformer.h.0.attn.c_q.weight": "query",  # nanochat, modded-nanogpt
    "transformer.h.0.attn.c_v.weight": "value",
    "layers.0.attn.wo.weight": "attention_output",  # the papers' own
    "transformer.h.0.mlp.fc_1.weight": "mlp_gate",  # litgpt
    "transformer.h.0.mlp.fc_2.weight": "mlp_in",
    "transformer.h.0.mlp.proj.weight": "mlp_out",
    "transformer.h.0.attn.attn.weight": "qkv",
    "output.weight": "head",  # Meta, torchtitan
    "module.output.weight": "head",
    "layers.0.feed_forward.w1.weight": "mlp_gate",
    "decoder.layers.0.self_attention.linear_qkv.weight": "qkv",  # Megatron
    "decoder.layers.0.self_attention.linear_proj.weight": "attention_output",
    "decoder.layers.0.mlp.linear_fc1.weight": "mlp_in",
    "output_layer.weight": "head",
    "transformer.blocks.0.att_proj.weight": "qkv",  # OLMo
    "transformer.blocks.0.ff_out.weight": "mlp_out",
    "transformer.ff_out.weight": "head",
    "transformer.layers.0.0.to_out.0.weight": "attention_output",  # vit-pytorch
    "transformer.layers.0.1.net.1.weight": "mlp_in",
    "attn_layers.layers.1.1.ff.0.0.weight": "mlp_in",  # x-transformers
    "attn_layers.layers.1.1.ff.2.weight": "mlp_out",
    "token_emb.emb.weight": "embedding",
    "h.0.attn.q_proj.parametrizations.weight.original1": "query",
    "h.0.mlp.fc1.weight_v": "mlp_in",
    "model.layers.0.self_attn.q_proj.linear.weight": "query",  # Moshi
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": "query",  # PEFT
    "model.vision_tower.layers.0.mlp.lin1.weight": "mlp_in",
    "transformer.ffns.0.lin2.weight": "mlp_out",  # XLM
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_names(name):
    assert role(name, nn.Linear(2, 2)).kind == NAMES[name]


def test_adapters_know_the_matrix_they_adapt():
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert (role(name, nn.Linear(2, 2)).kind, role(name, nn.Linear(2, 2)).matrix) == (
        "adapter",
        "query",
    )


def test_names_can_be_taught():
    model = nn.ModuleDict({"mine": nn.ModuleDict({"first": nn.Linear(2, 2)}), "q": nn.Linear(2, 2)})
    taught = {"mlp_in": ["mine.first"], "my_expert": ["q"]}
    kinds = {b.name: b.kind for b in partition(model, names=taught)}
    assert kinds["mine.first.weight"] == "mlp_in"
    assert kinds["mine.first.bias"] == "bias"
    assert kinds["q.weight"] == "my_expert"
    assert {b.kind for b in partition(model)} == {"other", "bias"}


class Config:
    """As gemma4's: an attribute that differs between layers cannot be read."""

    @property
    def num_attention_heads(self):
        raise ValueError("'num_attention_heads' is a per-layer attribute")

    num_key_value_heads = num_attention_heads


def attention(fused=None, **attributes):
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    if fused:
        module.qkv = nn.Linear(16, fused)
    return nn.ModuleDict({"attn": module})


def test_attributes_that_raise_are_no_attributes():
    model = attention(
        config=Config(), head_dim=4, q_proj=nn.Linear(16, 24), k_proj=nn.Linear(16, 8)
    )
    names = [b.name for b in partition(model, by="head") if b.kind in ("query", "key")]
    assert [sum(f"{p}_proj" in name for name in names) for p in "qk"] == [6, 2]


@pytest.mark.parametrize(
    ("fused", "attributes", "rows"),
    [
        (48, {"n_head": 4}, [16, 16, 16]),
        (24, {"n_head": 4}, []),  # groups that nothing counts: whole
        (24, {"n_head": 4, "n_query_groups": 1}, [16, 4, 4]),  # litgpt
        (24, {"num_heads": 4, "num_heads_kv": 1}, [16, 4, 4]),  # flash-attn
        (48, {"num_heads": 4, "key_dim": 4}, []),  # TinyViT: by head
        (48, {"num_heads": 4, "head_first": False}, []),  # MaxViT
    ],
)
def test_fused_rows_are_cut_where_attributes_tell(fused, attributes, rows):
    blocks = [b for b in partition(attention(fused, **attributes)) if b.kind != "bias"]
    parts = [b.numel // 16 for b in blocks if "/" in b.name]
    assert parts == rows
    assert sum(b.numel for b in blocks) == 16 * fused


def test_older_litgpt_orders_its_rows_by_group():
    """``attn.attn``, before 0.5: the queries of a key, the key, the value, then the next."""
    model = nn.ModuleDict({"attn": nn.Module()})
    model.attn.n_head, model.attn.n_query_groups = 4, 2
    model.attn.attn = nn.Linear(8, (4 + 2 * 2) * 3, bias=False)
    rows = {b.name.rpartition("/")[2]: b.pieces[0].index for b in partition(model)}
    assert rows == {
        "query": (*range(6), *range(12, 18)),
        "key": (*range(6, 9), *range(18, 21)),
        "value": (*range(9, 12), *range(21, 24)),
    }


@pytest.mark.parametrize("embedded", [30, 31, None])
def test_a_head_that_is_stored_the_other_way_round_is_cut_by_token_or_whole(embedded):
    """Its class does not tell which axis counts the tokens; the number of embedded ones does."""
    model = nn.Module()
    if embedded:
        model.wte = nn.Embedding(embedded, 8)
    model.lm_head = nn.Parameter(torch.zeros(8, 30))
    blocks = [b for b in partition(model, "neuron") if b.name.startswith("lm_head")]
    if embedded == 30:
        assert [(b.numel, b.pieces[0].axis) for b in blocks] == [(8, 1)] * 30
    else:
        (block,) = blocks
        assert block.note == "which axis counts the tokens is not known"
    del model.lm_head
    model.lm_head = nn.Linear(8, 40)
    assert len(partition(model, "neuron", include="lm_head.weight/token_*")) == 40


def test_a_shared_key_is_one_head():
    model = attention(num_heads=4, head_dim=8, k_proj=nn.Linear(16, 8), q_proj=nn.Linear(16, 32))
    names = [b.name for b in partition(model, by="head") if b.kind == "key"]
    assert names in (["attn.k_proj.weight"], ["attn.k_proj.weight/head_0"])


LAYERS = {
    "transformer.attentions.3.q_lin.weight": "transformer.attentions.3",
    "decoder.decoder_layers.1.mlp.fc1.weight": "decoder.decoder_layers.1",  # ViT-MAE
    "encoder.self_attends.2.mlp.dense1.weight": "encoder.self_attends.2",  # Perceiver
    "encoder.blocks.1.2.ffn.linear_1.weight": "encoder.blocks.1.2",  # Funnel
    "pvt.encoder.block.1.0.mlp.dense1.weight": "pvt.encoder.block.1.0",
    "blocks.2.7.attn.qkv.weight": "blocks.2.7",  # DINOv2's block_chunks
    "pvt.encoder.patch_embeddings.1.projection.weight": None,
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "encoder.block.0",
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_names(name):
    assert layer_prefix(name) == LAYERS[name]


def test_stages_and_lists_side_by_side_are_no_layers():
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 32}
    with torch.device("meta"):
        xlm = transformers.XLMWithLMHeadModel(transformers.XLMConfig(**sizes))
        swin = transformers.SwinForImageClassification(
            transformers.SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[2, 2], image_size=32)
        )
    layers = {b.layer for b in partition(xlm) if b.layer is not None}
    assert layers == {0, 1}
    assert {b.layer for b in partition(xlm) if ".1.q_lin" in b.name or "ffns.1." in b.name} == {1}
    assert [b.numel > 0 for b in partition(xlm, by="layer") if b.layer is not None] == [True, True]
    swins = {b.layer for b in partition(swin)}
    assert swins == {None, 0, 1, 2}
    assert {b.layer for b in partition(swin) if "downsample" in b.name} == {None}


def test_names_alone_cost_no_pass_and_few_calls(monkeypatch):
    """720 calls of functions a parameter is what it took before models were watched."""
    model = models.tiny_gpt2(layers=12)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient"))
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    _matched.cache_clear()
    sys.setprofile(count)
    try:
        partition(model)
    finally:
        sys.setprofile(None)
    assert calls < 720 * len(list(model.parameters()))
