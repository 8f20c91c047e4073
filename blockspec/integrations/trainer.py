"""Spectra along the training of a ``transformers.Trainer``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blockspec.integrations.measuring import IMAGE, CallbackSettings, Measuring
from blockspec.model.losses import next_token
from blockspec.products.settings import takes

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
    bit-equal without it::

        trainer = Trainer(model, arguments, train_dataset=...)
        callback = SpectrumCallback(trainer, "runs/mine", held_out_batches, fractions=(0, 0.1, 1))
        trainer.add_callback(callback)

    What would fail in the middle of training (another model's batches, a folder of other settings)
    is raised at its beginning. A training that begins at step 0 is refused where the folder holds
    the record of another one. Steps that the folder has already, of the same weights, are not
    measured again; a resumed training measures them anew where its weights differ. With several
    processes all of them share the work and the first writes. Parameters that FSDP1 or ZeRO-3 has
    sharded are not supported.
    """

    @takes(settings=CallbackSettings)
    def __init__(
        self,
        trainer: Trainer,
        out: str | os.PathLike[str],
        batches: Iterable[Any],
        *,
        loss: Any = next_token,
        settings: CallbackSettings,
    ) -> None:
        """Made before the training begins.

        Args:
            trainer: Whose trackers (``report_to``) and ``log_history`` get the scalars of
                :func:`blockspec.integrations.record`.
            out: A folder as ``blockspec run`` leaves it; ``blockspec plot`` and ``blockspec show``
                read it.
            batches: Fixed batches, held out from training: a list of what the loss understands.
            loss: See :mod:`blockspec.losses`.
            [settings]
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "trainer is the transformers.Trainer that this is added to, got a "
                f"{type(trainer).__name__}"
            )
        self.measuring = Measuring(out, batches, loss, settings)
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        training = {name: str(getattr(args, name, None)) for name in TRAINING}
        self.measuring.begin(
            model,
            total=state.max_steps,
            step=state.global_step,
            training=training,
            optimizer=self.trainer.optimizer,
        )
        self._measure(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._measure(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.measuring.end()

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        found = self.measuring.measure(state.global_step)
        if found is None:
            return
        asked = control.should_log  # logging takes it back, and this step's loss would be lost
        self.trainer.log(found)
        control.should_log = asked
        if self.measuring.settings.images:
            self._show(state.global_step)

    def _show(self, step: int) -> None:
        trackers = self.trainer.callback_handler.callbacks
        writers = [w for t in trackers if (w := getattr(t, "tb_writer", None)) is not None]
        boards = [w for t in trackers if (w := getattr(t, "_wandb", None)) is not None]
        if not (writers or boards) or (figure := self.measuring.figure(step)) is None:
            return
        for writer in writers:
            writer.add_figure(IMAGE, figure, step, close=False)
        for wandb in boards:
            wandb.log({IMAGE: wandb.Image(figure)}, commit=False)
