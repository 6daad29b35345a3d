"""What every verb needs: a resolved configuration, a data module, a module, a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

from pkm_lightning.build.instantiate import instantiate, target_class
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.build.sizing import solve_size
from pkm_lightning.callbacks import Instability, MetricsCSV, RunRecord, StepCheckpoint
from pkm_lightning.capacity import check_setting
from pkm_lightning.checkpoints.atomic import AtomicCheckpointIO
from pkm_lightning.errors import ConfigError, check_integer, check_range
from pkm_lightning.strategies.portable import PortableCheckpoints
from pkm_lightning.training.optimizer import configured_schedule
from pkm_lightning.training.table_learning import check_learning


def complete(config: dict[str, Any]) -> tuple[dict[str, Any], L.LightningDataModule]:
    """The configuration with vocabulary and plugin size filled in, checked as far as shapes go, and its data module.

    Nothing is built or written: the data module is only constructed, the model only on the meta device.

    Raises:
        ConfigError: whatever cannot work.
    """
    for name in ("log_every_n_steps", "accumulate_grad_batches"):
        check_integer(f"trainer.{name}", config["trainer"][name], 1)
    check_integer("trainer.num_nodes", config["trainer"]["num_nodes"], 1)
    if isinstance(config["trainer"]["devices"], bool):
        raise ConfigError(f"trainer.devices={config['trainer']['devices']} is no number of devices; give one.")
    if config["trainer"].get("gradient_clip_val") is not None:
        check_range("trainer.gradient_clip_val", config["trainer"]["gradient_clip_val"], 0)
    if config["trainer"].get("gradient_clip_algorithm") == "value":
        raise ConfigError("trainer.gradient_clip_algorithm=value is not offered; allowed: norm.")
    interval = config["trainer"]["val_check_interval"]
    if isinstance(interval, int | float):
        check_range("trainer.val_check_interval", interval, 1 if isinstance(interval, int) else 1e-9)
    check_integer("seed", config["seed"], 0, 2**32 - 1)
    data = instantiate(config["data"], "data")
    if not isinstance(data, L.LightningDataModule):
        raise ConfigError(f"data._target_={config['data']['_target_']} is no LightningDataModule.")
    config = {**config, "model": {**config["model"], "vocab_size": _vocab_size(config, data)}}
    check_learning(config)
    config = solve_size(config)
    check_setting(build_meta_model(config), config)
    configured_schedule(config["optim"], config["trainer"]["max_steps"])
    return config, data


def _vocab_size(config: dict[str, Any], data: L.LightningDataModule) -> int:
    given, needed = config["model"]["vocab_size"], getattr(data, "vocab_size", None)
    if given == "auto":
        if needed is None:
            raise ConfigError(
                f"model.vocab_size=auto, but {type(data).__name__} has no vocab_size; set model.vocab_size to a number."
            )
        return int(needed)
    if not isinstance(given, int) or isinstance(given, bool):
        raise ConfigError(f"model.vocab_size={given!r} is neither auto nor a number.")
    if needed is not None and given < needed:
        raise ConfigError(
            f"model.vocab_size={given} is too small: the data's tokens need {needed}; "
            "set model.vocab_size=auto or lower data.vocab_size."
        )
    return given


@runtime_checkable
class ChecksConfig(Protocol):
    """A callback that cannot do its work with every configuration."""

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError for what cannot work, before anything starts."""


@dataclass(frozen=True)
class Assembly:
    """A Trainer, the configured callbacks in it, and the one that gathers what goes into run.json."""

    trainer: L.Trainer
    callbacks: list[L.Callback]
    record: RunRecord


def assemble(config: dict[str, Any], *, resumed_step: int | None = None) -> Assembly:
    """The Trainer of a training run with its callbacks and loggers; nothing is started or written yet.

    Args:
        config: a completed configuration.
        resumed_step: step that the run continues after; TensorBoard forgets what an earlier sitting logged later.

    Raises:
        ConfigError: as `make_trainer`; a table in a file, which cannot learn.
    """
    if config["table"].get("device") == "mmap":
        raise ConfigError(
            "table.device=mmap is for validate, test and predict: a table that stays in a file cannot learn; say "
            "table.device=cpu, or export the run when it is trained."
        )
    callbacks, record = make_callbacks(config), RunRecord()
    for callback in callbacks:
        if isinstance(callback, ChecksConfig):
            callback.check(config)
    trainer = make_trainer(config, callbacks=[*callbacks, record], loggers=make_loggers(config, resumed_step))
    return Assembly(trainer, callbacks, record)


def make_trainer(config: dict[str, Any], *, callbacks: list[L.Callback], loggers: list[Any]) -> L.Trainer:
    """Lightning's Trainer with the configured strategy.

    Raises:
        ConfigError: several devices without a strategy for them, or a value that Lightning refuses.
    """
    strategy: Any = "auto"
    devices = config["trainer"]["devices"]
    if config["strategy"]:
        strategy = instantiate(config["strategy"], "strategy")
    elif devices not in (1, "1"):
        raise ConfigError(f"trainer.devices={devices} needs a strategy for several processes; set strategy=ddp.")
    # Without these Lightning would add a checkpoint callback and a progress bar of its own.
    checkpointing = any(isinstance(callback, Checkpoint) for callback in callbacks)
    try:
        trainer: L.Trainer = instantiate(
            {
                "enable_checkpointing": checkpointing,
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
    return trainer


def _checkpoint_io(callbacks: list[L.Callback], strategy: Any) -> CheckpointIO:
    """Writes single files; strategies of several processes write by themselves."""
    asynchronous = any(isinstance(c, StepCheckpoint) and c.asynchronous for c in callbacks)
    if isinstance(strategy, PortableCheckpoints):
        strategy.asynchronous = asynchronous
        return AtomicCheckpointIO()
    return AsyncCheckpointIO(AtomicCheckpointIO()) if asynchronous else AtomicCheckpointIO()


def make_callbacks(config: dict[str, Any]) -> list[L.Callback]:
    """The configured callbacks, in the order of the configuration.

    `MetricsCSV` comes behind them, to see what all others log, and at last what may go back to an earlier step.
    """
    made = [instantiate(c, f"callbacks.{name}") for name, c in (config["callbacks"] or {}).items() if c]
    return sorted(made, key=lambda c: 2 if isinstance(c, Instability) else int(isinstance(c, MetricsCSV)))


def make_loggers(config: dict[str, Any], resumed_step: int | None = None) -> list[Any]:
    """The configured loggers."""
    loggers = []
    for name, logger in (config["logger"] or {}).items():
        if logger:
            key = f"logger.{name}"
            board = issubclass(target_class(logger, key), TensorBoardLogger)
            purge = {"purge_step": resumed_step + 1} if board and resumed_step is not None else {}
            loggers.append(instantiate(logger, key, **purge))
    return loggers
