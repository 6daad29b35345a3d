"""Turns an error in one of several ranks into one sentence for the user, printed by one process, and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch.distributed as dist

from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.errors import Interrupted, PkmError, RankLostError
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.supervision.error_folder import ErrorFolder
from pkm_lightning.supervision.launcher import RANK_LOST, RankFailure, WatchedLauncher
from pkm_lightning.supervision.signals import exit_code, stop_on_signals

# Texts by which gloo, NCCL and the store of the process group report a broken connection: they raise plain
# RuntimeErrors (torch 2.11 to 2.13).
_BROKEN = re.compile(
    r"[^.;\n]*(?:connection (?:closed|reset|refused)|closed by peer|broken pipe|gloo/transport|timed out waiting|"
    r"remote process exited|ncclRemoteError|communicator was aborted|collective operation timeout)[^;\n]*",
    re.IGNORECASE,
)


def describe(error: BaseException) -> str:
    """Returns the class and message of an error in one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def resume_hint(run_dir: Path | None) -> str:
    """Returns the second half of a sentence about a run that stopped; None for a verb that leaves no run behind."""
    if run_dir is None:
        return "run the command again"
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return f"no checkpoint was written yet: the same command with run_dir={run_dir} starts the run again"
    return (
        f"the last checkpoint, {checkpoint.name}, is whole: the same command with run_dir={run_dir} continues from it"
    )


@contextlib.contextmanager
def name_lost_rank(trainer: L.Trainer) -> Iterator[None]:
    """Replaces the error of a broken connection by one that names the lost rank.

    Raises:
        RankLostError: within the block the connection to another rank broke.
    """
    try:
        yield
    except RuntimeError as error:
        # Before rank 0 has sent the configuration, a rank that was started externally may have a Trainer of one rank.
        alone = trainer.world_size == 1 and not is_distributed()
        reason = None if alone or isinstance(error, PkmError) else _broken_connection(error)
        if reason is None:
            raise
        launcher = _launcher(trainer)
        failure = launcher.await_failure() if launcher else None
        if failure is None:
            sentence = f"rank {trainer.global_rank} lost the connection to another rank ({reason})"
            failure = RankFailure(sentence, RANK_LOST)
        raise RankLostError(failure.sentence, failure.exit_code) from error


def _broken_connection(error: RuntimeError) -> str | None:
    """Returns the part of the message that reports a broken connection, or None for an error of another kind."""
    match = _BROKEN.search(str(error))
    if match is None and not isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return None
    text = match.group() if match else str(error)
    # "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:4711. This is typically caused by ...":
    # neither the place in the source nor the guess helps a user.
    text = re.split(r"\.\s", re.sub(r"\[\S*\.(?:cc|cpp|h):\d+\]", "", text))[0]
    return " ".join(text.split())[:200].rstrip(".")


def _launcher(trainer: L.Trainer) -> WatchedLauncher | None:
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, WatchedLauncher) else None


@contextlib.contextmanager
def watch_ranks(
    trainer: L.Trainer, run_dir: Path | None, close_record: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Ends the other ranks of this machine with the block, and this process with them.

    Args:
        trainer: its strategy holds the launcher of the ranks.
        run_dir: named in the sentence about a lost rank.
        close_record: called with the reason if a rank was lost and this process must be ended because it hangs.
    """
    launcher = _launcher(trainer)
    if launcher is None:
        yield
        return

    def report_hang(failure: RankFailure) -> None:
        if close_record is not None:
            close_record(failure.sentence)
        if launcher.reports_failures:
            print(f"{failure.sentence}; {resume_hint(run_dir)}", file=sys.stderr, flush=True)

    launcher.on_hang = report_hang
    failed = True
    try:
        yield
        failed = False
    except Interrupted:
        failed = False
        raise
    finally:
        if not failed and dist.is_initialized():
            # The other ranks may wait for this before they end.
            dist.destroy_process_group()
        launcher.close(failed=failed)


@contextlib.contextmanager
def end_on_lost_rank(trainer: L.Trainer, run_dir: Path | None) -> Iterator[None]:
    """Ends this process with a sentence if another rank is lost, or silently where another process reports it.

    Raises:
        Interrupted: within the block another rank was lost.
    """
    try:
        with name_lost_rank(trainer):
            yield
    except RankLostError as error:
        launcher = _launcher(trainer)
        silent = launcher is not None and not launcher.reports_failures
        message = "" if silent else f"{error}; {resume_hint(run_dir)}"
        raise Interrupted(message, error.exit_code) from error


@contextlib.contextmanager
def leave_error_to_rank_0() -> Iterator[None]:
    """Records a failure for rank 0, which reports it to the user, in a rank that rank 0 started."""
    errors = ErrorFolder.inherited()
    try:
        yield
    except (Interrupted, SystemExit):
        raise
    except Exception as error:
        if errors is None or errors.launcher_is_gone:
            raise
        errors.write(int(os.environ["LOCAL_RANK"]), describe(error))
        if isinstance(error, PkmError | OSError):
            raise Interrupted("", 2) from error
        raise


@contextlib.contextmanager
def supervise_evaluation(trainer: L.Trainer) -> Iterator[None]:
    """Combines all context managers of this module for a verb that leaves no run to continue.

    Raises:
        Interrupted: a signal asked this process to stop, or another rank was lost.
    """
    with (
        leave_error_to_rank_0(),
        end_on_lost_rank(trainer, None),
        watch_ranks(trainer, None),
        name_lost_rank(trainer),  # before the watch ends the other ranks, so that it finds how the lost one ended
        stop_on_signals(trainer, None),
    ):
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as stop:
            if not was_stopped(stop, trainer):
                raise
            message = "interrupted; run the command again" if trainer.is_global_zero else ""
            raise Interrupted(message, exit_code(stop)) from None


def was_stopped(error: BaseException, trainer: L.Trainer) -> bool:
    """Returns whether `error` is the answer to a signal."""
    # Lightning turns a KeyboardInterrupt inside the Trainer into a SystemExit.
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and trainer.interrupted)
