"""The study of batch norm and shortcuts: its table is what direct estimates of its checkpoints
give.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from blockspec import Objective, estimate_spectra, partition
from training.command import run_command
from training.optimizers import OptimizerSettings
from training.trainer import TrainingSettings
from vision_models import factories
from vision_models.ablation import (
    STAGES,
    VARIANTS,
    Measuring,
    Network,
    ablation,
    collect,
    examine,
    numbers,
)
from vision_models.models import ModelSettings, build
from vision_models.sources import DataSettings

TRAINING = TrainingSettings(
    num_steps=4,
    checkpoints=(0.0, 1.0),
    state_every=0,
    device="cpu",
    tracker="none",
    optimizer=OptimizerSettings(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0),
)
MEASURING = Measuring(count=12, batch_size=8, num_probes=2, num_steps=4, device="cpu")


def network(variant):
    return Network(8, variant, {"channels": 1, "width": 4, "depth": 8, **VARIANTS[variant]})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation")
    networks = [network("all"), network("neither")]
    for one in networks:
        examine(one, out, DataSettings(batch_size=16, held_out=16), TRAINING, MEASURING)
    return out, collect(networks, out)


@pytest.mark.slow
def test_the_table_has_a_line_for_each_block_of_each_checkpoint(study):
    out, table = study
    assert len(table) == 2 * 2 * 6
    assert set(table["block"]) == {*STAGES, "model"}
    assert set(table["step"]) == {0, 4}
    pd.testing.assert_frame_equal(pd.read_parquet(out / "ablation.parquet"), table)
    densities = {"density", *(f"density_{stage.replace(' ', '_')}" for stage in STAGES)}
    assert {path.stem for path in (out / "figures").glob("*.png")} == {
        "trace",
        "largest",
        *densities,
    }
    parameters = table[(table["variant"] == "neither") & (table["step"] == 0)].set_index("block")[
        "parameters"
    ]
    assert parameters["model"] == parameters.drop("model").sum()


def test_numbers_are_those_of_an_estimate_by_hand(study):
    out, table = study
    row = table[
        (table["variant"] == "all") & (table["step"] == 4) & (table["block"] == "stage 2")
    ].iloc[0]
    model, batches, loss = factories.checkpoint(str(out / "depth8_all" / "step_000004"), count=12)
    blocks = partition(model, {"stage 2": "layer2.*", "rest": ["[bcf]*", "layer[13].*"]}, "stage 2")
    spectrum = estimate_spectra(Objective(model, batches, loss), blocks, num_probes=2, num_steps=4)[
        "stage 2"
    ]
    assert row["trace"] == pytest.approx(spectrum.trace.value, rel=1e-3)
    assert row["trace_stderr"] == pytest.approx(spectrum.trace.stderr, rel=1e-2)
    found = [row[f"eigenvalue_{i}"] for i in (1, 2, 3, 4)]
    assert any(
        np.allclose(found, nodes[::-1], rtol=1e-3, atol=1e-3 * nodes[-1])
        for nodes in spectrum.nodes
    )


def test_top_eigenvalues_are_those_of_one_probe():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3, dtype=torch.float64)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    _, _, loss = factories.digits(count=1, model="digits_mlp")
    block = partition(model, "model")[0]
    found = numbers(
        estimate_spectra(Objective(model, [(x, y)], loss), block, num_probes=3, num_steps=15)[
            "model"
        ]
    )
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def value(flat):
        return torch.nn.functional.cross_entropy(x @ flat[:18].view(3, 6).T + flat[18:], y)

    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(value)(flat)).flip(0)
    np.testing.assert_allclose(
        [found[f"eigenvalue_{i}"] for i in range(1, 6)], eigenvalues[:5], rtol=1e-9
    )


@pytest.mark.slow
def test_a_network_that_diverges_is_measured_up_to_there(tmp_path):
    training = TrainingSettings(
        **{**vars(TRAINING), "optimizer": OptimizerSettings(name="sgd", lr=1e30, clip=0.0)}
    )
    one = network("neither")
    examine(one, tmp_path, DataSettings(batch_size=16, held_out=16), training, MEASURING)
    table = collect([one], tmp_path)
    assert table["step"].unique().tolist() == [0]
    assert table["diverged"].all()


def test_every_variant_has_all_stages_and_its_batch_norm():
    for name, switches in VARIANTS.items():
        model = build(ModelSettings("cifar_resnet", {"depth": 8, "width": 4, **switches}))
        assert [block.name for block in partition(model, STAGES)] == list(STAGES)
        stages = [
            any("bn" in n for n, _ in model.get_submodule(f"layer{i}").named_parameters())
            for i in (1, 2, 3)
        ]
        assert stages == {"no batch norm": [False] * 3, "neither": [False] * 3}.get(
            name, [f"in stage {i}" not in name for i in (1, 2, 3)]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "[no norm]"], "no variant 'no norm': there are all, no batch norm"),
        (["--depths", "[9]"], "depth 9 does not fit"),
    ],
)
def test_wrong_settings_are_found_before_the_work(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(ablation, ["--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
