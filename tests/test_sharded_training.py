"""Training under FSDP2 is measured as it is, and does not notice it: the Trainer and accelerate."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launching import run_script
from models import tiny_gpt2
from transformers import Trainer, TrainingArguments

import blockspec
from blockspec.engine.settings import EstimateSettings
from blockspec.integrations import SpectrumCallback, record
from blockspec.runs.settings import BlockSettings

CHOSEN = BlockSettings(include=["*h.1.mlp.c_fc.weight", "*h.0*weight/key"], full=False)
SETTINGS = {"num_probes": 2, "num_steps": 3}
LAYERS = ["GPT2Block"]


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(13, (count, 2, 5), generator=generator)


def held_out():
    return [{"input_ids": ids} for ids in tokens(3, 1)]  # 3 are dealt to 2 processes


def ragged():
    return tiny_gpt2(n_embd=10, n_head=2, vocab_size=13)


def takes_the_cpu_for_a_gpu():
    """accelerate 1.15 knows FSDP on GPUs alone; nothing else in it asks for one."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def weights_of(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def by_a_trainer(out, *, watched):
    arguments = TrainingArguments(
        str(out / "hf"), use_cpu=True, max_steps=2, per_device_train_batch_size=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True,
        fsdp=True, fsdp_config={"transformer_layer_cls_to_wrap": LAYERS},
    )  # fmt: skip
    assert arguments.device.type == "cpu"
    takes_the_cpu_for_a_gpu()
    data = [{"input_ids": ids[0], "labels": ids[0]} for ids in tokens(8, 2)]
    trainer = Trainer(ragged(), arguments, train_dataset=data)
    assert trainer.accelerator.is_fsdp2
    if watched:
        estimate = EstimateSettings(**SETTINGS)
        trainer.add_callback(
            SpectrumCallback(
                trainer,
                out / "trainer",
                held_out(),
                fractions=(0,),
                blocks=CHOSEN,
                estimate=estimate,
            )
        )
    trainer.train()
    return weights_of(trainer.model)


def by_accelerate(out, *, watched):
    torch.manual_seed(0)
    AcceleratorState._reset_state()
    takes_the_cpu_for_a_gpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=LAYERS,
        reshard_after_forward=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = ragged()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    plain = accelerator.unwrap_model(model)
    own = held_out()[: 2 - accelerator.process_index]
    objective = blockspec.Objective(plain, own, blockspec.losses.next_token, sharded=True)
    blocks = blockspec.partition(plain, include=CHOSEN.include)
    for step in range(2):
        with torch.no_grad():
            model(**own[0])  # leaves the weights gathered
        if watched:
            record(out / "accelerate", step, objective, blocks, **SETTINGS)
        batch = {"input_ids": tokens(2, 3 + step)[accelerator.process_index]}
        accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert {type(p).__name__ for p in plain.parameters()} == {"DTensor"}
    return weights_of(plain)


def main(folder):
    for train in (by_a_trainer, by_accelerate):
        watched = train(Path(folder), watched=True)
        assert all(map(torch.equal, watched, train(Path(folder), watched=False))), train.__name__
    PartialState().destroy_process_group()


@pytest.mark.slow
def test_training_under_fsdp2_is_measured_and_does_not_notice_it(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, test_sharded_training\ntest_sharded_training.main(sys.argv[1])\n"
    )
    run_script(script, str(tmp_path))
    model = ragged()
    blocks = blockspec.partition(model, include=CHOSEN.include)
    data = held_out()
    # the second process of accelerate's holds the first batch alone, which therefore counts twice
    for name, batches, steps in (
        ("trainer", data, {0}),
        ("accelerate", [data[0], *data[:2]], {0, 1}),
    ):
        objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
        truth = blockspec.estimate_spectra(objective, blocks, **SETTINGS)
        found = blockspec.load_spectra(tmp_path / name / "spectra.parquet", step=0)
        for block in blocks:
            np.testing.assert_allclose(found[block.name].nodes, truth[block.name].nodes, rtol=1e-8)
        assert set(pd.read_parquet(tmp_path / name / "spectra.parquet")["step"]) == steps
