"""Runs of the preconditioned matrix: what they record, what they show, and what they are kept apart
by.
"""

import json

import factories_for_runs as factories
import pandas as pd
import problems
import pytest
import torch
from test_cli import invoke, run_arguments

import blockspec
from blockspec import Preconditioner
from blockspec.figures.style import in_units_of, matrix_called
from blockspec.integrations import record


def state_of(model, path, *, seed=0):
    """Adam's state after one step with random gradients, saved."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) + 0.1
    optimizer.step()
    torch.save(optimizer.state_dict(), path)
    return optimizer


@pytest.fixture
def path(tmp_path):
    state_of(problems.nanogpt().model, tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


def run(out, *arguments):
    return invoke(*run_arguments(out), *arguments)


@pytest.mark.slow
def test_a_run_says_what_it_measured_in_every_place(tmp_path, path):
    out = tmp_path / "run"
    result = run(out, "--precondition", str(path))
    assert result.code == 0, result.err
    p = Preconditioner.from_state(path, problems.nanogpt().model)
    found = json.loads((out / "run.json").read_text())
    assert found["settings"]["estimate"]["precondition"] == str(path)
    assert found["stages"][0]["identity"]["precondition"] == f"AdamW {p.digest}"
    table = pd.read_parquet(out / "spectra.parquet")
    assert set(table["curvature"]) == {"preconditioned hessian (AdamW)"}
    assert f"seen by AdamW {p.digest[:8]}" in result.out.replace("\n", " ")


def test_a_state_of_other_content_under_the_same_name_is_noticed(tmp_path, path):
    out = tmp_path / "run"
    assert run(out, "--precondition", str(path)).code == 0
    state_of(problems.nanogpt().model, path, seed=1)
    result = run(out, "--precondition", str(path))
    assert result.code == 1
    assert "precondition is 'AdamW" in result.err
    assert run(out).code == 1  # without a preconditioner it is another run


@pytest.mark.slow
def test_each_checkpoint_has_the_state_that_lies_beside_it(tmp_path):
    paths = []
    for step in (10, 20):
        folder = tmp_path / f"step_{step}"
        (weights,) = factories.write_checkpoints(folder, [step])
        state_of(problems.nanogpt().model, folder / "optimizer.pt", seed=step)
        paths.append(str(weights))
    result = run(
        tmp_path / "run", "--checkpoints", json.dumps(paths), "--precondition", "optimizer.pt"
    )
    assert result.code == 0, result.err
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert len({stage["identity"]["precondition"] for stage in stages}) == 2


def test_a_plan_is_made_of_the_preconditioned_matrix(path):
    arguments = [a for a in run_arguments("x") if a not in ("--out", "x")]
    result = invoke("plan", *arguments[1:], "--precondition", str(path))
    assert result.code == 0, result.err
    assert "planned" in result.out


def test_a_training_loop_records_what_its_optimizer_sees(tmp_path):
    it = problems.nanogpt()
    blocks = blockspec.partition(it.model, include="*c_attn*")
    optimizer = state_of(it.model, tmp_path / "x.pt")
    p = Preconditioner.from_optimizer(optimizer, it.model, follow=True)
    numbers = {"num_probes": 1, "num_steps": 2}
    for step in (1, 2):
        record(tmp_path / "run", step, it.objective(), blocks, precondition=p, **numbers)
        optimizer.step()
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["settings"]["estimate"]["precondition"] == "AdamW"
    assert len({stage["identity"]["precondition"] for stage in found["stages"]}) == 2


def test_figures_name_the_matrix_and_its_unit():
    operator = blockspec.FunctionOperator(lambda v: v, 5)
    p = Preconditioner.diagonal({"matrix": torch.ones(5)}, name="AdamW")
    block = operator.block()
    spectra = blockspec.estimate_spectra(None, block, 1, 3, curvature=operator, precondition=p)
    assert matrix_called("preconditioned ggn (Muon + AdamW)") == (
        "generalised Gauss-Newton matrix as Muon + AdamW sees it"
    )
    assert (
        in_units_of("eigenvalue (loss / parameter²)", spectra) == "eigenvalue (1 / learning rate)"
    )
