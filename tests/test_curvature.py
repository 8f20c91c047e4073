"""Products and spectra of blocks against dense matrices that were built another way."""

import copy

import dense_truth
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from models import tiny_gpt2
from problems import PROBLEMS, Problem, gpt2, problem, resnet, roughened, tokens, truth
from torch import nn

from blockspec import Objective, draw_probe, estimate_spectra, losses, partition
from blockspec.model.blocks import GRANULARITIES
from blockspec.products.curvature import Products

CURVATURES = ("hessian", "ggn", "fisher")
REQUIRED = ("gpt2", "nanogpt", "llama", "vit", "resnet")


def products(objective, requests, curvature="hessian"):
    """H_bb v for each (b, v), from one pass over the data."""
    return Products(objective, curvature).sweep(requests)


def assert_quadrature_of(matrix, block, spectrum, *, noise):
    """Moments of each probe up to 2M - 1 are those of the dense matrix; a block done exactly has
    its eigenvalues.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.numpy(), vectors.numpy()
    scale = np.abs(values).max()
    if scale <= noise:  # softmax does not see a key's bias: its block is zero up to rounding
        assert spectrum.norm <= noise, block.name
        return
    if spectrum.exact:
        np.testing.assert_allclose(
            spectrum.nodes[0, : block.numel], values, rtol=0, atol=1e-9 * scale
        )
        return
    for k in range(spectrum.num_probes):
        start = draw_probe(block.name, block.numel, probe=k).double().numpy()
        shares = (vectors.T @ start) ** 2 / (start @ start)
        for power in range(2 * int(spectrum.steps[k])):
            moment = (spectrum.weights[k] * spectrum.nodes[k] ** power).sum()
            size = (shares * np.abs(values) ** power).sum()
            assert abs(moment - (shares * values**power).sum()) <= 1e-9 * size, (
                block.name,
                k,
                power,
            )


def check_against(matrix, it, blocks, **settings):
    spectra = estimate_spectra(it.objective(), blocks, num_probes=2, num_steps=3, **settings)
    assert list(spectra) == [block.name for block in blocks]
    for block in blocks:
        index = dense_truth.positions(it.model, block)
        noise = 1e-14 * float(matrix.abs().max())
        assert_quadrature_of(matrix[index][:, index], block, spectra[block.name], noise=noise)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_oracle_is_symmetric_and_agrees_with_finite_differences(name):
    it, matrix = problem(name), truth(name)
    vector = torch.randn(
        len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    product = dense_truth.finite_difference_product(it.model, it.batches, it.terms, vector)
    torch.testing.assert_close(
        matrix @ vector, product, rtol=0, atol=1e-6 * float(product.abs().max())
    )
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12 * float(matrix.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_blocks_of_the_hessian_are_those_of_the_dense_one(name, by):
    check_against(truth(name), problem(name), partition(problem(name).model, by))


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("name", REQUIRED)
def test_blocks_of_gauss_newton_and_fisher_are_those_of_the_dense_ones(name, curvature):
    model = problem(name).model
    blocks = [*partition(model, "head"), *partition(model, "model")]
    check_against(truth(name, curvature), problem(name), blocks, curvature=curvature)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("by", GRANULARITIES)
def test_every_partition_of_gauss_newton_and_fisher(by, curvature):
    check_against(
        truth("gpt2", curvature),
        problem("gpt2"),
        partition(problem("gpt2").model, by),
        curvature=curvature,
    )


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_all_eigenvalues_of_small_blocks(name, curvature):
    it = problem(name)
    blocks = [block for block in partition(it.model, "matrix") if block.numel <= 32]
    spectra = estimate_spectra(
        it.objective(), blocks, num_probes=1, num_steps=32, curvature=curvature
    )
    for block in blocks:
        spectrum = spectra[block.name]
        matrix = truth(name, curvature)
        values = dense_truth.eigenvalues(matrix, dense_truth.positions(it.model, block)).numpy()
        tolerance = 1e-10 * np.abs(values).max() + 1e-15 * float(matrix.abs().max())
        assert spectrum.exact
        np.testing.assert_allclose(spectrum.nodes[0, : block.numel], values, rtol=0, atol=tolerance)
        np.testing.assert_allclose(spectrum.weights[0, : block.numel], 1 / block.numel)
        assert spectrum.trace.value == pytest.approx(values.sum(), abs=tolerance * block.numel)
        assert spectrum.trace.stderr == 0


def test_positions_cover_the_query_columns_of_a_conv1d():
    """The oracle's own reading of a piece, so that it cannot go wrong together with the
    engine's.
    """
    model = problem("gpt2").model
    block = {b.name: b for b in partition(model)}["transformer.h.0.attn.c_attn.weight/query"]
    _, flat = dense_truth.flat_parameters(model)
    weight = model.transformer.h[0].attn.c_attn.weight.detach()
    assert torch.equal(flat[dense_truth.positions(model, block)], weight[:, :8].reshape(-1))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", REQUIRED)
def test_products_are_symmetric(name, curvature):
    it = problem(name)
    for block in (*partition(it.model, "model"), *partition(it.model, "matrix")[:6]):
        u, v = torch.randn(
            2, block.numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        hu, hv = products(it.objective(), [(block, u), (block, v)], curvature)
        assert abs(u @ hv - v @ hu) <= 1e-12 * u.norm() * hv.norm()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_all_blocks_and_probes_at_once_are_as_one_by_one(curvature):
    it = problem("gpt2")
    blocks = [*partition(it.model, "head", include="*h.0.*"), *partition(it.model, "model")]
    generator = torch.Generator().manual_seed(2)
    requests = [
        (b, torch.randn(b.numel, generator=generator, dtype=torch.float64))
        for b in blocks
        for _ in range(3)
    ]
    together = products(it.objective(), requests, curvature)
    for request, product in zip(requests, together, strict=True):
        (alone,) = products(it.objective(), [request], curvature)
        torch.testing.assert_close(product, alone, rtol=0, atol=1e-13 * float(alone.abs().max()))


def test_products_with_one_block_are_the_rows_and_columns_of_the_dense_matrix():
    it, matrix = problem("nanogpt"), truth("nanogpt")
    for block in partition(it.model, "head"):
        index = dense_truth.positions(it.model, block)
        v = torch.randn(
            block.numel, generator=torch.Generator().manual_seed(3), dtype=torch.float64
        )
        (product,) = products(it.objective(), [(block, v)])
        expected = matrix[index][:, index] @ v
        torch.testing.assert_close(
            product, expected, rtol=0, atol=1e-12 * float(expected.abs().max()) + 1e-16
        )


@pytest.mark.parametrize("curvature", CURVATURES)
def test_regression_is_a_mean_of_squared_errors_summed_over_outputs(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    terms = lambda call, b: (call(b[0]) - b[1]).square().sum(1)  # noqa: E731
    if curvature == "hessian":
        matrix = dense_truth.dense_hessian(model, [(x, y)], terms)
    elif curvature == "fisher":
        matrix = dense_truth.dense_fisher(model, [(x, y)], terms)
    else:
        outputs = dense_truth.jacobian(model, [(x, y)], lambda call, b: call(b[0]))  # (5, 2, P)
        matrix = 2 * torch.einsum("ncp,ncq->pq", outputs, outputs) / 5
    (block,) = partition(model, "model")
    objective = Objective(model, [(x[:2], y[:2]), (x[2:], y[2:])], losses.regression)
    spectra = estimate_spectra(
        objective, block, num_probes=1, num_steps=block.numel, curvature=curvature
    )
    values = dense_truth.eigenvalues(matrix).numpy()
    np.testing.assert_allclose(spectra["model"].nodes[0], values, rtol=0, atol=1e-12 * values.max())


@pytest.mark.parametrize("curvature", CURVATURES)
def test_gauss_newton_and_fisher_have_no_negative_eigenvalues_and_the_hessian_has(curvature):
    it = problem("gpt2")
    spectra = estimate_spectra(
        it.objective(),
        partition(it.model, "model"),
        num_probes=1,
        num_steps=30,
        curvature=curvature,
    )
    smallest, largest = spectra["model"].smallest.value, spectra["model"].largest.value
    assert (smallest < -1e-3 * largest) == (curvature == "hessian")
    assert smallest >= -1e-9 * largest or curvature == "hessian"


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_parameter_that_the_loss_does_not_depend_on_is_a_block_of_zeros(curvature):
    it = problem("gpt2")
    model = copy.deepcopy(it.model)
    model.unused = nn.Linear(3, 5).double()
    blocks = partition(model, include=["unused.*", "*c_attn.weight/query"])
    objective = Objective(model, it.batches, it.loss)
    spectra = estimate_spectra(objective, blocks, num_probes=2, num_steps=4, curvature=curvature)
    zero = spectra["unused.weight"]
    assert zero.is_zero
    assert not spectra["transformer.h.0.attn.c_attn.weight/query"].is_zero
    assert (zero.largest.value, zero.smallest.value, zero.trace.value) == (0, 0, 0)
    np.testing.assert_allclose(zero.weights.sum(1), 1)


def test_a_block_on_which_the_loss_depends_linearly_has_no_curvature():
    model = nn.Linear(3, 1, bias=False).double()
    loss = losses.Loss(lambda model, batch: model(batch), lambda outputs, batch: outputs[:, 0])
    objective = Objective(model, [torch.ones(2, 3, dtype=torch.float64)], loss)
    for curvature, zero in {"hessian": True, "ggn": True, "fisher": False}.items():
        spectra = estimate_spectra(
            objective, partition(model), num_probes=1, num_steps=2, curvature=curvature
        )
        assert spectra["weight"].is_zero == zero, curvature


def test_a_block_that_is_unused_in_part_is_zero_there():
    it = problem("nanogpt")
    model = copy.deepcopy(it.model)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    rest = [name for name, _ in it.model.named_parameters() if name != "transformer.ln_f.weight"]
    (pair,) = partition(
        model, {"pair": ["unused", "transformer.ln_f.weight"], "rest": rest}, "pair"
    )
    index = dense_truth.positions(
        it.model, partition(it.model, "tensor", "transformer.ln_f.weight")[0]
    )
    v = torch.randn(pair.numel, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (product,) = products(Objective(model, it.batches, it.loss), [(pair, v)])
    unused = dense_truth.positions(model, pair) < 3
    assert torch.equal(product[unused], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(product[~unused], truth("nanogpt")[index][:, index] @ v[~unused])


def test_scalar_parameters_and_parameters_of_other_dtypes():
    """A temperature, as CLIP has one, and a head that was left in float32."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 3)
            self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)).float()).double() * self.temperature

    torch.manual_seed(0)
    model = Model()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3
    objective = Objective(model, [(x, y)], losses.classification)
    blocks = [*partition(model), *partition(model, "model")]
    spectra = estimate_spectra(objective, blocks, num_probes=1, num_steps=40)
    exact = copy.deepcopy(model).double()
    exact.forward = lambda x: exact.head(torch.tanh(exact.body(x))) * exact.temperature
    matrix = dense_truth.dense_hessian(
        exact, [(x, y)], lambda call, b: F.cross_entropy(call(b[0]), b[1], reduction="none")
    )
    for block in blocks:
        values = dense_truth.eigenvalues(matrix, dense_truth.positions(exact, block)).numpy()
        tolerance = 1e-6 * float(matrix.abs().max())
        np.testing.assert_allclose(
            spectra[block.name].nodes[0, : block.numel], values, rtol=0, atol=tolerance
        )
    assert spectra["temperature"].block.numel == 1
    assert spectra["model"].dtype == "float64"


def test_tied_weights_are_one_block_with_the_curvature_of_both_uses():
    it = problem("gpt2")
    (embedding,) = partition(it.model, include="*wte*")
    check_against(truth("gpt2"), it, [embedding])
    assert not [b for b in partition(it.model) if "lm_head" in b.name]


def test_a_frozen_parameter_is_left_out_and_changes_no_other_block():
    it = gpt2()
    (query,) = partition(it.model, include="*h.0*weight/query")
    before = estimate_spectra(it.objective(), query, num_probes=1, num_steps=4)[query.name]
    it.model.transformer.wte.weight.requires_grad_(False)
    it.model.transformer.h[0].attn.c_proj.weight.requires_grad_(False)
    assert not [
        b for b in partition(it.model) if "wte" in b.name or b.name.endswith("0.attn.c_proj.weight")
    ]
    after = estimate_spectra(it.objective(), query, num_probes=1, num_steps=4)[query.name]
    np.testing.assert_allclose(after.nodes, before.nodes, rtol=1e-12)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_training_mode_is_differentiated_through_and_its_statistics_are_untouched(
    training, curvature
):
    it = resnet()
    with torch.no_grad():
        for name, buffer in it.model.named_buffers():
            if "running" in name:
                buffer.add_(0.3)
    batch_statistics = copy.deepcopy(it.model)
    for module in batch_statistics.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # then even eval mode uses the statistics of the batch
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    if curvature == "hessian":
        matrix = dense_truth.dense_hessian(batch_statistics, it.batches, it.terms)
    elif curvature == "fisher":
        matrix = dense_truth.dense_fisher(batch_statistics, it.batches, it.terms)
    else:
        matrix = dense_truth.dense_ggn_of_cross_entropy(batch_statistics, it.batches, it.logits)
    before = {name: buffer.clone() for name, buffer in it.model.named_buffers()}
    it.model.train(training)
    blocks = partition(it.model, "layer")
    spectra = estimate_spectra(
        it.objective(batch_norm="train"), blocks, num_probes=2, num_steps=4, curvature=curvature
    )
    for block in blocks:
        index = dense_truth.positions(it.model, block)
        noise = 1e-14 * float(matrix.abs().max())
        assert_quadrature_of(matrix[index][:, index], block, spectra[block.name], noise=noise)
    assert all(torch.equal(buffer, before[name]) for name, buffer in it.model.named_buffers())
    assert all(module.training == training for module in it.model.modules())
    assert all(
        m.track_running_stats and m.running_mean is not None
        for m in it.model.modules()
        if isinstance(m, nn.BatchNorm2d)
    )
    assert set(dict(it.model.named_buffers())) == set(before)


def test_batch_norm_matters():
    """The two modes differ by far more than the tolerance: the test above could fail."""
    it = resnet()
    block = partition(it.model, "model")
    largest = [
        estimate_spectra(it.objective(batch_norm=mode), block, num_probes=1, num_steps=10)[
            "model"
        ].largest.value
        for mode in ("eval", "train")
    ]
    assert abs(largest[0] - largest[1]) > 0.01 * largest[0]


def test_a_loss_of_ones_own_gives_its_own_curvature():
    it = problem("gpt2")
    smoothed = losses.Loss(
        lambda model, batch: model(input_ids=batch["input_ids"]).logits[:, :-1],
        lambda logits, batch: F.cross_entropy(
            logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none", label_smoothing=0.3
        ).reshape(-1),
    )

    def terms(call, batch):
        logits = call(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        target = F.one_hot(batch["input_ids"][:, 1:], 12).double() * 0.7 + 0.3 / 12
        return -(logits * target).sum(-1).reshape(-1)

    batches = [{"input_ids": tokens(2, 6)}]
    own = Problem(it.model, batches, smoothed, it.logits, it.labels)
    check_against(
        dense_truth.dense_hessian(it.model, batches, terms),
        own,
        partition(it.model, "matrix", "*h.0*"),
    )


def test_the_hessian_needs_only_a_function_that_gives_sum_and_count():
    it = problem("nanogpt")

    def loss(model, batch):
        terms = it.terms(model, batch)
        return terms.sum(), len(terms)

    blocks = partition(it.model, "layer")
    given = estimate_spectra(
        Objective(it.model, it.batches, loss), blocks, num_probes=1, num_steps=4
    )
    ours = estimate_spectra(it.objective(), blocks, num_probes=1, num_steps=4)
    for name in ours:
        np.testing.assert_allclose(given[name].nodes, ours[name].nodes, rtol=1e-9)


def test_attention_block_of_a_multihead_encoder():
    """torch's own transformer layer takes a fused path in eval mode; its curvature is that of the
    plain one.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3, dtype=torch.float64))
    roughened(model)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    it = Problem(
        model,
        [(x, torch.tensor([0, 2]))],
        losses.classification,
        lambda call, b: call(b[0]),
        lambda b: b[1],
    )
    check_against(dense_truth.dense_hessian(model, it.batches, it.terms), it, partition(model))


@pytest.mark.parametrize("graphs", [0, 1, 2])
def test_graphs_are_kept_where_they_may_be(graphs):
    """Shared passes are made once for two batches where two graphs may be kept; the numbers are the
    same.
    """
    model = tiny_gpt2()
    tokens = torch.randint(
        model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0)
    )
    objective = Objective(model, [{"input_ids": row[None]} for row in tokens], losses.next_token)
    first, second, third = partition(model, include=["*c_fc.weight", "*ln_f.weight"])
    products = Products(objective, graphs=graphs)
    vectors = {
        block: torch.randn(block.numel, dtype=torch.float64) for block in (first, second, third)
    }
    expected = Products(objective, graphs=0).sweep(list(vectors.items()))
    for chosen in ((first, second), (first,), (second,), (first, third), (third,)):
        ours = products.sweep([(block, vectors[block]) for block in chosen])
        for block, product in zip(chosen, ours, strict=True):
            torch.testing.assert_close(
                product, expected[list(vectors).index(block)], rtol=1e-12, atol=0
            )
    assert (
        products.gradients == {0: 10, 1: 10, 2: 4}[graphs]
    )  # the third block's gradient is not in the first graphs


def test_a_kept_graph_is_not_used_with_other_weights():
    model = tiny_gpt2()
    objective = Objective(
        model, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], losses.next_token
    )
    (block,) = partition(model, include="*h.0.mlp.c_fc.weight")
    products = Products(objective)
    vector = torch.ones(block.numel, dtype=torch.float64)
    products.sweep([(block, vector)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        products.sweep([(block, vector)])


def test_a_model_that_accelerate_has_spread():
    """With the hooks of a ``device_map`` on every module; one device stands for several."""
    tokens = torch.randint(10, (2, 6), generator=torch.Generator().manual_seed(0))

    def spectra(model):
        blocks = [
            *partition(model, include=["*c_fc.weight", "*wte.weight"]),
            *partition(model, "model"),
        ]
        return estimate_spectra(
            Objective(model, [{"input_ids": tokens}], losses.next_token), blocks, 1, 5
        )

    expected = spectra(tiny_gpt2())
    model = tiny_gpt2()
    places = {
        name: "cpu"
        for name in (
            "transformer.wte",
            "transformer.wpe",
            "transformer.h",
            "transformer.ln_f",
            "lm_head",
        )
    }
    model = dispatch_model(
        model, places | {"transformer.drop": "cpu"}, main_device="cpu", force_hooks=True
    )
    assert hasattr(model.transformer.ln_f, "_hf_hook")
    for name, spectrum in spectra(model).items():
        np.testing.assert_allclose(spectrum.nodes, expected[name].nodes, rtol=1e-9)
