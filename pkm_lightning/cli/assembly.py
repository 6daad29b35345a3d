"""From a resolved run to Lightning's Trainer, with its strategy, callbacks and writer of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.strategies import Strategy

from pkm_lightning.build.instantiate import check_kind, instantiate
from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.callbacks.run_record import RunRecord
from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.checkpoints.atomic import AtomicCheckpointIO
from pkm_lightning.cli.loggers import check_loggers
from pkm_lightning.errors import ConfigError
from pkm_lightning.strategies.portable import PortableCheckpoints


@dataclass(frozen=True)
class Assembly:
    """A Trainer, the configured callbacks in it, and the one that collects what goes into run.json."""

    trainer: L.Trainer
    callbacks: list[L.Callback]
    record: RunRecord


def assemble(run: ResolvedRun) -> Assembly:
    """Returns the Trainer of a training run with its callbacks; nothing is started or written yet.

    Its loggers come later (`pkm_lightning.cli.loggers.attached`), since some of them write as soon as they are made.

    Args:
        run: resolved with `training=True`.

    Raises:
        ConfigError: as `make_trainer`, or a logger's package is not installed.
    """
    check_loggers(run.config)
    record = RunRecord()
    trainer = make_trainer(run.config, callbacks=[*run.callbacks, record], loggers=[])
    return Assembly(trainer, run.callbacks, record)


def make_trainer(config: dict[str, Any], *, callbacks: list[L.Callback], loggers: list[Logger]) -> L.Trainer:
    """Returns Lightning's Trainer with the configured strategy.

    Raises:
        ConfigError: a value that Lightning refuses.
    """
    strategy: Any = instantiate(config["strategy"], "strategy") if config["strategy"] else "auto"
    if config["strategy"]:
        check_kind(strategy, Strategy, config["strategy"], "strategy")
    try:
        trainer: L.Trainer = instantiate(
            {
                # Without these two Lightning would add a checkpoint callback and a progress bar of its own.
                "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
                "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
                "default_root_dir": config["run_dir"],
                **config["trainer"],
            },
            "trainer",
            strategy=strategy,
            callbacks=list(callbacks),
            logger=loggers or False,
            plugins=[_checkpoint_io(callbacks, strategy)],
        )
    except Exception as error:
        raise ConfigError(f"trainer: {' '.join(str(error.__cause__ or error).split())}") from error
    check_kind(trainer, L.Trainer, config["trainer"], "trainer")
    return trainer


def _checkpoint_io(callbacks: list[L.Callback], strategy: Any) -> CheckpointIO:
    """Returns the writer of single files; strategies of several processes write their folders themselves."""
    asynchronous = any(isinstance(c, StepCheckpoint) and c.asynchronous for c in callbacks)
    if isinstance(strategy, PortableCheckpoints):
        strategy.asynchronous = asynchronous
        return AtomicCheckpointIO()
    return AsyncCheckpointIO(AtomicCheckpointIO()) if asynchronous else AtomicCheckpointIO()
