"""What a block is among others of its kind: encoder and decoder, self- and cross-attention,
adapters and what they adapt.
"""

import models
import problems
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from blockspec import Objective, estimate_spectra, load_spectra, losses, partition
from blockspec.figures import plots
from blockspec.figures.style import looks_of, short_names
from blockspec.integrations.recording import scalars
from blockspec.model.places import Places
from blockspec.runs.report import summary

SMALL = {"d_model": 8, "vocab_size": 11}
LAYERS = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
ATTENTION = ("query", "key", "value", "attention_output")
CROSSED = {f"decoder_cross_{kind}" for kind in ATTENTION}
BOTH = {f"{side}_{kind}" for side in ("encoder", "decoder") for kind in (*ATTENTION, "mlp_in")}


def t5():
    return T5ForConditionalGeneration(
        T5Config(**SMALL, d_ff=16, num_layers=1, num_heads=2, d_kv=4, pad_token_id=0)
    )


def bart():
    return BartForConditionalGeneration(BartConfig(**SMALL, **LAYERS, max_position_embeddings=8))


def whisper():
    settings = SMALL | LAYERS | {"num_mel_bins": 4, "max_source_positions": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(
        WhisperConfig(**settings, **special, max_target_positions=8)
    )


def torch_s_own():
    return torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


@pytest.mark.parametrize("build", [t5, bart, whisper, torch_s_own])
def test_encoder_and_decoder_self_and_cross_attention_are_apart(build):
    model = build()
    blocks = [b for b in partition(model) if b.layer is not None]
    roles = {block.role for block in blocks}
    assert roles >= CROSSED | BOTH
    for block in blocks:
        assert block.role.endswith(block.kind)
        assert ("encoder" in block.name.split(".")) == block.role.startswith("encoder_")
    layers = {block.role.split("_")[0]: set() for block in blocks}
    for block in blocks:
        layers[block.role.split("_")[0]].add(block.layer)
    assert layers["encoder"].isdisjoint(layers["decoder"])
    matrices = [b.name for b in blocks if b.kind in (*ATTENTION, "mlp_in", "mlp_out")]
    short = short_names(matrices).values()
    assert len(set(short)) == len(matrices)
    assert {"decoder.layers0.cross_query", "decoder.block0.cross_query"} & set(short)
    assert all(len(s) < 32 for s in short)
    whole = {b.role for b in partition(model, "layer") if b.kind == "layer"}
    assert whole == {"encoder_layer", "decoder_layer"}


def test_a_model_of_one_side_has_nothing_to_tell_apart():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    bert = BertLMHeadModel(BertConfig(**size, intermediate_size=16))
    for model in (bert, models.tiny_gpt2(layers=1), problems.nanogpt().model):
        assert all(block.role == block.kind for block in partition(model))
    size |= {"is_decoder": True, "add_cross_attention": True}
    roles = {b.role for b in partition(BertLMHeadModel(BertConfig(**size, intermediate_size=16)))}
    assert {"query", "cross_query", "cross_attention_output"} <= roles
    size = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11, "n_positions": 8}
    crossed = GPT2LMHeadModel(GPT2Config(**size, add_cross_attention=True))
    assert {"query", "key", "cross_query", "cross_key", "cross_value"} <= {
        block.role for block in partition(crossed)
    }
    assert (
        Places.of(["bert.encoder.layer.0", None]).role("cls.predictions.decoder", "head", "")
        == "head"
    )


def test_figures_logs_and_tables_go_by_role(tmp_path):
    model = bart().double()
    tokens = torch.arange(6)[None]
    batch = {"input_ids": tokens, "labels": tokens}
    objective = Objective(model, [batch], losses.sequence_to_sequence)
    blocks = partition(model, include=["*layers.0.*_proj.weight", "*fc1.weight"])
    spectra = estimate_spectra(objective, blocks, num_probes=1, num_steps=2)
    logged = scalars(spectra, None)
    for role in (*CROSSED, *BOTH):
        assert f"spectrum/largest/{role}" in logged
        assert role in summary(spectra).index
    of_role = [s.trace.value for s in spectra.values() if s.block.role == "decoder_cross_key"]
    assert logged["spectrum/trace/decoder_cross_key"] == pytest.approx(sum(of_role))
    spectra.save(tmp_path / "spectra.parquet")
    loaded = load_spectra(tmp_path / "spectra.parquet")
    assert [s.block.role for s in loaded.values()] == [block.role for block in blocks]
    titles = {axes.get_title() for axes in plots.esd_by_block(spectra).axes}
    assert {"query", "cross query", "cross attention out"} <= titles
    figure = plots.trace_by_kind_over_training(spectra.to_frame(step=0))
    drawn = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"encoder query", "decoder query", "decoder cross query", "encoder MLP in"} <= drawn
    assert list(looks_of(["decoder_query", "mlp_in", "query"])) == [
        "query",
        "decoder_query",
        "mlp_in",
    ]


def llama():
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 13}
    return LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    ).double()


PEFT = {
    "LoraConfig": {"target_modules": ["q_proj", "down_proj"]},
    "IA3Config": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"target_modules": ["q_proj", "down_proj"]},
    "OFTConfig": {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 2, "r": 0},
    "AdaLoraConfig": {"target_modules": ["q_proj", "down_proj"], "total_step": 9},
}


@pytest.mark.parametrize("config", PEFT)
def test_adapters_are_whole_and_say_what_they_adapt(config):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), getattr(peft, config)(**PEFT[config]))
    batch = {"input_ids": torch.arange(6)[None]}
    for by in ("matrix", "head", "neuron"):
        for example in (None, batch):
            blocks = partition(model, by, example=example)
            assert {block.kind for block in blocks} == {"adapter"}
            assert {block.role for block in blocks} == {"query_adapter", "mlp_out_adapter"}
            assert [block.name for block in blocks] == [
                name for name, p in model.named_parameters() if p.requires_grad
            ]
    assert len(set(short_names([block.name for block in blocks]).values())) == len(blocks)
    objective = Objective(model, [batch], losses.next_token)
    logged = scalars(estimate_spectra(objective, blocks, num_probes=1, num_steps=2), None)
    assert {"spectrum/largest/query_adapter", "spectrum/largest/mlp_out_adapter"} <= set(logged)


def mae():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 8, "patch_size": 2}
    decoder = {"decoder_hidden_size": 24, "decoder_intermediate_size": 32}
    heads = {"num_attention_heads": 2, "decoder_num_attention_heads": 4}
    layers = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    return ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, **heads, **layers))


def test_the_decoder_of_vit_mae_has_heads_and_a_place_of_its_own():
    """Its width and number of heads are others than the encoder's, and it puts its tokens in
    another order, which is no choice of experts.
    """
    model, pixels = mae(), {"pixel_values": torch.randn(1, 3, 8, 8)}
    for example in (None, pixels):
        blocks = partition(model, "head", example=example)
        cut = {
            role: [b for b in blocks if b.role == role]
            for role in ("query", "key", "decoder_query", "decoder_key")
        }
        assert [[b.numel for b in some] for some in cut.values()] == [
            *[[128] * 2] * 2,
            *[[144] * 4] * 2,
        ]
        assert {b.layer for some in list(cut.values())[2:] for b in some} == {1}
        kinds = {b.name: (b.kind, b.note) for b in blocks}
        assert kinds["decoder.decoder_embed.weight"] == ("embedding", "")
        assert kinds["decoder.decoder_pred.weight"] == ("head", "")
