"""Spectra along the training of a ``transformers.Trainer``."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blockspec.engine.settings import EstimateSettings
from blockspec.integrations.recording import check, record
from blockspec.model.losses import next_token
from blockspec.model.objective import Objective
from blockspec.runs.settings import BlockSettings
from blockspec.runs.stages import choose_blocks

TRAINING = (  # arguments of a training on which its weights depend
    "seed",
    "data_seed",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "fp16",
    "bf16",
)


class SpectrumCallback(TrainerCallback):
    """Measures spectra of blocks at chosen steps of training, and changes nothing else: losses are
    bit-equal without it.

        trainer = Trainer(model, arguments, train_dataset=...)
        trainer.add_callback(SpectrumCallback(trainer, "runs/mine", held_out_batches, fractions=(0,
        0.1, 1)))

    trainer: whose trackers (``report_to``) and ``log_history`` get the scalars of
        :func:`blockspec.integrations.record`.
    out: a folder as ``blockspec run`` leaves it; ``blockspec plot`` and ``blockspec show`` read it.
    batches: fixed batches, held out from training: a list of what the loss understands.
    loss: see :mod:`blockspec.losses`.
    steps: numbers of updates after which to measure; 0 is the beginning.
    fractions: the same as shares of the whole training.
    blocks: which blocks; ``BlockSettings(full=False)`` leaves out the full matrix.
    estimate: how well.
    memory, columns: see :func:`blockspec.estimate_spectra`.

    What would fail in the middle of training (another model's batches, a folder of other settings)
    is raised at its beginning. A training that begins at step 0 is refused where the folder holds
    the record of another one. Steps that the folder has already, of the same weights, are not
    measured again; a resumed training measures them anew where its weights differ. With several
    processes all of them share the work and the first writes; sharded parameters (FSDP, ZeRO-3) are
    not supported.
    """

    def __init__(
        self,
        trainer: Trainer,
        out: str | os.PathLike[str],
        batches: Iterable[Any],
        *,
        loss: Any = next_token,
        steps: Sequence[int] = (),
        fractions: Sequence[float] = (0.0, 1.0),
        blocks: BlockSettings = BlockSettings(),
        estimate: EstimateSettings = EstimateSettings(),
        memory: int | float | str | None = None,
        columns: int | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "trainer is the transformers.Trainer that this is added to, got a "
                f"{type(trainer).__name__}"
            )
        self.due = (tuple(steps), tuple(fractions))
        due_steps(*self.due, total=1)
        self.trainer = trainer
        self.out = out
        self.batches, self.loss, self.blocks = batches, loss, blocks
        self.estimate, self.resources = estimate, {"memory": memory, "columns": columns}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.due_steps = due_steps(*self.due, total=state.max_steps)
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        self.objective = Objective(model, self.batches, self.loss)
        self.chosen = choose_blocks(self.objective, self.blocks)
        begins = state.global_step == 0
        self.training = {name: str(getattr(args, name, None)) for name in TRAINING}
        check(
            self.out,
            self.objective,
            self.chosen,
            self.estimate,
            training=self.training if begins else None,
        )
        self.replace = not begins  # a resumed training may not be bit by bit the one before
        self._measure(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._measure(state, control)

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step not in self.due_steps:
            return
        settings = asdict(self.estimate) | self.resources
        settings |= {"replace": self.replace, "training": self.training}
        found = record(self.out, state.global_step, self.objective, self.chosen, **settings)
        asked = control.should_log  # logging takes it back, and this step's loss would be lost
        self.trainer.log(found)
        control.should_log = asked


def due_steps(steps: Sequence[int], fractions: Sequence[float], *, total: int) -> frozenset[int]:
    """The numbers of updates after which to measure; a fraction above 0 is at least one update."""
    if wrong := [step for step in steps if operator.index(step) < 0]:
        raise ValueError(f"steps are numbers of updates, at least 0; got {wrong[0]}")
    if outside := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(
            f"fractions of training lie between 0 and 1; got {outside[0]}: give numbers of updates "
            "as steps"
        )
    return frozenset(steps) | {
        max(round(fraction * total), int(fraction > 0)) for fraction in fractions
    }
