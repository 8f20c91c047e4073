"""Spectra along the training of a Lightning ``Trainer``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from blockspec.integrations.measuring import IMAGE, CallbackSettings, Measuring
from blockspec.products.settings import takes

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback


def module_itself(module: nn.Module) -> nn.Module:
    """The LightningModule is what is measured."""
    return module


class LightningSpectrumCallback(Callback):
    """Measures spectra of blocks at chosen steps of training, and changes nothing else::

        callback = LightningSpectrumCallback(
            "runs/mine", held_out_batches, losses.next_token, model=lambda module: module.model
        )
        Trainer(callbacks=[callback], ...)

    Scalars go to the trainer's loggers; see :func:`blockspec.integrations.record`. What would fail
    in the middle of training is raised at its beginning, as for ``transformers.Trainer``.
    """

    @takes(settings=CallbackSettings)
    def __init__(
        self,
        out: str | os.PathLike[str],
        batches: Iterable[Any],
        loss: Any,
        *,
        model: Callable[[Any], nn.Module] = module_itself,
        settings: CallbackSettings,
    ) -> None:
        """Made before the training begins.

        Args:
            out: A folder as ``blockspec run`` leaves it; ``blockspec plot`` and ``blockspec show``
                read it.
            batches: Fixed batches, held out from training: a list of what the loss understands.
            loss: See :mod:`blockspec.losses`.
            model: Which module is measured; if left out, the LightningModule itself, whose
                ``forward`` the loss then calls.
            [settings]
        """
        self.measuring = Measuring(out, batches, loss, settings)
        self.model = model

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first update."""
        total = int(trainer.estimated_stepping_batches)
        training = {"module": type(pl_module).__name__, "hparams": str(dict(pl_module.hparams))}
        model, step = self.model(pl_module), trainer.global_step
        self.measuring.begin(
            model, total=total, step=step, training=training, optimizer=trainer.optimizers
        )
        self._measure(trainer)

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        """After each batch; only an update counts, where gradients of several are added up."""
        self._measure(trainer)

    def on_train_end(self, trainer: Any, *others: Any) -> None:
        """After the last update."""
        self.measuring.end()

    def _measure(self, trainer: Any) -> None:
        step = trainer.global_step
        found = self.measuring.measure(step)
        if found is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(found, step)
        if self.measuring.settings.images:
            self._show(trainer.loggers, step)

    def _show(self, loggers: Sequence[Any], step: int) -> None:
        writers = [w for x in loggers if hasattr(w := x.experiment, "add_figure")]
        others = [x for x in loggers if hasattr(x, "log_image")]
        if not (writers or others) or (figure := self.measuring.figure(step)) is None:
            return
        for writer in writers:
            writer.add_figure(IMAGE, figure, step, close=False)
        for logger in others:
            logger.log_image(IMAGE, [figure], step=step)
