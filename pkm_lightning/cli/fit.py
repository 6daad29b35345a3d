"""`fit`: trains, tests and records a run; continues it where it was interrupted."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.callbacks.step_checkpoint import RunInterrupted, StepCheckpoint
from pkm_lightning.checkpoints.latest import latest_checkpoint
from pkm_lightning.cli.assembly import Assembly, assemble
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.resume import differences, is_spread, load_checkpoint, saved_config, spread_anew
from pkm_lightning.cli.run_directory import RunDirectory, continues_run
from pkm_lightning.cli.summary import print_summary
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.errors import ConfigError, DataError, Interrupted, RankLostError, RunDirectoryError
from pkm_lightning.supervision import LastWords
from pkm_lightning.supervision.external_ranks import Decision, Outside, check_world, join
from pkm_lightning.supervision.rank_failures import in_words, last_words, losses_ended, losses_named, watched
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.run_record import now, reset_peak_memory, start_record

_log = logging.getLogger(__name__)
# SLURM sends SIGUSR1 where it is told to warn a job of its end; Lightning's own handler for it would write a checkpoint
# that every later start prefers to newer ones.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run(job: Job) -> float | None:
    """Trains the configured model; returns the test loss, which sweepers minimise."""
    with last_words():
        return _run(job)


def _run(job: Job) -> float | None:
    if job.config.ckpt is not None:
        raise ConfigError(
            f"ckpt={job.config.ckpt}: fit takes no checkpoint; continue a run with run_dir=ITS_DIRECTORY."
        )
    command = plain(job.config)
    path = Path(command["run_dir"])
    first = getattr(rank_zero_only, "rank", 0) == 0
    # Ranks that rank 0 has started find what it decided in the directory; others are told when they have joined it.
    continues = continues_run(path, command["resume"]) if first else LastWords.inherited() is not None
    resolved = _taken_up(job, path, command) if continues else resolve(command, trains=True)
    checkpoint = latest_checkpoint(path) if continues else None
    assembly = assemble(resolved, resumed_step=_step(checkpoint) if first else None)
    outside = join(assembly.trainer)
    if not (outside.rank == 0 if outside else first):
        return _run_other_rank(path, resolved, assembly, checkpoint, outside)
    with contextlib.ExitStack() as stack, losses_ended(assembly.trainer, path):
        with outside.refusals_told() if outside else contextlib.nullcontext():
            directory = RunDirectory(path, resume=command["resume"])
            stack.callback(directory.close)
            if directory.resumes != continues or directory.checkpoint() != checkpoint:
                raise RunDirectoryError(f"run_dir={path} has changed while this command started; run it again.")
            if checkpoint is not None:
                load_checkpoint(checkpoint)  # refuses a damaged one in one sentence
            if outside:
                check_world(assembly.trainer, outside.world_size)
        if outside:
            outside.tell(Decision(resolved.config, checkpoint))
        return _recorded(directory, resolved, assembly, checkpoint)


def _run_other_rank(
    path: Path, resolved: ResolvedRun, assembly: Assembly, checkpoint: Path | None, outside: Outside | None
) -> float | None:
    """Trains as the first rank has decided: this one neither holds the directory nor writes the record."""
    if outside:
        with losses_ended(assembly.trainer, path):
            decision = outside.hear()
            checkpoint = decision.checkpoint
            if decision.config != resolved.config:  # rank 0 continues an earlier run
                resolved = resolve(decision.config, trains=True)
                assembly = assemble(resolved)
    with losses_ended(assembly.trainer, path), watched(assembly.trainer, path):
        try:
            return _train(resolved, assembly, checkpoint)
        except RunInterrupted as stop:
            # An error here would make the first rank end as for a loss, before it could write its record.
            raise Interrupted("", 0) from stop


def _taken_up(job: Job, path: Path, command: dict[str, Any]) -> ResolvedRun:
    """Resolves the saved configuration, if the command changes nothing but over what the run is spread."""
    keys = [key_of(override) for override in job.overrides]
    changed = [key for key in keys if key not in ("run_dir", "resume", "trust_config")]
    only_spread = all(map(is_spread, changed))
    # What is run then is the saved configuration, not the command's.
    saved = saved_config(path, trust=command["trust_config"] or not only_spread)
    if only_spread:
        config = spread_anew(saved, command, changed)
        return resolve({**config, **{key: command[key] for key in ("resume", "trust_config")}}, trains=True)
    resolved = resolve(command, trains=True)
    different = differences(saved, resolved.config)
    if different:
        raise RunDirectoryError(
            f"run_dir={path} holds an interrupted run with another configuration ({'; '.join(different[:5])}"
            f"{'; ...' if len(different) > 5 else ''}); leave the overrides out to continue it, choose another "
            "run_dir, or replace it with resume=never."
        )
    return resolved


def _step(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None else int(checkpoint.stem.removeprefix("step-"))


def _recorded(
    directory: RunDirectory, resolved: ResolvedRun, assembly: Assembly, checkpoint: Path | None
) -> float | None:
    """Trains with run.json kept up to date, whatever happens."""
    earlier = directory.record.get("seconds", {}).get("total", 0.0) if directory.resumes else 0.0
    record = start_record(resolved.config, resolved.cost)
    if directory.resumes:
        record["started"] = directory.record.get("started", record["started"])
        _log.info("continues the run in %s", directory.path)
    directory.save_config(resolved.config)
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

    with losses_ended(assembly.trainer, directory.path), watched(assembly.trainer, directory.path, close_record):
        try:
            loss = _train(resolved, assembly, checkpoint)
        except BaseException as error:
            # Lightning turns a KeyboardInterrupt inside the Trainer into SystemExit.
            stopped = isinstance(error, SystemExit) and assembly.trainer.interrupted
            if stopped or isinstance(error, RunInterrupted | KeyboardInterrupt):
                end("interrupted")
                message = f"interrupted; the same command with run_dir={directory.path} continues"
                raise Interrupted(message, _exit_code(error)) from None
            if isinstance(error, RankLostError):
                close_record(str(error))
            else:
                end("failed", reason=in_words(error))
            raise
    end("finished")
    print_summary(record, assembly.callbacks)
    _log.info("run directory: %s", directory.path)
    return loss


def _exit_code(stop: BaseException) -> int:
    """128 and the number of the signal, as a shell would say it."""
    return 128 + next((number for number in _SIGNALS if number.name == str(stop)), signal.SIGINT)


def _train(resolved: ResolvedRun, assembly: Assembly, checkpoint: Path | None) -> float | None:
    """Builds the data, fits, tests; `assembly.record` watches."""
    trainer, callbacks, data = assembly.trainer, assembly.callbacks, resolved.data
    L.seed_everything(resolved.config["seed"], workers=True, verbose=False)
    module = LanguageModule(resolved.config)
    with losses_named(trainer), _stops_gracefully(trainer, callbacks):
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


@contextlib.contextmanager
def _stops_gracefully(trainer: L.Trainer, callbacks: list[L.Callback]) -> Iterator[None]:
    """The signals ask for a checkpoint at the end of the step; outside training, or twice, they stop at once."""
    checkpoints = [c for c in callbacks if isinstance(c, StepCheckpoint)]
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    asked = False

    def stop(number: int, _frame: object) -> None:
        nonlocal asked
        name = signal.Signals(number).name
        if asked or not checkpoints or trainer.state.fn != "fit":
            raise KeyboardInterrupt(name)
        asked = True
        checkpoints[0].request_stop(name)

    # Lightning's handler of SIGTERM broadcasts from within itself, in the middle of a step, what no rank waits for.
    trainer._signal_connector.register_signal_handlers = _leave_ours  # type: ignore[method-assign]
    for number in _SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_ours() -> None:
    """In place of what would register handlers beside those of `_stops_gracefully`."""
