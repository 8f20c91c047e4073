"""P itself: against the step that each optimizer takes, from saved states, and what is refused."""

import numpy as np
import pytest
import torch
from preconditioned import (
    DIAGONAL,
    LR,
    adam,
    momenta,
    muon_and_adamw,
    net,
    objective,
    step,
    trained,
)
from torch import nn

import blockspec
from blockspec import Preconditioner, partition
from blockspec.model.blocks import Piece
from blockspec.products.preconditioning.scalings import Factor, Kronecker, Rotated, cuts


@pytest.mark.parametrize("name", DIAGONAL)
def test_the_last_step_is_what_p_makes_of_the_momentum(name):
    model, optimizer, moved = trained(DIAGONAL[name][0])
    found = Preconditioner.from_optimizer(optimizer, model).apply(momenta(name, model, optimizer))
    for n, step_taken in moved.items():
        torch.testing.assert_close(-LR * found[n], step_taken, rtol=1e-9, atol=1e-14)


def assert_p_times_the_gradient_but_for_a_factor(model, optimizer, moved, *, rtol):
    found = Preconditioner.from_optimizer(optimizer, model).apply(
        {n: p.grad for n, p in model.named_parameters()}
    )
    for n, taken in moved.items():
        ratio = taken / found[n]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=rtol, atol=0)


def test_adafactors_step_is_p_times_the_gradient_but_for_one_factor_a_tensor():
    model, optimizer, moved = trained(lambda m: torch.optim.Adafactor(m.parameters(), LR))
    assert_p_times_the_gradient_but_for_a_factor(model, optimizer, moved, rtol=1e-9)


def test_transformers_adafactor_likewise():
    from transformers.optimization import Adafactor

    def make(m):
        return Adafactor(m.parameters(), LR, scale_parameter=False, relative_step=False)

    model, optimizer, moved = trained(make)
    assert_p_times_the_gradient_but_for_a_factor(model, optimizer, moved, rtol=1e-6)


def test_muon_makes_the_momentum_orthogonal():
    model, optimizers, moved = trained(lambda m: muon_and_adamw(m, nesterov=False))
    p = Preconditioner.from_optimizer(optimizers, model)
    assert p.name == "Muon + AdamW"
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            momentum = optimizers[0].state[parameter]["momentum_buffer"]
            found = p.apply({name: momentum})[name]
            u, sizes, v = np.linalg.svd(momentum.numpy(), full_matrices=False)
            there = sizes > 1e-12 * sizes[0]  # a softmax has no gradient along (1, 1, 1)
            assert there.sum() == (2 if len(momentum) == 3 else 4)
            np.testing.assert_allclose(found, u[:, there] @ v[there], atol=1e-9)
            taken = -moved[name].flatten()  # by five Newton-Schulz steps in bfloat16
            assert float(taken @ found.flatten() / taken.norm() / found.norm()) > 0.85


SAVED = {
    "Adam": adam,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), LR),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), LR, momentum=0.9),
    "NAdam": DIAGONAL["NAdam"][0],
    "Adamax": DIAGONAL["Adamax"][0],
    "RMSprop": DIAGONAL["RMSprop"][0],
    "Adagrad": DIAGONAL["Adagrad"][0],
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), LR),
    "AdaHessian": DIAGONAL["AdaHessian"][0],
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], LR),
}


def without_vectors(name, model):
    """Muon steps matrices alone."""
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2 or name != "Muon")
    return model


@pytest.mark.parametrize("name", SAVED)
def test_spectra_by_a_saved_state_equal_those_by_the_live_optimizer(name, tmp_path):
    model, optimizer, _ = trained(lambda m: SAVED[name](without_vectors(name, m)))
    live = Preconditioner.from_optimizer(optimizer, model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = Preconditioner.from_state(tmp_path, model)
    assert (saved.name, saved.digest) == (live.name, live.digest)
    blocks = partition(model, "tensor")
    one, other = (
        blockspec.estimate_spectra(objective(model), blocks, 2, 5, precondition=p)
        for p in (live, str(tmp_path / "optimizer.pt"))
    )
    for block in blocks:
        np.testing.assert_array_equal(one[block.name].nodes, other[block.name].nodes)
        assert one[block.name].curvature == f"preconditioned hessian ({name})"


def test_a_snapshot_stays_what_it_was():
    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    before = p.scalings["0.weight"].values.clone()
    step(model, [optimizer], 7)
    torch.testing.assert_close(p.scalings["0.weight"].values, before, rtol=0, atol=0)
    assert Preconditioner.from_optimizer(optimizer, model).digest != p.digest


def test_nanogpts_checkpoint_and_the_trainers_order_name_parameters_rightly():
    def decayed(model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return torch.optim.AdamW(
            [
                {"params": matrices},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            LR,
        )

    model, optimizer, _ = trained(decayed)
    live = Preconditioner.from_optimizer(optimizer, model)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 3}
    assert Preconditioner.from_state(checkpoint, model).digest == live.digest


def test_the_trainers_order_is_known_where_it_is_not_that_of_matrices_first():
    """It decays the weights of batch norms too, which are vectors."""
    from transformers import Trainer

    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    decayed = Trainer.get_decay_parameter_names(None, model)
    named = dict(model.named_parameters())
    assert "1.weight" in decayed
    groups = [
        {"params": [p for n, p in named.items() if n in decayed]},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LR)
    step(model, [optimizer], 0)
    live = Preconditioner.from_optimizer(optimizer, model)
    assert Preconditioner.from_state(optimizer.state_dict(), model).digest == live.digest


def test_saved_states_of_two_optimizers_are_joined():
    model, optimizers, _ = trained(muon_and_adamw)
    named = dict(model.named_parameters())
    matrices = [n for n, p in named.items() if p.ndim == 2]
    vectors = [n for n, p in named.items() if p.ndim < 2]
    one, other = (
        Preconditioner.from_state(optimizer.state_dict(), model, names=names)
        for optimizer, names in zip(optimizers, (matrices, vectors), strict=True)
    )
    live = Preconditioner.from_optimizer(optimizers, model)
    assert str(one | other) == str(live)


def test_matrices_of_kernels_and_pieces_of_experts():
    """Sides of four axes against an einsum; an expert is whole where its own axis is not mixed."""
    generator = torch.Generator().manual_seed(4)
    shape = (3, 2, 4, 5)
    roots = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in shape]
    roots = [r @ r.T for r in roots]
    factors = []
    for root in roots:
        values, basis = torch.linalg.eigh(root)
        factors.append(Factor(basis, values))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = torch.einsum("ai,bj,ck,dl,ijkl->abcd", *roots, x)
    torch.testing.assert_close(Kronecker(tuple(factors), shape)(x), expected)
    bases = tuple(f.basis for f in factors)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    turned = torch.einsum("ia,jb,kc,ld,ijkl->abcd", *bases, x) * values
    back = torch.einsum("ai,bj,ck,dl,ijkl->abcd", *bases, turned)
    torch.testing.assert_close(Rotated(bases, values)(x), back)
    expert = Piece("w", None, None, 1)
    assert cuts(Kronecker(tuple(factors), shape), expert)
    inner = Kronecker((None, *factors[1:]), shape)
    assert not cuts(inner, expert)
    torch.testing.assert_close(inner.cut(expert)(x[1]), inner(x)[1])
    row = Piece("w", 0, slice(0, 1), 1)  # axis 1 of the parameter, which is mixed
    assert cuts(inner, row)


def test_two_orders_that_fit_are_told_and_not_chosen_between():
    """(2, 2), (2,), (2,), (2, 2) as one group, or as two groups of two."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    names = [name for name, _ in model.named_parameters()]
    state = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.ones(4), "step": torch.tensor(1.0)}
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False}
    vectors = [n for n, p in model.named_parameters() if p.ndim == 1]
    matrix = {k: v.expand(4, 4) if v.ndim else v for k, v in state.items()}
    saved = {
        "state": {i: (matrix if i < 2 else state) for i in range(6)},
        "param_groups": [group | {"params": [0, 1]}, group | {"params": [2, 3, 4, 5]}],
    }
    found = Preconditioner.from_state(saved, model)  # only one rule has the matrices first
    assert set(found.scalings) == set(names)
    saved["param_groups"] = [group | {"params": [0, 1, 2]}, group | {"params": [3, 4, 5]}]
    with pytest.raises(
        ValueError, match=r"no order of the model's names fits .*\[3, 3\] parameters.*names="
    ):
        Preconditioner.from_state(saved, model)
    order = [n for n in names if n not in vectors] + vectors
    assert Preconditioner.from_state(saved, model, names=order).name == "Adam"


def test_names_that_torch_kept_count_more_than_the_order():
    def backwards(model):
        return torch.optim.Adam(reversed(list(model.named_parameters())), LR)

    model, optimizer, _ = trained(backwards)
    live = Preconditioner.from_optimizer(optimizer, model)
    assert Preconditioner.from_state(optimizer.state_dict(), model).digest == live.digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: Preconditioner.from_optimizer(adam(m), m),
            r"no state of 4 of its 4 parameters \(0.weight",
        ),
        (
            lambda m: Preconditioner.from_optimizer(adam(net()), m),
            "steps none of the parameters of this Sequential",
        ),
        (
            lambda m: Preconditioner.from_optimizer(torch.optim.LBFGS(m.parameters()), m),
            "torch.optim.lbfgs.LBFGS .* is not known",
        ),
        (
            lambda m: Preconditioner.diagonal({"0.weight": torch.zeros(6, 4)}),
            "'0.weight' cannot be inverted",
        ),
        (
            lambda m: Preconditioner.diagonal({"0.weight": -torch.ones(6, 4)}),
            "not above 0 and finite",
        ),
        (
            lambda m: Preconditioner.diagonal({"0.weight": torch.full((6, 4), torch.inf)}),
            "not above 0 and finite",
        ),
        (lambda m: Preconditioner.from_state({"model": {}}, m), "holds no optimizer's state"),
        (
            lambda m: Preconditioner.from_state("nowhere.pt", m),
            "nowhere.pt is no optimizer's state",
        ),
        (
            lambda m: Preconditioner.from_state(
                {"state": {}, "param_groups": [{"params": [0]}]}, m
            ),
            "does not tell which optimizer",
        ),
        (
            lambda m: Preconditioner.from_state(adam(m).state_dict(), m, optimizer="Lion"),
            "'Lion' is not one that can be read",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(net())


@pytest.mark.parametrize("entry", [torch.inf, torch.nan, -1.0, 0.0])
def test_a_state_without_an_inverse_is_refused_before_products(entry):
    """An infinite second moment has P^-1 = 0, which is finite and no inverse either."""
    model, optimizer, _ = trained(lambda m: torch.optim.Adam(m.parameters(), LR, eps=0))
    optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = entry
    with pytest.raises(ValueError, match=r"P of '0.weight' cannot be inverted"):
        Preconditioner.from_optimizer(optimizer, model)


def test_an_inverse_that_the_parameters_dtype_cannot_hold_is_refused():
    """Numbers are read in float64, and given in the parameter's dtype."""
    model = net().float()
    optimizer = torch.optim.Adam(model.parameters(), LR, eps=1e-40)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    optimizer.state[model[0].weight]["exp_avg_sq"].zero_()
    with pytest.raises(ValueError, match="too small for the parameter's dtype"):
        Preconditioner.from_optimizer(optimizer, model)
    with pytest.raises(ValueError, match="too small for the parameter's dtype"):
        Preconditioner.diagonal({"0.weight": torch.full((6, 4), 1e-40)})


def test_a_block_that_the_optimizer_does_not_step_is_refused_and_others_are_not():
    model = net()
    optimizer = torch.optim.Adam(list(model.parameters())[:2], LR)
    step(model, [optimizer], 0)
    p = Preconditioner.from_optimizer(optimizer, model)
    blockspec.estimate_spectra(
        objective(model), partition(model, include="0.*"), 1, 2, precondition=p
    )
    with pytest.raises(ValueError, match=r"'2.weight', which Adam does not step"):
        blockspec.estimate_spectra(objective(model), partition(model), 1, 2, precondition=p)


def test_a_file_that_could_execute_something_is_not_loaded(tmp_path):
    torch.save({"state": {0: objective}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="which loading could execute"):
        Preconditioner.from_state(tmp_path / "optimizer.pt", net())


def test_a_state_of_another_preconditioner_is_not_gone_on_from(tmp_path):
    model, optimizer, _ = trained(adam)
    one = Preconditioner.from_optimizer(optimizer, model)
    step(model, [optimizer], 5)
    for p, q in zip(model.parameters(), trained(adam)[0].parameters(), strict=True):
        p.data.copy_(q.data)
    other = Preconditioner.from_optimizer(optimizer, model)
    blocks = partition(model)

    def measure(p):
        return blockspec.estimate_spectra(
            objective(model), blocks, 2, 5, precondition=p, state=tmp_path, keep_state=True
        )

    measure(one)
    with pytest.raises(ValueError, match="precondition is"):
        measure(other)


def nvidias(model, steps=3):
    """The state of SOAP as emerging-optimizers 0.3 keeps it: a basis for each side, by its name."""
    generator = torch.Generator().manual_seed(3)
    states = {}
    for number, p in enumerate(model.parameters()):
        left, right = (torch.randn(n, n, generator=generator).double() for n in p.shape)
        square = torch.rand(p.shape, generator=generator).double()
        bases = {"Q_L": torch.linalg.qr(left)[0], "Q_R": torch.linalg.qr(right)[0]}
        factors = {"L": left @ left.T, "R": right @ right.T}
        states[number] = {"step": steps, "exp_avg": 0 * square, "exp_avg_sq": square}
        states[number] |= factors | bases
    group = {"betas": (0.9, 0.95), "eps": 1e-3, "shampoo_beta": 0.95, "lr": LR}
    return {"state": states, "param_groups": [group | {"params": list(states)}]}


def test_nvidias_soap_is_read_in_the_bases_that_it_keeps_by_name():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    state = nvidias(model)
    p = Preconditioner.from_state(state, model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        kept = state["state"][number]
        turn = np.kron(kept["Q_L"], kept["Q_R"])
        root = (kept["exp_avg_sq"] / (1 - 0.95**3)).sqrt().numpy().reshape(-1) + 1e-3
        tensor = torch.randn_like(parameter)
        expected = turn @ np.diag(1 / root) @ turn.T @ tensor.detach().numpy().reshape(-1)
        found = p.apply({name: tensor})[name].detach().numpy().reshape(-1)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    for kept in state["state"].values():  # without bases it is not taken for Adam
        del kept["Q_L"], kept["Q_R"]
    with pytest.raises(ValueError, match="cannot be read"):
        Preconditioner.from_state(state, model, optimizer="emerging_optimizers.SOAP")


@pytest.mark.peers
def test_the_steps_of_nvidias_soap_are_what_p_makes_of_the_momentum():
    """Matrices alone, in float32: it takes no others."""
    cls = pytest.importorskip("emerging_optimizers.soap").SOAP
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    optimizer = cls(model.parameters(), lr=LR, weight_decay=0.0)
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(12, 4)).square().mean().backward()
        optimizer.step()
    p = Preconditioner.from_optimizer(optimizer, model)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        m = state["Q_L"] @ (state["exp_avg"] / (1 - 0.9**4)) @ state["Q_R"].T
        moved = parameter.detach() - before[name]
        torch.testing.assert_close(-LR * p.apply({name: m})[name], moved, rtol=1e-3, atol=1e-6)
    name = "emerging_optimizers.SOAP"
    assert (
        Preconditioner.from_state(optimizer.state_dict(), model, optimizer=name).digest == p.digest
    )


@pytest.mark.peers
@pytest.mark.parametrize(
    "name",
    [
        "pytorch_optimizer.Shampoo",
        "pytorch_optimizer.SOAP",
        "torch_optimizer.Shampoo",
        "pytorch_optimizer.AdamMini",
        "heavyball.SOAP",
    ],
)
def test_the_steps_of_other_packages_are_what_p_makes_of_the_momentum(name):
    package, _, title = name.partition(".")
    cls = getattr(pytest.importorskip(package), title)
    more = {
        "pytorch_optimizer.SOAP": {"weight_decay": 0.0, "precondition_frequency": 100},
        "heavyball.SOAP": {
            "weight_decay": 0.0,
            "precondition_frequency": 100,
            "storage_dtype": "float64",
            "compile_step": False,
        },
        "pytorch_optimizer.AdamMini": {
            "weight_decay": 0.0,
            "num_embeds": 4,
            "num_heads": 1,
            "num_query_groups": 1,
        },
    }.get(name, {})

    def make(model):
        return cls(model if title == "AdamMini" else model.parameters(), lr=LR, **more)

    model, optimizer, moved = trained(make, steps=4)
    p = Preconditioner.from_optimizer(optimizer, model)
    for n, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        group = next(g for g in optimizer.param_groups if any(parameter is q for q in g["params"]))
        if title == "Shampoo":
            m = parameter.grad
        elif package == "heavyball":
            turned = next(v for k, v in state[0].items() if "exp_avg_2" in k)[0]
            bases = next(v for k, v in state[0].items() if "soap_Q" in k)
            m = turned if bases[0] is None else bases[0][0] @ turned @ bases[1][0].T
        else:
            steps = int(state.get("step", group["step"])) - (title == "SOAP")
            momentum = state["exp_avg"] if title == "SOAP" else state["m"].view_as(parameter)
            m = momentum.double() / (1 - group["betas"][0] ** steps)
        tolerance = 1e-5 if title == "AdamMini" or package == "heavyball" else 1e-8
        torch.testing.assert_close(-LR * p.apply({n: m})[n], moved[n], rtol=tolerance, atol=1e-9)
    assert (
        Preconditioner.from_state(optimizer.state_dict(), model, optimizer=name).digest == p.digest
    )
