"""Checks of what a data module gives, batch by batch: `pkm_lightning.data.batch_check`, where and how often."""

from __future__ import annotations

import logging
from typing import Protocol

import lightning as L
from torch import Tensor

from pkm_lightning.data.base import data_of, missing_parts
from pkm_lightning.data.batch_check import check_batch, check_prompt_batch
from pkm_lightning.errors import DataError
from pkm_lightning.model import Transformer

_log = logging.getLogger(__name__)


def log_missing_parts(trainer: L.Trainer) -> None:
    """Logs, on the first rank of a run that is about to train, what the run lacks because its data lack it."""
    lack = missing_parts(data_of(trainer), trainer.train_dataloader)
    if lack and trainer.is_global_zero:
        _log.info(lack)


class TrainedModule(Protocol):
    """What the checks read of a `LanguageModule`."""

    model: Transformer
    _trainer: L.Trainer | None

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer, within a run."""

    def log_is_due(self) -> bool:
        """Returns whether this step logs."""


class BatchChecks:
    """The checks of one `LanguageModule`; values on a GPU are compared in few batches, which the host waits for."""

    def __init__(self) -> None:
        self._has_trained = False

    def check_training(self, module: TrainedModule, batch: object, batch_idx: int) -> None:
        """Refuses a batch that cannot be trained on; on a GPU in the first step and in steps that log.

        Raises:
            DataError: as `check_batch`.
        """
        where = _name(module, "train_dataloader", batch_idx)
        sampled = not self._has_trained or module.log_is_due()
        vocab_size = module.model.embedding.num_embeddings
        check_batch(batch, vocab_size, where=where, sampled=sampled, first=not self._has_trained)

    def check_first_step(self, module: TrainedModule, targets: Tensor) -> None:
        """Refuses a first step whose `targets`, their number over all ranks and micro-batches, is zero.

        Raises:
            DataError: there are none; data without any would train nothing.
        """
        if not self._has_trained:
            self._has_trained = True
            _refuse_without_targets(targets, f"{_name(module, 'train_dataloader')}: the first optimizer step")

    def check_heldout(self, module: TrainedModule, batch: object, batch_idx: int) -> None:
        """Refuses a batch that no loss can be computed for; on a GPU the first of a pass.

        Raises:
            DataError: as `check_batch`.
        """
        where = _name(module, f"{_stage(module.trainer)}_dataloader", batch_idx)
        vocab_size = module.model.embedding.num_embeddings
        check_batch(batch, vocab_size, where=where, sampled=batch_idx == 0, first=False)

    def check_heldout_targets(self, module: TrainedModule, targets: Tensor) -> None:
        """Refuses a pass without a target, whose loss would be no number.

        Raises:
            DataError: there are none.
        """
        # The few batches of Lightning's sanity check prove nothing.
        if not module.trainer.sanity_checking:
            stage = _stage(module.trainer)
            _refuse_without_targets(targets, f"{_name(module, f'{stage}_dataloader')}: the {stage} data")

    def check_prompts(self, module: TrainedModule, batch: object, batch_idx: int) -> None:
        """Refuses a batch that holds no prompts.

        Raises:
            DataError: as `check_prompt_batch`.
        """
        check_prompt_batch(batch, _name(module, "predict_dataloader", batch_idx))


def _refuse_without_targets(targets: Tensor, name: str) -> None:
    if int(targets) == 0:
        raise DataError(
            f"{name} has no target, all labels are -100; give every token that is to be learned the id of the token "
            "that follows."
        )


def _stage(trainer: L.Trainer) -> str:
    return "test" if trainer.testing else "val"


def _name(module: TrainedModule, loader: str, batch_idx: int | None = None) -> str:
    data = data_of(module._trainer)
    name = loader if data is None else f"{type(data).__name__}.{loader}"
    return name if batch_idx is None else f"batch {batch_idx} of {name}"
