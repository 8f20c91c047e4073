"""A user's own matrix works wherever a named one does, and guards stand before every caller."""

import numpy as np
import pytest
import torch
from models import tiny_gpt2

import blockspec
from blockspec import FunctionOperator, Operator
from blockspec.model.blocks import Piece

SIZE = 60


@pytest.fixture
def matrix():
    root = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root @ root.T / SIZE + torch.diag(torch.linspace(-1, 4, SIZE, dtype=torch.float64))


@pytest.fixture
def operator(matrix):
    return FunctionOperator(lambda v: matrix @ v, SIZE)


class Own:
    """An operator of a user's, who has read the protocol and nothing else."""

    def __init__(self, matrix):
        self.matrix, self.checked = matrix, 0
        self.curvature, self.objective = "mine", None
        self.gradients = self.products = 0
        self.ranks = blockspec.numerics.ranks.Ranks()
        self.device = matrix.device
        self.parameters = {"w": torch.zeros(len(matrix), dtype=matrix.dtype)}

    def check(self, blocks):
        self.checked += 1

    def sweep(self, requests):
        return [self.columns([request], [request[0]])[0][0] for request in requests]

    def columns(self, requests, targets):
        found = []
        for block, vector in requests:
            whole = blockspec.model.blocks.scatter(block, vector, self.parameters)["w"]
            product = {"w": self.matrix @ whole}
            found.append([blockspec.model.blocks.gather(target, product) for target in targets])
            self.products += 1
        return found


def test_both_are_operators(matrix, operator):
    assert isinstance(operator, Operator)
    assert isinstance(Own(matrix), Operator)
    assert not isinstance(matrix, Operator)


def test_spectra_of_ones_own_matrix_are_its_eigenvalues(matrix, operator):
    spectrum = blockspec.estimate_spectra(None, operator.block(), 1, SIZE, curvature=operator)[
        "matrix"
    ]
    expected = torch.linalg.eigvalsh(matrix).numpy()
    np.testing.assert_allclose(np.sort(spectrum.nodes[0]), expected, atol=1e-10)
    assert spectrum.curvature == "matrix"


def test_moments_of_a_piece_are_those_of_the_diagonal_block(matrix, operator):
    block = operator.block(10, 50)
    spectrum = blockspec.estimate_spectra(None, block, 2, 12, curvature=operator)[block.name]
    dense = matrix[10:50, 10:50].numpy()
    for probe in range(2):
        v = blockspec.draw_probe(block.name, 40, seed=0, probe=probe).double().numpy()
        v = v / np.linalg.norm(v)
        for k in range(8):
            found = (spectrum.weights[probe] * spectrum.nodes[probe] ** k).sum()
            assert found == pytest.approx(v @ np.linalg.matrix_power(dense, k) @ v, rel=1e-9)


@pytest.mark.parametrize("kind", ["function", "own class"])
def test_the_toolbox_takes_it(matrix, kind):
    function = FunctionOperator(lambda v: matrix @ v, SIZE, name="w")
    operator = function if kind == "function" else Own(matrix)
    blocks = [
        blockspec.Block(f"w/{i}", "other", None, 20, (Piece("w", 0, slice(20 * i, 20 * i + 20)),))
        for i in range(3)
    ]
    whole = blockspec.Block("w", "other", None, SIZE, (Piece("w"),))
    dense = matrix.numpy()
    pairs = blockspec.top_eigenpairs(None, whole, 2, curvature=operator)
    values = np.linalg.eigvalsh(dense)
    top = values[np.argsort(-np.abs(values))[:2]]
    np.testing.assert_allclose(pairs.values, top, rtol=1e-4)
    traces = blockspec.trace(None, blocks, "xtrace", num_probes=20, curvature=operator)
    for i, block in enumerate(blocks):
        part = slice(20 * i, 20 * i + 20)
        assert traces[block.name].value == pytest.approx(np.trace(dense[part, part]), rel=1e-9)
    np.testing.assert_allclose(
        blockspec.dense(None, blocks[0], blocks[1], curvature=operator),
        dense[:20, 20:40],
        atol=1e-12,
    )
    squared = blockspec.squared_norms(None, blocks, num_probes=20, curvature=operator)
    assert squared["w/2"].value == pytest.approx((dense[40:, 40:] ** 2).sum(), rel=1e-9)
    coupling = blockspec.coupling(None, blocks, 400, curvature=operator)
    expected = np.linalg.norm(dense[:20, 40:])
    assert coupling.norms.iloc[0, 2] == pytest.approx(expected, rel=0.1)
    means = blockspec.diagonal(None, blocks, num_probes=400, curvature=operator).means
    assert means["w/0"].value == pytest.approx(np.diag(dense)[:20].mean(), rel=0.1)
    if kind == "own class":
        assert operator.checked == 6


def test_an_operator_that_changes_is_noticed(matrix):
    operator = FunctionOperator(lambda v: matrix @ v * torch.rand(1), SIZE)
    with pytest.raises(ValueError, match="not deterministic"):
        blockspec.trace(None, operator.block(), curvature=operator)


def test_a_function_of_another_shape_is_noticed():
    operator = FunctionOperator(lambda v: v[:-1], SIZE)
    with pytest.raises(ValueError, match=r"shape \(60,\)"):
        blockspec.top_eigenpairs(None, operator.block(), curvature=operator)


@pytest.mark.parametrize(
    ("curvature", "message"),
    [("hessian", "needs an objective"), (3, "or an operator"), (torch.eye(3), "or an operator")],
)
def test_what_is_no_operator_is_refused(operator, curvature, message):
    with pytest.raises(TypeError, match=message):
        blockspec.trace(None, operator.block(), curvature=curvature)


def test_a_misspelt_setting_is_named():
    model = tiny_gpt2()
    with pytest.raises(TypeError, match=r"num_stepz.*did you mean 'num_steps'"):
        blockspec.estimate_spectra(None, blockspec.partition(model), num_stepz=3)


def test_settings_stand_in_the_signature_and_in_the_docstring():
    import inspect

    parameters = inspect.signature(blockspec.estimate_spectra).parameters
    assert list(parameters)[:4] == ["objective", "blocks", "num_probes", "num_steps"]
    assert parameters["num_steps"].default == 40
    assert parameters["tolerance"].kind is inspect.Parameter.KEYWORD_ONLY
    for name in ("tolerance", "curvature", "memory", "state_every"):
        assert f"\n        {name}: " in blockspec.estimate_spectra.__doc__
        assert name in parameters


class _Silent(torch.autograd.Function):
    """Squares, with a backward pass that autograd cannot follow."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.detach() * 2 * ctx.kept).requires_grad_(False)


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return _Silent.apply(self.linear(x))


CALLERS = {
    "estimate_spectra": lambda o, b: blockspec.estimate_spectra(o, b, 1, 2),
    "trace": lambda o, b: blockspec.trace(o, b),
    "dense": lambda o, b: blockspec.dense(o, b[0]),
    "diagonal": lambda o, b: blockspec.diagonal(o, b),
    "coupling": lambda o, b: blockspec.coupling(o, b),
    "squared_norms": lambda o, b: blockspec.squared_norms(o, b),
    "top_eigenpairs": lambda o, b: blockspec.top_eigenpairs(o, b[0]),
    "landscape": lambda o, b: blockspec.landscape(o, b[0], points=3),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_function_without_a_second_derivative_is_found_whoever_calls(caller):
    torch.manual_seed(0)
    model = _Model()
    objective = blockspec.Objective(
        model, [(torch.randn(4, 3), torch.randn(4, 2))], blockspec.losses.regression
    )
    blocks = blockspec.partition(model)
    with pytest.raises(ValueError, match="second derivative"):
        CALLERS[caller](objective, blocks)


@pytest.mark.slow
def test_planning_and_bounding_memory_change_nothing_of_the_objective():
    model = tiny_gpt2()
    tokens = torch.randint(
        model.config.vocab_size, (6, 8), generator=torch.Generator().manual_seed(1)
    )
    objective = blockspec.Objective(
        model, [{"input_ids": tokens}], blockspec.losses.next_token, micro_batch=3
    )
    blocks = blockspec.partition(model, include="*c_fc.weight")
    plan = blockspec.engine.estimate.plan_spectra(objective, blocks, 1, 2, memory="8GiB")
    assert plan.micro_batch is None  # all of them fit
    blockspec.estimate_spectra(objective, blocks, 1, 2, memory="8GiB")
    assert objective.micro_batch == 3
