"""AdaHessian: its steps, its groups and copies, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from descents import WAYS, bowl, descend, diagonal, mlp, squared_error
from launching import run_script
from models import tiny_gpt2 as small_gpt2
from torch import nn

from blockspec.model.blocks import Block, Piece, partition
from blockspec.optim import AdaHessian, keep_freed_memory

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True:UserWarning"
)


DRAWS = np.random.default_rng(0)


SHAPES = {"matrix": (3, 4), "kernel": (2, 3, 2, 2), "vector": (5,)}


SIZE = 12 + 24 + 5


START, CUBIC, LINEAR = (
    DRAWS.uniform(1, 2, SIZE),
    DRAWS.uniform(0.3, 1, SIZE),
    DRAWS.uniform(-6, 1, SIZE),
)


MATRIX, KERNEL, VECTOR = np.arange(12), np.arange(12, 36), np.arange(36, 41)


def reference(
    *,
    steps,
    groups=(),
    lr=0.1,
    betas=(0.9, 0.999),
    eps=1e-4,
    weight_decay=0.0,
    hessian_power=1.0,
    update_each=1,
):
    """AdaHessian on sum(a t^4 / 4 + b t^2 / 2), whose Hessian is diagonal, entry by entry; one
    theta per step.
    """
    theta, m, v, diagonal = START.copy(), np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    trajectory = []
    for t in range(1, steps + 1):
        gradient = CUBIC * theta**3 + LINEAR * theta
        if (t - 1) % update_each == 0:
            diagonal = np.abs(3 * CUBIC * theta**2 + LINEAR)
            for group in groups:
                diagonal[group] = diagonal[group].mean()
        for i in range(SIZE):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * gradient[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * diagonal[i] ** 2
            m_hat, v_hat = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            theta[i] -= lr * (
                m_hat / (np.sqrt(v_hat) ** hessian_power + eps) + weight_decay * theta[i]
            )
        trajectory.append(theta.copy())
    return np.array(trajectory)


def parameters():
    parts = torch.tensor(START).split([int(np.prod(shape)) for shape in SHAPES.values()])
    return {
        n: part.view(s).clone().requires_grad_()
        for (n, s), part in zip(SHAPES.items(), parts, strict=True)
    }


def flat(named):
    return torch.cat([p.reshape(-1) for p in named.values()])


def quartic(named):
    theta = flat(named)
    return (torch.tensor(CUBIC) * theta**4 / 4 + torch.tensor(LINEAR) * theta**2 / 2).sum()


BLOCKS = (
    Block("first", "other", None, 11, (Piece("matrix", 1, slice(0, 2)), Piece("vector"))),
    Block("second", "other", None, 3, (Piece("matrix", 1, (3,)),)),
    Block("third", "other", None, 12, (Piece("kernel", 0, (1,)), Piece("of another optimizer"))),
)


BLOCK_GROUPS = (
    [0, 1, 4, 5, 8, 9, *VECTOR],
    [3, 7, 11],
    KERNEL[12:],
)


OPTIONS = {
    "defaults": {},
    "no memory": {"betas": (0.0, 0.0)},
    "betas": {"betas": (0.5, 0.9)},
    "eps": {"eps": 0.3},
    "decay": {"weight_decay": 0.2},
    "half power": {"hessian_power": 0.5},
    "no power": {"hessian_power": 0.0},
    "delayed": {"update_each": 3, "betas": (0.9, 0.8)},
    "all": {
        "lr": 0.2,
        "betas": (0.5, 0.7),
        "eps": 0.1,
        "weight_decay": 0.1,
        "hessian_power": 0.7,
        "update_each": 2,
    },
}


AVERAGES = {
    "conv": KERNEL.reshape(6, 4),
    "rows": [*MATRIX.reshape(3, 4), *KERNEL.reshape(6, 4)],
    5: [MATRIX[:5], MATRIX[5:10], MATRIX[10:], *KERNEL[:20].reshape(4, 5), KERNEL[20:], VECTOR],
    100: [MATRIX, KERNEL, VECTOR],
    BLOCKS: BLOCK_GROUPS,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trajectory_on_a_diagonal_hessian_is_the_reference(options, way):
    named = parameters()
    optimizer = AdaHessian(named.values(), **{"lr": 0.1, "spatial_averaging": None} | options)
    for theta in reference(steps=8, **options):
        descend(optimizer, quartic(named), way)
        np.testing.assert_allclose(flat(named).detach(), theta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("averaged", AVERAGES, ids=["conv", "rows", "5", "100", "blocks"])
def test_averaged_trajectory_is_the_reference(averaged):
    named = parameters()
    optimizer = AdaHessian(named, lr=0.1, num_probes=2, spatial_averaging=averaged)
    for theta in reference(steps=5, groups=AVERAGES[averaged]):
        descend(optimizer, quartic(named), "backward")
        np.testing.assert_allclose(flat(named).detach(), theta, rtol=0, atol=1e-10)


def test_the_authors_transformer_setting_leaves_vectors_alone():
    named = parameters()
    optimizer = AdaHessian(named, lr=0.1, spatial_averaging=5, average_vectors=False)
    for theta in reference(steps=5, groups=AVERAGES[5][:-1]):
        descend(optimizer, quartic(named), "backward")
        np.testing.assert_allclose(flat(named).detach(), theta, rtol=0, atol=1e-10)


def trained_by_heart(model, seed, settings):
    """The losses of 60 updates on 8 sequences."""
    tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(seed))
    optimizer = AdaHessian(model.named_parameters(), **settings)
    losses = []
    for _ in range(60):
        with optimizer.second_order(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "settings", [{}, {"lr": 0.1, "update_each": 10}], ids=["defaults", "README"]
)
@pytest.mark.parametrize("seed", range(4))
def test_defaults_train_a_small_transformer(seed, settings):
    """Of 8 sequences by heart; a single entry's D, near 0 by chance, made the loss 1e7 to 1e15."""
    with torch.random.fork_rng(devices=[]):  # of the weights, and of dropout
        torch.manual_seed(seed)
        model = small_gpt2(vocab_size=64, n_embd=32, n_head=2, n_positions=16, layers=2).float()
        losses = trained_by_heart(model, seed, settings)
    assert max(losses) < losses[0] + 0.5
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("way", WAYS)
def test_one_step_to_the_minimum_of_a_bowl_unless_it_is_coupled(way):
    for coupling in (0.0, 1.0):
        point = torch.tensor([-2.0, 3.0], dtype=torch.float64, requires_grad=True)
        descend(AdaHessian([point], lr=1.0, betas=(0.0, 0.0), eps=0.0), bowl(point, coupling), way)
        assert (point.detach().abs().max() < 1e-15) == (coupling == 0)


def noisy(point):
    x, y = point
    return x**2 + y**2 + x * y + 0.5 * (torch.sin(5 * point) ** 2).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("betas", "found"), [((0.0, 0.0), False), ((0.9, 0.9), True)])
def test_noisy_function_needs_the_running_means(betas, found, seed):
    point = torch.tensor([-2.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([point], lr=0.5, betas=betas, seed=seed)
    for _ in range(200):
        descend(optimizer, noisy(point), "backward")
    assert (noisy(point).item() < 1e-6) == found


@pytest.mark.parametrize("way", WAYS)
def test_frozen_and_unused_parameters_stay(way):
    model, x, y = mlp()
    model.unused = nn.Linear(2, 2).double()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = AdaHessian(model.parameters(), lr=0.1, weight_decay=0.1, spatial_averaging="rows")
    for _ in range(3):
        descend(optimizer, (model[2](model[1](model[0](x))) - y).square().mean(), way)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"0.weight", "2.weight", "2.bias"}


def test_a_parameter_used_between_measurements_waits_for_the_next_one():
    first, late = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = AdaHessian([first, late], lr=0.1, update_each=2)
    values = []
    for step in range(3):
        descend(
            optimizer,
            (first**4).sum() + (late**4).sum() * (step > 0) if step else (first**4).sum(),
            "backward",
        )
        values.append(late.item())
    assert values[0] == values[1] == 1.0
    assert values[2] < 1.0


def test_backward_fills_the_gradients_of_other_optimizers_too():
    gradients = []
    for update_each in (1, 2):
        model, x, y = mlp()
        optimizer = AdaHessian(model[0].parameters(), lr=0.0, update_each=update_each)
        for _ in range(2):
            descend(optimizer, squared_error(model, x, y), "backward")
        model[2].zero_grad()
        optimizer.backward(squared_error(model, x, y))
        gradients.append([p.grad for p in model[2].parameters()])
        assert not any(g.requires_grad for g in gradients[-1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_groups_and_schedulers_set_the_learning_rate():
    named = parameters()
    groups = [
        {"params": [named["matrix"]], "lr": 0.05, "weight_decay": 0.3},
        {"params": [named["kernel"], named["vector"]], "betas": (0.5, 0.5), "hessian_power": 0.5},
    ]
    optimizer = AdaHessian(groups, lr=0.1, spatial_averaging=None)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2], gamma=0.0)
    for _ in range(4):
        descend(optimizer, quartic(named), "backward")
        scheduler.step()
    other = {"betas": (0.5, 0.5), "hessian_power": 0.5}
    expected = np.where(
        np.arange(SIZE) < 12,
        reference(steps=2, lr=0.05, weight_decay=0.3)[-1],
        reference(steps=2, lr=0.1, **other)[-1],
    )
    np.testing.assert_allclose(flat(named).detach(), expected, rtol=0, atol=1e-10)


def test_add_param_group_names_and_mapping():
    named = parameters()
    optimizer = AdaHessian([("matrix", named["matrix"])], lr=0.1, spatial_averaging=BLOCKS[:1])
    descend(optimizer, quartic(named), "backward")
    optimizer.add_param_group({"params": [("vector", named["vector"])]})
    descend(optimizer, quartic(named), "backward")
    matrix, vector = (diagonal(optimizer, named[name]) for name in ("matrix", "vector"))
    assert torch.equal(vector, matrix[0, 0].expand(5))
    assert [group["num_steps"] for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_run_is_bit_equal(tmp_path, stop):
    def prepared(seed):
        model, x, y = mlp()
        optimizer = AdaHessian(
            model.named_parameters(), lr=0.05, update_each=3, spatial_averaging=7, seed=seed
        )
        return model, optimizer, lambda: squared_error(model, x, y)

    model, optimizer, loss = prepared(seed=5)
    for step in range(8):
        if step == stop:
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                tmp_path / "state.pt",
            )
        descend(optimizer, loss(), "backward")

    resumed, optimizer, loss = prepared(seed=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for _ in range(8 - stop):
        descend(optimizer, loss(), "backward")
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_like_the_original(copied):
    model, x, y = mlp()
    optimizer = AdaHessian(
        model.named_parameters(), lr=0.05, update_each=2, spatial_averaging=partition(model)
    )
    descend(optimizer, squared_error(model, x, y), "backward")
    twin, twin_optimizer = copied((model, optimizer))
    for _ in range(3):
        descend(optimizer, squared_error(model, x, y), "backward")
        descend(twin_optimizer, squared_error(twin, x, y), "backward")
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_closure():
    point = torch.tensor([-2.0, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([point], lr=1.0, betas=(0.0, 0.0), eps=0.0)

    def closure():
        optimizer.zero_grad()
        loss = bowl(point)
        optimizer.backward(loss)
        return loss

    assert optimizer.step(closure).item() == 49.0
    assert torch.equal(point.detach(), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("way", ["backward", "create_graph"])
def test_zero_grad_forgets_a_step_that_was_not_taken(way):
    point = torch.tensor([-2.0, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([point], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    if way == "backward":
        optimizer.backward(7 * bowl(point))
    else:
        (7 * bowl(point)).backward(create_graph=True)
    descend(optimizer, bowl(point), way)
    assert torch.equal(point.detach(), torch.zeros(2, dtype=torch.float64))


def test_a_loss_without_curvature_moves_by_eps():
    point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    descend(AdaHessian([point], lr=1e-3, eps=0.1), point.sum(), "backward")
    torch.testing.assert_close(point.detach(), torch.full((2,), -1e-2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.5)}, "betas is"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"hessian_power": 1.5}, "hessian_power is 1.5; .* at most 1"),
        ({"update_each": 0}, "update_each is 0"),
        ({"num_probes": 0}, "num_probes is 0"),
        ({"spatial_averaging": 0}, "spatial_averaging is 0"),
        ({"spatial_averaging": "columns"}, "'columns'; by name there are 'conv' and 'rows'"),
        ({"spatial_averaging": BLOCKS}, "named_parameters"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaHessian(parameters().values(), **settings)


@pytest.mark.parametrize("setting", ["update_each", "num_probes", "spatial_averaging"])
def test_settings_of_a_group_that_are_for_all_are_explained(setting):
    groups = [{"params": list(parameters().values()), setting: 2}]
    with pytest.raises(ValueError, match=f"{setting} is one setting for all"):
        AdaHessian(groups)


def test_blocks_of_another_model_are_explained():
    with pytest.raises(ValueError, match=r"none of the parameters \(the first is 'matrix'\)"):
        AdaHessian(parameters(), spatial_averaging=partition(mlp()[0]))


def test_blocks_that_cross_are_explained():
    crossing = [Block("rows", "other", None, 4, (Piece("matrix", 0, slice(0, 1)),)), BLOCKS[0]]
    with pytest.raises(ValueError, match="cut matrix along more than one axis: 0 and 1"):
        AdaHessian(parameters(), spatial_averaging=crossing)


def test_a_step_that_is_due_without_a_measurement_is_explained():
    model, x, y = mlp()
    optimizer = AdaHessian(model.parameters(), update_each=2)
    squared_error(model, x, y).backward()
    with pytest.raises(RuntimeError, match=r"optimizer.backward\(loss\) instead of loss.backward"):
        optimizer.step()


SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from blockspec.optim import AdaHessian, keep_freed_memory

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
x, y = (torch.randn(80, size, dtype=torch.float64).view(10, 8, size) for size in (4, 2))
adahessian = AdaHessian(model.named_parameters(), lr=0.05, update_each=2, num_probes=2, spatial_averaging="rows")
model, optimizer = accelerator.prepare(model, adahessian)
mine = slice(accelerator.process_index, None, accelerator.num_processes)
for a, b in zip(x, y):
    with accelerator.accumulate(model):
        with adahessian.second_order(model):
            loss = (model(a[mine]) - b[mine]).square().mean()
        accelerator.backward(adahessian.probe(loss))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
result = [p.detach() for p in accelerator.unwrap_model(model).parameters()]
torch.save((accelerator.num_processes, result), f"{sys.argv[1]}_{accelerator.process_index}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_with_micro_batches_do_what_one_without_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_script(script, str(tmp_path / "rank"))
    (processes, first), (_, second) = (
        torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)
    )
    assert processes == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    model, x, y = mlp(samples=80)
    optimizer = AdaHessian(
        model.parameters(), lr=0.05, update_each=2, num_probes=2, spatial_averaging="rows"
    )
    for a, b in zip(x.view(5, 16, 4), y.view(5, 16, 2), strict=True):
        optimizer.zero_grad()
        optimizer.backward(squared_error(model, a, b))
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(
        first, [p.detach() for p in model.parameters()], rtol=1e-10, atol=1e-13
    )


def test_the_allocator_is_changed_only_when_asked(monkeypatch):
    made = []
    empty, model = torch.empty, nn.Linear(2, 2)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    AdaHessian(model.parameters())
    assert not made
    keep_freed_memory()
    assert made == [(2**25 - 2**16,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_said(dtype):
    with pytest.warns(UserWarning, match=r"2 parameters.*such as weight .*float32.*autocast"):
        AdaHessian(nn.Linear(2, 2).to(dtype).named_parameters())
