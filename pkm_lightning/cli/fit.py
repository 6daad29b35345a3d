"""`fit`: trains, tests and records a run; continues it where it was interrupted."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from pkm_lightning.build.model import attention_context, build_meta_model
from pkm_lightning.callbacks import RunInterrupted, StepCheckpoint
from pkm_lightning.checkpoints import latest_checkpoint, open_checkpoint
from pkm_lightning.cli.assembly import Assembly, assemble, complete
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.resume import differences, is_spread, saved_config, spread_anew
from pkm_lightning.cli.run_directory import RunDirectory
from pkm_lightning.cli.summary import print_summary
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.errors import ConfigError, DataError, Interrupted, RankLostError, RunDirectoryError
from pkm_lightning.model import model_cost
from pkm_lightning.supervision.external_ranks import Decision, ExternalRanks, check_world, join
from pkm_lightning.supervision.rank_failures import (
    describe,
    end_on_lost_rank,
    leave_error_to_rank_0,
    name_lost_rank,
    watch_ranks,
)
from pkm_lightning.supervision.signals import exit_code, stop_on_signals
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.run_record import now, reset_peak_memory, start_record

_log = logging.getLogger(__name__)


def run(job: Job) -> float | None:
    """Trains the configured model; returns the test loss, which sweepers minimise."""
    with leave_error_to_rank_0():
        return _run(job)


def _run(job: Job) -> float | None:
    if job.config.ckpt is not None:
        raise ConfigError(
            f"ckpt={job.config.ckpt}: fit takes no checkpoint; continue a run with run_dir=ITS_DIRECTORY."
        )
    config, data = complete(plain(job.config))
    assembly = assemble(config)
    outside = join(assembly.trainer)
    if (outside.rank if outside else getattr(rank_zero_only, "rank", 0)) != 0:
        return _run_other_rank(job, config, data, assembly, outside)
    with contextlib.ExitStack() as stack, end_on_lost_rank(assembly.trainer, Path(config["run_dir"])):
        with outside.refuse_on_error() if outside else contextlib.nullcontext():
            directory = RunDirectory(config["run_dir"], resume=config["resume"])
            stack.callback(directory.close)
            checkpoint = directory.checkpoint()
            if directory.resumes:
                config, data = _take_up(job, directory.path, config, data)
                assembly = assemble(config, resumed_step=_step(checkpoint))
            if checkpoint is not None:
                open_checkpoint(checkpoint)  # refuses a damaged one in one sentence
            if outside:
                check_world(assembly.trainer, outside.world_size)
        if outside:
            outside.send(Decision(config, checkpoint))
        return _recorded(directory, config, data, assembly, checkpoint)


def _run_other_rank(
    job: Job, config: dict[str, Any], data: L.LightningDataModule, assembly: Assembly, outside: ExternalRanks | None
) -> float | None:
    """The first rank has decided: this one neither holds the directory nor writes the record."""
    path = Path(config["run_dir"])
    with end_on_lost_rank(assembly.trainer, path):
        if outside:
            decision = outside.receive()
            checkpoint = decision.checkpoint
            config, data = complete(decision.config)
            assembly = assemble(config)
        else:
            checkpoint = latest_checkpoint(path)
            if (path / "config.yaml").exists():
                config, data = _take_up(job, path, config, data)
                assembly = assemble(config)
    with end_on_lost_rank(assembly.trainer, path), watch_ranks(assembly.trainer, path):
        try:
            return _train(config, data, assembly, checkpoint)
        except RunInterrupted as stop:
            # An error here would make the first rank end as for a loss, before it could write its record.
            raise Interrupted("", 0) from stop


def _take_up(
    job: Job, path: Path, config: dict[str, Any], data: L.LightningDataModule
) -> tuple[dict[str, Any], L.LightningDataModule]:
    """The saved configuration, if the command says nothing else than over what the run is spread from now on."""
    keys = [key_of(override) for override in job.overrides]
    said = [key for key in keys if key not in ("run_dir", "resume", "trust_config")]
    only_spread = all(map(is_spread, said))
    # What is run then is the saved configuration, not the command's.
    saved = saved_config(path, trust=config["trust_config"] or not only_spread)
    if only_spread:
        taken = spread_anew(saved, config, said)
        return complete({**taken, "resume": config["resume"], "trust_config": config["trust_config"]})
    different = differences(saved, config)
    if different:
        raise RunDirectoryError(
            f"run_dir={path} holds an interrupted run with another configuration ({'; '.join(different[:5])}"
            f"{'; ...' if len(different) > 5 else ''}); leave the overrides out to continue it, choose another "
            "run_dir, or replace it with resume=never."
        )
    return config, data


def _step(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None else int(checkpoint.stem.removeprefix("step-"))


def _recorded(
    directory: RunDirectory,
    config: dict[str, Any],
    data: L.LightningDataModule,
    assembly: Assembly,
    checkpoint: Path | None,
) -> float | None:
    """Trains with run.json kept up to date, whatever happens."""
    cost = model_cost(build_meta_model(config), attention_context(config))
    earlier = directory.record.get("seconds", {}).get("total", 0.0) if directory.resumes else 0.0
    record = start_record(config, cost)
    if directory.resumes:
        record["started"] = directory.record.get("started", record["started"])
        _log.info("continues the run in %s", directory.path)
    directory.save_config(config)
    directory.save_record(record)
    began = time.perf_counter()
    reset_peak_memory()

    def end(status: str, **fields: Any) -> None:
        seconds = record["seconds"]
        record.update(assembly.record.fields(assembly.trainer))
        record.update(status=status, ended=now(), **fields)
        total = round(earlier + time.perf_counter() - began, 3)
        record["seconds"] = {**seconds, **record["seconds"], "total": total}
        directory.save_record(record)

    def close_record(reason: str) -> None:
        end("interrupted", reason=reason)

    with (
        end_on_lost_rank(assembly.trainer, directory.path),
        watch_ranks(assembly.trainer, directory.path, close_record),
    ):
        try:
            loss = _train(config, data, assembly, checkpoint)
        except BaseException as error:
            # Lightning turns a KeyboardInterrupt inside the Trainer into SystemExit.
            stopped = isinstance(error, SystemExit) and assembly.trainer.interrupted
            if stopped or isinstance(error, RunInterrupted | KeyboardInterrupt):
                end("interrupted")
                message = f"interrupted; the same command with run_dir={directory.path} continues"
                raise Interrupted(message, exit_code(error)) from None
            if isinstance(error, RankLostError):
                close_record(str(error))
            else:
                end("failed", reason=describe(error))
            raise
    end("finished")
    print_summary(record, assembly.callbacks)
    _log.info("run directory: %s", directory.path)
    return loss


def _train(
    config: dict[str, Any],
    data: L.LightningDataModule,
    assembly: Assembly,
    checkpoint: Path | None,
) -> float | None:
    """Builds the data, fits, tests; `assembly.record` watches."""
    trainer, callbacks = assembly.trainer, assembly.callbacks
    L.seed_everything(config["seed"], workers=True, verbose=False)
    module = LanguageModule(config)
    request_stop = next((c.request_stop for c in callbacks if isinstance(c, StepCheckpoint)), None)
    with name_lost_rank(trainer), stop_on_signals(trainer, request_stop):
        data.prepare_data()
        trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
        if trainer.global_step == 0:
            raise DataError(f"{type(data).__name__}.train_dataloader gave no batch; no training step was taken.")
        _test(trainer, module, data)
    metrics = assembly.record.metrics
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        _log.warning("%s: not finite; the run diverged, or its data had no targets", ", ".join(broken))
    return metrics.get("test/loss", metrics.get("val/loss"))


def _test(trainer: L.Trainer, module: LanguageModule, data: L.LightningDataModule) -> None:
    """Tests, or validates where the data module has no test data."""
    if is_overridden("test_dataloader", data):
        trainer.test(module, datamodule=data, verbose=False)
    elif is_overridden("val_dataloader", data):
        trainer.validate(module, datamodule=data, verbose=False)
