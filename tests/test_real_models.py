"""Losses and memories of models as transformers has them, tiny: the numbers are the models' own,
and what cannot be measured is named.
"""

import itertools

import dense_truth
import pytest
import torch
import transformers as hf

from blockspec import Objective, estimate_spectra, losses, partition
from blockspec.products.curvature import Products

HIDDEN = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = HIDDEN | {"intermediate_size": 16, "vocab_size": 20, "max_position_embeddings": 16}
PICTURE = HIDDEN | {"intermediate_size": 16, "image_size": 8, "patch_size": 4}


def made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double().eval()


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def products_are_those_of(objective, terms, block):
    """The largest eigenvalue against the dense Hessian of the model's own loss."""
    found = estimate_spectra(objective, block, num_probes=1, num_steps=block.numel)
    index = dense_truth.positions(objective.model, block)
    exact = dense_truth.largest_eigenvalue(
        objective.model, list(objective.whole_batches()), terms, index
    )
    assert found[block.name].largest.value == pytest.approx(exact, rel=1e-5)


def test_ctc_of_wav2vec2():
    convolutions = {"conv_dim": (6, 6), "conv_kernel": (8, 3), "conv_stride": (4, 2)}
    convolutions |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes = HIDDEN | {"intermediate_size": 16, "vocab_size": 7, "num_feat_extract_layers": 2}
    model = made(
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                **sizes, **convolutions, feat_extract_norm="layer", ctc_loss_reduction="sum"
            )
        )
    )
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, 120:] = 0
    labels = torch.tensor([[1, 2, 3], [4, 4, -100]])
    batch = {"input_values": numbers(2, 200), "labels": labels, "attention_mask": mask}
    total, count = losses.ctc()(model, batch)
    assert count == 2
    torch.testing.assert_close(total, model(**batch).loss.double(), rtol=1e-5, atol=0)
    objective = Objective(model, [batch], losses.ctc())
    spectrum = estimate_spectra(objective, objective.partition(include="lm_head.weight"), 1, 64)
    assert spectrum["lm_head.weight"].exact
    assert objective.partition(include="lm_head.weight")[0].kind == "head"


def by_every_path(model, frames):
    """Terms of CTC by its definition: the probabilities of all paths that collapse to the labels,
    added up; ``frames`` says how many each recording has.
    """

    def collapsed(path):
        return tuple(c for c, before in zip(path, (None, *path), strict=False) if c != before if c)

    def terms(call, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        scores = call(**inputs).logits.log_softmax(-1)
        found = []
        for own, count, labels in zip(scores, frames, batch["labels"].tolist(), strict=True):
            wanted = tuple(label for label in labels if label >= 0)
            every = itertools.product(range(scores.shape[-1]), repeat=count)
            paths = torch.tensor([path for path in every if collapsed(path) == wanted])
            along = own[:count].gather(1, paths.T).sum(0)
            found.append(-along.logsumexp(0))
        return torch.stack(found)

    return terms


def test_products_of_ctc_are_those_of_its_definition():
    """Every block of the model, weight norms and convolutions too, by differences of gradients of
    another loss function.
    """
    convolutions = {"conv_dim": (4, 4), "conv_kernel": (8, 3), "conv_stride": (4, 2)}
    convolutions |= {"num_conv_pos_embeddings": 3, "num_conv_pos_embedding_groups": 2}
    sizes = HIDDEN | {"intermediate_size": 8, "vocab_size": 4, "num_feat_extract_layers": 2}
    config = hf.Wav2Vec2Config(**sizes, **convolutions, feat_extract_norm="layer")
    model = made(lambda: hf.Wav2Vec2ForCTC(config))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 40:] = 0
    labels = torch.tensor([[1, 1, 3], [2, 3, -100]])
    batch = {"input_values": numbers(2, 60), "labels": labels, "attention_mask": mask}
    frames = model._get_feat_extract_output_lengths(mask.sum(1)).tolist()
    assert frames == [6, 4]
    terms = by_every_path(model, frames)
    torch.testing.assert_close(losses.ctc()(model, batch)[0], terms(model, batch).sum())
    objective = Objective(model, [batch], losses.ctc())
    blocks = objective.partition()
    assert {"conv", "query", "mlp_in", "norm", "head"} <= {block.kind for block in blocks}
    requests = [(block, numbers(block.numel, seed=i)) for i, block in enumerate(blocks)]
    products = Products(objective).sweep(requests)
    size = len(dense_truth.flat_parameters(model)[1])
    for (block, vector), product in zip(requests, products, strict=True):
        at = dense_truth.positions(model, block)
        whole = torch.zeros(size, dtype=torch.float64).index_put((at,), vector)
        truth = dense_truth.finite_difference_product(model, [batch], terms, whole)[at]
        error = float((product - truth).norm() / truth.norm().clamp(min=1e-6))
        assert error < 1e-5, (block.name, error)


@pytest.mark.parametrize(
    ("model", "config", "loss"),
    [
        (hf.CLIPModel, hf.CLIPConfig, losses.contrastive),
        (hf.SiglipModel, hf.SiglipConfig, losses.sigmoid_contrastive),
    ],
    ids=["CLIP", "SigLIP"],
)
def test_contrasts_of_pictures_and_texts(model, config, loss):
    settings = {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": PICTURE}
    model = made(lambda: model(config(**settings, projection_dim=6)))
    ids = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "pixel_values": numbers(3, 3, 8, 8)}
    total, count = loss(model, batch)
    assert count == 3
    torch.testing.assert_close(total / count, model(**batch, return_loss=True).loss)
    (block,) = partition(model, include="text_model*q_proj.weight")

    def terms(model, batch):
        return model(**batch, return_loss=True).loss.reshape(1)

    products_are_those_of(Objective(model, [batch], loss), terms, block)


def llava():
    text = TEXT | {"model_type": "llama", "num_key_value_heads": 2}
    picture = PICTURE | {"model_type": "clip_vision_model", "projection_dim": 8}
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=text, vision_config=picture, image_token_index=19, vision_feature_layer=-1
        )
    )


@pytest.mark.parametrize("labelled", [False, True])
def test_placeholders_of_pictures_are_no_text(labelled):
    model = made(llava)
    ids = torch.tensor([[3, 19, 19, 19, 19, 4, 5, 6]])
    batch = {"input_ids": ids, "pixel_values": numbers(1, 3, 8, 8)}
    batch |= {"labels": ids} if labelled else {}
    text = ids.masked_fill(ids == 19, -100)
    expected = model(**(batch | {"labels": text})).loss.detach().double()
    total, count = losses.next_token(model, batch)
    assert count == 3
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=0)
    objective = Objective(model, [batch], losses.next_token)
    assert objective.value() == pytest.approx(float(expected), rel=1e-5)
    blocks = partition(model, include="*language_model*mlp.down_proj.weight")
    one, other = (
        estimate_spectra(Objective(model, [given], losses.next_token), blocks, 1, 4)
        for given in (batch, batch | {"labels": text})
    )
    for name, spectrum in one.items():
        torch.testing.assert_close(spectrum.nodes, other[name].nodes)


def levit():
    sizes = {"image_size": 32, "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
    sizes |= {"depths": [1, 1], "key_dim": [8, 8], "mlp_ratio": [2, 2], "attention_ratio": [2, 2]}
    return hf.LevitForImageClassification(
        hf.LevitConfig(
            **sizes, down_ops=[["Subsample", 8, 2, 4, 2, 2], [""]], patch_size=16, num_labels=3
        )
    )


def rwkv():
    sizes = {"vocab_size": 20, "hidden_size": 8, "attention_hidden_size": 8}
    return hf.RwkvForCausalLM(
        hf.RwkvConfig(**sizes, num_hidden_layers=2, intermediate_size=16, context_length=16)
    )


MEMORIES = {  # model, batch, loss, a block that the memory is made from
    "LeViT's biases": (
        levit, (numbers(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])), losses.classification,
        "*stages.0.layers.2.attention_biases",
    ),
    "RWKV's states": (
        rwkv, {"input_ids": torch.arange(6)[None]}, losses.next_token,
        "*blocks.0.attention.key.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORIES)
def test_memories_of_models_are_no_part_of_the_objective(name):
    """Right after the model was used in eval mode, and again after a step of an optimizer."""
    build, batch, loss, pattern = MEMORIES[name]
    model = made(build)
    with torch.no_grad():
        loss(model, batch)  # fills the memory
    objective = Objective(model, [batch], loss)
    (block,) = partition(model, include=pattern)
    values = []
    for _ in range(2):
        fresh = made(build)
        fresh.load_state_dict(model.state_dict())
        fresh.train(), fresh.eval()
        spectra = [
            estimate_spectra(o, block, 1, 6)[block.name]
            for o in (objective, Objective(fresh, [batch], loss))
        ]
        torch.testing.assert_close(spectra[0].nodes, spectra[1].nodes)
        assert spectra[0].norm > 0
        values.append(spectra[0].norm)
        with torch.no_grad():  # an optimizer's step; the memory is older now
            for parameter in model.parameters():
                parameter.mul_(1.3)
    assert values[0] != pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("pattern", ["*self_attention.query.weight", "*word_embeddings*"])
def test_reformer_is_refused_by_name(pattern):
    """Its layers compute themselves anew in a backward pass of their own: a query's curvature came
    out as zero.
    """
    chunks = {"attn_layers": ["local"], "local_attn_chunk_length": 3, "is_decoder": True}
    axes = {"axial_pos_shape": (2, 3), "axial_pos_embds_dim": (4, 4)}
    sizes = {"hidden_size": 8, "feed_forward_size": 16, "attention_head_size": 4, "vocab_size": 20}
    model = made(
        lambda: hf.ReformerModelWithLMHead(
            hf.ReformerConfig(
                **sizes, **axes, **chunks, num_attention_heads=2, max_position_embeddings=6
            )
        )
    )
    objective = Objective(model, [{"input_ids": torch.arange(6)[None]}], losses.next_token)
    with pytest.raises(ValueError, match=r"Reformer|reversible layers"):
        estimate_spectra(objective, partition(model, include=pattern), 1, 4)
