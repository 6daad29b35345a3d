"""`fit`: trains, tests and records a run, or continues one that was interrupted.

In order: the configuration is resolved once (the saved one of a run that is continued), the Trainer is made, ranks that
were started externally are joined, rank 0 locks the run directory, then all ranks train.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from pkm_lightning.build.checks import remark_rate, remark_replaced, remark_row_optimizer, remark_validation
from pkm_lightning.build.freezing import parameter_counts, trained_bytes
from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.build.stored_tables import check_first_rows, check_stored_rows
from pkm_lightning.callbacks.median_stopping import MedianStopping
from pkm_lightning.callbacks.objective import Objective
from pkm_lightning.callbacks.step_checkpoint import RunInterrupted, StepCheckpoint
from pkm_lightning.capacity import check_allocatable
from pkm_lightning.checkpoints import later_buffers, latest_checkpoint, open_checkpoint
from pkm_lightning.checkpoints.edit_folder import remark_edits
from pkm_lightning.cli.assembly import Assembly, assemble
from pkm_lightning.cli.initial_weights import initial_weights, refuse_replaced, start_from_weights, with_saved_tokenizer
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.lengthening import (
    LengthenedSchedule,
    checkpoint_to_continue,
    describe_length,
    is_lengthened,
    with_length,
)
from pkm_lightning.cli.loggers import attached
from pkm_lightning.cli.objective import check_objective_of, check_questions
from pkm_lightning.cli.places import cache_of
from pkm_lightning.cli.repeated_sweep import has_ended_in_sweep, value_of_ended
from pkm_lightning.cli.resume import (
    OF_COMMAND,
    differences,
    keys_of_command,
    may_change_on_resume,
    refuse_differences,
    refuse_earlier_data,
    saved_config,
    unresolved,
    with_changes,
    with_machine_overrides,
)
from pkm_lightning.cli.run_directory import RunDirectory, continues_run
from pkm_lightning.cli.sitting import Sitting
from pkm_lightning.cli.summary import print_summary
from pkm_lightning.compare.objective import direction_of
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.data.base import defines
from pkm_lightning.errors import ConfigError, DataError, Interrupted, RankLostError, RunDirectoryError
from pkm_lightning.supervision.external_ranks import Decision, ExternalRanks, check_world, join, started_externally
from pkm_lightning.supervision.rank_failures import (
    end_on_lost_rank,
    leave_error_to_rank_0,
    name_lost_rank,
    was_stopped,
    watch_ranks,
)
from pkm_lightning.supervision.signals import exit_code, stop_on_signals
from pkm_lightning.training import LanguageModule

_log = logging.getLogger(__name__)


def run(job: Job) -> float | None:
    """Trains the configured model.

    Returns:
        The objective at the last validation, for sweepers; None without one, or where it is not finite.
    """
    with leave_error_to_rank_0():
        return _run(job)


def _check_start(job: Job) -> None:
    """Refuses weights to start from that cannot be those of a new run.

    Raises:
        ConfigError: a checkpoint, or weights in the directory of the run.
    """
    if job.config.ckpt is not None:
        raise ConfigError(
            f"ckpt={job.config.ckpt}: fit takes no checkpoint; continue a run with run_dir=ITS_DIRECTORY, or start one "
            "from its weights with init_from=PATH."
        )
    if job.config.init_from is not None and job.sets("init_from"):
        refuse_replaced(job.config.init_from, job.config.run_dir, f"init_from={job.config.init_from}")


def _run(job: Job) -> float | None:
    _check_start(job)
    command = plain(job.config)
    check_objective_of(command)
    path = Path(command["run_dir"])
    # A run that continues from a checkpoint of its own does not need the weights that it started from.
    starts = command["resume"] == "never" or latest_checkpoint(path) is None
    if command["init_from"] and starts and not job.is_on_saved:
        command = start_from_weights(command, sets_tokenizer=job.sets("data.tokenizer"))
    is_external = started_externally()
    if not is_external and getattr(rank_zero_only, "rank", 0) != 0:
        # Rank 0 has started this rank before it writes a record, so both decide by the same files.
        resumes = continues_run(path, command["resume"])
        checkpoint = _checkpoint(job, path) if resumes else None
        resolved = _resolve_saved(job, path, command, checkpoint, None) if resumes else resolve(command, training=True)
        return _run_other_rank(path, resolved, assemble(resolved), checkpoint)
    if not is_external and has_ended_in_sweep(path, command):
        return value_of_ended(path, command, sets_tokenizer=job.sets("data.tokenizer"))
    of_command: ResolvedRun | None = None
    external: ExternalRanks | None = None
    if is_external:
        # All ranks join with the configuration of the command, so that no refusal of rank 0 below leaves them waiting.
        of_command = resolve(command, training=True)
        assembly = assemble(of_command)
        external = join(assembly.trainer)
        if external and external.rank != 0:
            return _run_external_rank(path, of_command, assembly, external)
    with contextlib.ExitStack() as stack:
        if external:
            stack.enter_context(end_on_lost_rank(assembly.trainer, path))
        with external.refuse_on_error() if external else contextlib.nullcontext():
            resumes = continues_run(path, command["resume"])
            if job.is_on_saved and not resumes:
                raise RunDirectoryError(f"run_dir={path} has changed while this command started; run it again.")
            latest = latest_checkpoint(path) if resumes else None
            checkpoint = _checkpoint(job, path) if resumes else None
            if resumes:
                resolved = _resolve_saved(job, path, command, checkpoint, of_command)
            else:
                resolved = of_command or resolve(command, training=True)
            check_allocatable(resolved.plan, resolved.config)
            config = resolved.config
            remarks = (remark_rate(config), remark_replaced(config), remark_row_optimizer(config))
            for remark in filter(None, (remark_validation(config["trainer"]), *remarks)):
                _log.info(remark)
            if config["optim"].get("freeze") or config.get("finetune"):
                _log.info(
                    "parameters that may learn / frozen: %s / %s", *map("{:,}".format, parameter_counts(resolved.model))
                )
            assembly = assemble(resolved)
            if external:
                check_world(assembly.trainer, external.world_size)
            else:
                join(assembly.trainer)  # refuses several nodes without an external launcher
            directory = RunDirectory(path, resume=command["resume"])
            stack.callback(directory.close)
            if directory.resumes != resumes or directory.checkpoint() != latest:
                raise RunDirectoryError(f"run_dir={path} has changed while this command started; run it again.")
            if checkpoint is not None:
                _check_checkpoint(checkpoint, resolved)  # refuses one before anything starts
                _remark_length(checkpoint, latest, resolved.config)
            elif initial := initial_weights(resolved.config, checkpoint):
                initial.check(resolved)
            else:
                check_first_rows(resolved.model)
        if external:
            external.send(Decision(resolved.config, checkpoint))
        return _train_with_record(directory, resolved, assembly, checkpoint)


def _run_external_rank(path: Path, resolved: ResolvedRun, assembly: Assembly, external: ExternalRanks) -> float | None:
    """Waits for the decision of rank 0, and trains accordingly."""
    with end_on_lost_rank(assembly.trainer, path):
        decision = external.receive()
        if decision.config != resolved.config:  # rank 0 continues an earlier run
            resolved = resolve(decision.config, training=True)
            assembly = assemble(resolved)
    return _run_other_rank(path, resolved, assembly, decision.checkpoint)


def _run_other_rank(path: Path, resolved: ResolvedRun, assembly: Assembly, checkpoint: Path | None) -> float | None:
    """Trains in a rank other than the first: it neither holds the directory nor writes the record."""
    with end_on_lost_rank(assembly.trainer, path), watch_ranks(assembly.trainer, path):
        try:
            return _train(resolved, assembly, checkpoint)
        except RunInterrupted as stop:
            # An error here would end rank 0 as for a lost rank, before it could write its record.
            raise Interrupted("", 0) from stop
        except (KeyboardInterrupt, SystemExit) as stop:
            if not was_stopped(stop, assembly.trainer):
                raise
            raise Interrupted("", exit_code(stop)) from None


def _checkpoint(job: Job, path: Path) -> Path | None:
    """Returns the checkpoint that the run continues from; None before the first one."""
    latest = latest_checkpoint(path)
    # The saved length counts too: a kill while a run is made longer leaves the checkpoint of its end.
    if latest is None or not (job.is_on_saved or job.sets("trainer.max_steps")):
        return latest
    return checkpoint_to_continue(latest, OmegaConf.select(job.config, "trainer.max_steps"))


def _resolve_saved(
    job: Job, path: Path, command: dict[str, Any], checkpoint: Path | None, of_command: ResolvedRun | None
) -> ResolvedRun:
    """Resolves the saved configuration; the command line may change only the devices, strategy and sharding.

    Args:
        job, path, command: the job, its run directory and configuration.
        checkpoint: that the run continues from.
        of_command: the resolved configuration of the command, if there is one already.

    Raises:
        RunDirectoryError: the command asks for another configuration.
    """
    if job.is_on_saved:
        saved = saved_config(path, trust=command["trust_config"], cache=cache_of(command))
        refuse_earlier_data(path, saved)
        command = _with_objective(job, saved, command)
        saved, command = _with_length(job, checkpoint, saved, command)
        command = with_saved_tokenizer(saved, command, sets_tokenizer=job.sets("data.tokenizer"))
        config = with_changes(saved, command, {key_of(text) for text in job.overrides if text.startswith("~")})
        chosen = {key_of(override) for override in job.overrides}
        refuse_differences(path, saved, unresolved(saved, config, chosen))
        resolved = resolve(config, training=True)
        refuse_differences(path, saved, resolved.config)
        return resolved
    keys = [key_of(override) for override in job.overrides]
    changed = [key for key in keys if key not in ("run_dir", *OF_COMMAND)]
    only_machine = all(map(may_change_on_resume, changed))
    # With nothing else changed the saved configuration is executed, so it must be trusted; else it is only compared.
    cache = cache_of(command)
    saved = saved_config(path, trust=command["trust_config"], executed=only_machine, cache=cache)
    if only_machine:
        refuse_earlier_data(path, saved)
        config = with_machine_overrides(saved, command, changed)
        return resolve({**config, **keys_of_command(_with_objective(job, saved, command))}, training=True)
    saved, whole = _with_length(job, checkpoint, saved, command)
    whole = with_saved_tokenizer(saved, whole, sets_tokenizer=job.sets("data.tokenizer"))
    whole = _with_objective(job, saved, whole)
    resolved = of_command if of_command and whole is command else resolve(whole, training=True)
    if differences(saved, resolved.config):
        # One that is not trusted was compared with the defaults, from which it differs in what nobody has changed.
        saved_config(path, trust=command["trust_config"], cache=cache)
    refuse_differences(path, saved, resolved.config)
    return resolved


def _with_objective(job: Job, saved: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
    """Returns the command with the objective of the sweep that the run is of, unless it has one itself."""
    if job.sets("objective") or command.get("objective") is not None or saved.get("objective") is None:
        return command
    return {**command, **{key: saved.get(key) for key in ("objective", "objective_mode")}}


def _with_length(
    job: Job, checkpoint: Path | None, saved: dict[str, Any], command: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns both configurations with the length and the warm-up that the command gives the run."""
    if not job.sets("trainer.max_steps"):
        return saved, command
    longer = with_length(saved, command["trainer"].get("max_steps"), step=_step(checkpoint) or 0)
    if longer != saved and not job.sets("optim.warmup_steps"):
        command = {**command, "optim": {**command["optim"], "warmup_steps": longer["optim"]["warmup_steps"]}}
    return longer, command


def _remark_length(checkpoint: Path, latest: Path | None, config: dict[str, Any]) -> None:
    step, last = _step(checkpoint) or 0, _step(latest) or 0
    if remark := describe_length(open_checkpoint(checkpoint).config, config, step=step, undone=last - step):
        _log.info(remark)


def _check_checkpoint(path: Path, run: ResolvedRun) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.check_training()
    checkpoint.check_weights(run.weight_shapes, later_buffers(run.model, "model."))
    check_stored_rows(run.model, checkpoint)
    checkpoint.check_sums()


def _step(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None else int(checkpoint.stem.removeprefix("step-"))


def _train_with_record(
    directory: RunDirectory, resolved: ResolvedRun, assembly: Assembly, checkpoint: Path | None
) -> float | None:
    """Trains, and keeps run.json up to date from the start of training, whatever happens."""
    sitting = Sitting(directory, resolved, assembly)
    sitting.record["trained_bytes"] = trained_bytes(resolved.model)
    initial = initial_weights(resolved.config, checkpoint)
    weights = initial.checkpoint.path if initial else checkpoint
    if weights is not None and (remark := remark_edits(weights)):
        _log.warning(remark)
    if initial:
        sitting.record["init_from"] = initial.record(directory.record.get("init_from") if directory.resumes else None)
    with (
        end_on_lost_rank(assembly.trainer, directory.path),
        watch_ranks(assembly.trainer, directory.path, sitting.interrupt),
    ):
        try:
            value = _train(resolved, assembly, checkpoint, sitting)
        except BaseException as error:
            if isinstance(error, RunInterrupted) or was_stopped(error, assembly.trainer):
                sitting.interrupt()
                message = f"interrupted; the same command with run_dir={directory.path} continues"
                raise Interrupted(message, exit_code(error)) from None
            if isinstance(error, RankLostError):
                sitting.interrupt(str(error))
            else:
                sitting.fail(error)
            raise
    if reason := _pruned(assembly.callbacks):
        sitting.prune(reason)
    else:
        sitting.finish()
        print_summary(sitting.record, assembly.callbacks, parameter_counts(resolved.model))
    _log.info("run directory: %s", directory.path)
    return value


def _train(
    resolved: ResolvedRun, assembly: Assembly, checkpoint: Path | None, sitting: Sitting | None = None
) -> float | None:
    """Builds the data, fits and tests; `assembly.record` collects what goes into run.json, rank 0 has a `sitting`."""
    trainer, callbacks, data = assembly.trainer, assembly.callbacks, resolved.data
    L.seed_everything(resolved.config["seed"], workers=True, verbose=False)
    initial = initial_weights(resolved.config, checkpoint)
    gained = [] if initial is None else initial.gained(resolved.config)
    module = LanguageModule(
        resolved.config, weights_follow=checkpoint is not None or initial is not None, gained=gained
    )
    if initial is not None:
        trainer.callbacks.append(initial)  # type: ignore[attr-defined]
    if checkpoint is not None and is_lengthened(checkpoint, resolved.config):
        trainer.callbacks.append(LengthenedSchedule())  # type: ignore[attr-defined]
    objective = _objective(resolved.config)
    if objective is not None:
        trainer.callbacks.append(objective)  # type: ignore[attr-defined]
    checkpoints = next((c for c in callbacks if isinstance(c, StepCheckpoint)), None)
    with name_lost_rank(trainer), stop_on_signals(trainer, checkpoints.request_stop if checkpoints else None):
        data.prepare_data()
        if initial is not None:
            initial.check_tokenizer(data)
        if objective is not None:
            check_questions(data, objective.name)
        if sitting is not None:
            sitting.begin()
        resumed_step = (_step(checkpoint) or 0) if sitting is not None and sitting.resumes else None
        earlier = sitting.record.get("loggers") if sitting is not None else None
        with attached(trainer, resolved, resumed_step=resumed_step, ids=earlier or {}):
            trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
            if trainer.global_step == 0:
                raise DataError(f"{type(data).__name__}.train_dataloader gave no batch; no training step was taken.")
            if sitting is not None:
                sitting.accept()  # a run without a step left to train has not started
            if checkpoints is not None:
                checkpoints.stop_if_requested(trainer)
            # The end of a run is validated for its objective, unless it is below, where the data have no test.
            is_due = objective is not None and objective.step != trainer.global_step
            if is_due and defines(data, "test_dataloader"):
                trainer.validate(module, datamodule=data, verbose=False)
            if _pruned(callbacks) is None:
                _test(trainer, module, data)
    if objective is not None:
        assembly.record.metrics = {**objective.figures, **assembly.record.metrics}
        if sitting is not None:
            sitting.record["objective"] = objective.record()
    metrics = assembly.record.metrics
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        _log.warning("%s: not finite; the run diverged, or its data had no targets", ", ".join(broken))
    # Sweepers take no value for a failure; some would end the whole sweep at one that is not a number.
    return objective.value if objective is not None and math.isfinite(objective.value) else None


def _objective(config: dict[str, Any]) -> Objective | None:
    """Returns the callback that keeps the figure that a sweep optimises; None where nobody asks for one."""
    name = config.get("objective")
    if name is None:
        return None
    direction = direction_of(str(name), str(config.get("objective_mode") or "auto"))
    return Objective(name=str(name), mode="min" if direction == "minimize" else "max")


def _pruned(callbacks: Sequence[L.Callback]) -> str | None:
    """Returns why a sweep has ended the run early; None if it has not."""
    return next((c.reason for c in callbacks if isinstance(c, MedianStopping)), None)


def _test(trainer: L.Trainer, module: LanguageModule, data: L.LightningDataModule) -> None:
    """Tests, or validates where the data module has no test data."""
    if defines(data, "test_dataloader"):
        trainer.test(module, datamodule=data, verbose=False)
    elif defines(data, "val_dataloader"):
        trainer.validate(module, datamodule=data, verbose=False)
