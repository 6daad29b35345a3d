"""The loggers of a run: made when its directory is held, continued by the run that resumes, ended with it.

Weights & Biases and MLflow keep runs of their own, whose ids run.json holds. Only the first rank has them, and MLflow's
store, which Lightning opens when it constructs the logger, is in the run directory unless another one is named.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from pkm_lightning.build.instantiate import check_kind, instantiate, target_class
from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.callbacks.step_checkpoint import RunInterrupted
from pkm_lightning.cli.hyperparameters import hyperparameters
from pkm_lightning.errors import ConfigError, missing_extra, nearest
from pkm_lightning.supervision.rank_failures import was_stopped

_log = logging.getLogger(__name__)
Config = Mapping[str, Any]
Status = Literal["finished", "failed", "interrupted"]

#: The package of each tracker, and the extra that installs it.
_PACKAGES: dict[type[Logger], tuple[str, str]] = {WandbLogger: ("wandb", "wandb"), MLFlowLogger: ("mlflow", "mlflow")}
#: What Lightning's loggers set for the whole process; a sweep goes on in it.
_VARIABLES = ("WANDB_MODE", "MLFLOW_TRACKING_URI")
_ID = re.compile(r"[\w-]+")


def check_loggers(config: Config) -> None:
    """Refuses what is no logger, a tracker whose package is not installed, and arguments that wandb.init does not take.

    Raises:
        ConfigError: naming the key, and for a package the command that installs it.
    """
    for name, cls, entry in _configured(config):
        if not issubclass(cls, Logger):
            raise ConfigError(f"logger.{name}._target_={entry['_target_']} is not a {Logger.__module__}.Logger.")
        for tracker, (package, extra) in _PACKAGES.items():
            if issubclass(cls, tracker) and find_spec(package) is None:
                raise missing_extra(f"logger={name}", package, extra)
        if cls is WandbLogger:
            _check_wandb(name, entry)


def _check_wandb(name: str, entry: Config) -> None:
    # The constructor takes any keyword, and passes it on when the run starts.
    import wandb

    of_logger, passed_on = (inspect.signature(call).parameters for call in (WandbLogger, wandb.init))
    for argument in entry:
        if argument not in of_logger and argument not in passed_on and not argument.startswith("_"):
            raise ConfigError(
                f"logger.{name}.{argument} is not an argument of wandb.init, which takes {', '.join(passed_on)}."
                f"{nearest(argument, passed_on)}"
            )


def _configured(config: Config) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Yields name, class and arguments of each configured logger."""
    for name, entry in (config["logger"] or {}).items():
        if entry:
            yield name, target_class(entry, f"logger.{name}"), dict(entry)


@contextlib.contextmanager
def attached(
    trainer: L.Trainer, run: ResolvedRun, *, resumed_step: int | None, ids: Mapping[str, Any]
) -> Iterator[None]:
    """Gives the Trainer the loggers of the run, which know its hyperparameters; when the block ends, so do their runs.

    Args:
        trainer: made without loggers.
        run: the run, whose directory exists.
        resumed_step: step that the run continues after; None if it starts.
        ids: of the trackers' runs that are continued, by name of the logger.

    Raises:
        ConfigError: a tracker cannot start, for example without a login or a server.
    """
    environment = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        settings = hyperparameters(run)
        for name, cls, entry in _configured(run.config):
            logger = _make(name, cls, entry, run.config, resumed_step, ids.get(name), is_first=trainer.is_global_zero)
            # At once, so that it ends if the next one cannot start.
            trainer.loggers = [*trainer.loggers, logger]
            if trainer.is_global_zero and not (isinstance(logger, MLFlowLogger) and name in ids):
                logger.log_hyperparams(settings)  # MLflow lets nobody change a parameter of a run that is continued
        yield
    except BaseException as error:
        stopped = isinstance(error, RunInterrupted) or was_stopped(error, trainer)
        _end(trainer.loggers, "interrupted" if stopped else "failed")
        raise
    else:
        _end(trainer.loggers, "finished")
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _make(
    name: str,
    cls: type,
    entry: dict[str, Any],
    config: Config,
    resumed_step: int | None,
    saved_id: Any,
    *,
    is_first: bool,
) -> Logger:
    """Returns a logger, on other ranks than the first a stand-in for one that would write at once."""
    key = f"logger.{name}"
    continued = saved_id if isinstance(saved_id, str) and _ID.fullmatch(saved_id) else None
    if issubclass(cls, MLFlowLogger):
        return _mlflow(entry, key, config, continued) if is_first else DummyLogger()
    extra: dict[str, Any] = {}
    if issubclass(cls, TensorBoardLogger) and resumed_step is not None:
        extra = {"purge_step": resumed_step + 1}
    elif issubclass(cls, WandbLogger) and continued and not (entry.get("id") or entry.get("version")):
        extra = {"version": continued}
    if issubclass(cls, WandbLogger) and not entry.get("settings"):
        extra["settings"] = _terse()
    logger: Logger = instantiate(entry, key, **extra)
    check_kind(logger, Logger, entry, key)
    if isinstance(logger, WandbLogger) and is_first:
        if logger._wandb_init.get("anonymous") is None:
            # Lightning 2.6 passes on what wandb has given up, and warns of.
            logger._wandb_init.pop("anonymous", None)
        with _explained(key, f"log in with `wandb login`, or set {key}.offline=true"):
            _ = logger.experiment
    return logger


def _terse() -> Any:
    """Returns settings with which wandb names the run and how to send it, without every figure once more."""
    import wandb

    settings = wandb.Settings()
    for name in ("max_end_of_run_history_metrics", "max_end_of_run_summary_metrics"):
        if hasattr(settings, name):  # earlier versions had no such limit
            setattr(settings, name, 0)
    return settings


def _mlflow(entry: dict[str, Any], key: str, config: Config, continued: str | None) -> MLFlowLogger:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else it reports every table that it creates
    extra = {"tracking_uri": entry.pop("tracking_uri", None) or os.environ.get("MLFLOW_TRACKING_URI")}
    folder = Path(config["run_dir"]).absolute() / "mlflow"
    if not extra["tracking_uri"]:
        folder.mkdir(parents=True, exist_ok=True)
        extra["tracking_uri"] = f"sqlite:///{folder / 'mlflow.db'}"
        if not entry.get("artifact_location"):
            entry.pop("artifact_location", None)
            extra["artifact_location"] = (folder / "artifacts").as_uri()
    if continued and not entry.get("run_id"):
        entry.pop("run_id", None)
        extra["run_id"] = continued
    remedy = f"is {extra['tracking_uri']}, of {key}.tracking_uri or MLFLOW_TRACKING_URI, the store of this run?"
    with _explained(key, remedy), _without_syncs(folder / "mlflow.db"):
        logger: MLFlowLogger = instantiate(entry, key, **extra)
        if logger.run_id == continued:
            logger.experiment.update_run(continued, status="RUNNING")
    return logger


@contextlib.contextmanager
def _without_syncs(file: Path) -> Iterator[None]:
    """Lets connections to the SQLite database `file` that begin in the block never wait for the disk.

    MLflow 3 creates its tables in some hundred transactions, which takes a minute where the disk is slow or busy. A
    killed process loses nothing, and after a loss of power metrics.csv has the figures.
    """
    try:
        from sqlalchemy import event
        from sqlalchemy.engine import Engine
    except ImportError:  # which stores on servers do not need
        yield
        return

    def relax(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            opened = connection.execute("PRAGMA database_list").fetchone()[2]
            if os.path.realpath(opened) == os.path.realpath(file):
                connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        event.remove(Engine, "connect", relax)


@contextlib.contextmanager
def _explained(key: str, remedy: str) -> Iterator[None]:
    """Turns what a tracker raises when it starts into an error of the configuration."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{key} cannot start: {reason}; {remedy}.") from error


def ids_of(config: Config, loggers: Sequence[Logger]) -> dict[str, str]:
    """Returns the ids of the trackers' runs, for run.json, by name of the logger."""
    named = zip((name for name, *_ in _configured(config)), loggers, strict=False)
    return {name: str(logger.version) for name, logger in named if isinstance(logger, WandbLogger | MLFlowLogger)}


def _end(loggers: Sequence[Logger], status: Status) -> None:
    """Ends the trackers' runs; an error of theirs does not take the place of that of the run."""
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code={"finished": 0, "failed": 1, "interrupted": 255}[status])
            elif isinstance(logger, MLFlowLogger):
                ended = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[status]
                logger.experiment.set_terminated(logger.run_id, ended)
        except Exception as error:
            _log.warning("%s does not know that the run has %s: %s", type(logger).__name__, status, error)
