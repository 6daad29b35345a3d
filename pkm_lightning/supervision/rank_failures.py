"""What becomes of an error in one of several ranks: one sentence for the user, from one process, and how to go on."""

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
from pkm_lightning.supervision import RANK_LOST, LastWords, RankFailure, WatchedLauncher

# How gloo, NCCL and the store of the process group say that the other side is gone; they have no class for it.
_GONE = re.compile(
    r"[^.;\n]*(?:connection (?:closed|reset|refused)|closed by peer|broken pipe|gloo/transport|timed out waiting|"
    r"remote process exited|ncclRemoteError|communicator was aborted|collective operation timeout)[^;\n]*",
    re.IGNORECASE,
)


def in_words(error: BaseException) -> str:
    """An error in one line, with its kind."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def how_to_go_on(run_dir: Path | None) -> str:
    """The end of a sentence about a run that stopped, or about another verb (None)."""
    if run_dir is None:
        return "run the command again"
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return f"no checkpoint was written yet: the same command with run_dir={run_dir} starts the run again"
    return (
        f"the last checkpoint, {checkpoint.name}, is whole: the same command with run_dir={run_dir} continues from it"
    )


@contextlib.contextmanager
def losses_named(trainer: L.Trainer) -> Iterator[None]:
    """Turns the errors that broken connections raise into one that says which rank was lost.

    Raises:
        RankLostError: from within, where the connection to another rank broke.
    """
    try:
        yield
    except RuntimeError as error:
        # Before rank 0 has told a run's configuration, a rank from outside may have a Trainer for one process.
        alone = trainer.world_size == 1 and not (dist.is_initialized() and dist.get_world_size() > 1)
        reason = None if alone or isinstance(error, PkmError) else _broken_connection(error)
        if reason is None:
            raise
        launcher = _launcher(trainer)
        loss = launcher.await_loss() if launcher else None
        if loss is None:
            loss = RankFailure(f"rank {trainer.global_rank} lost the connection to another rank ({reason})", RANK_LOST)
        raise RankLostError(loss.sentence, loss.exit_code) from error


def _broken_connection(error: RuntimeError) -> str | None:
    """What of the error's text says so; None for an error of another kind."""
    found = _GONE.search(str(error))
    if found is None and not isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return None
    text = found.group() if found else str(error)
    # "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:4711. This is typically caused by ...":
    # neither the place nor the guess helps.
    text = re.split(r"\.\s", re.sub(r"\[\S*\.(?:cc|cpp|h):\d+\]", "", text))[0]
    return " ".join(text.split())[:200].rstrip(".")


def _launcher(trainer: L.Trainer) -> WatchedLauncher | None:
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, WatchedLauncher) else None


@contextlib.contextmanager
def watched(
    trainer: L.Trainer, run_dir: Path | None, close_record: Callable[[str], None] | None = None
) -> Iterator[None]:
    """The other ranks of this machine end with the block, and it with them.

    Args:
        trainer: its strategy says how the ranks were started.
        run_dir: named in the sentence about a loss.
        close_record: called with the reason if a rank was lost and this process must be ended because it hangs.
    """
    launcher = _launcher(trainer)
    if launcher is None:
        yield
        return

    def stuck(loss: RankFailure) -> None:
        if close_record is not None:
            close_record(loss.sentence)
        if launcher.tells:
            print(f"{loss.sentence}; {how_to_go_on(run_dir)}", file=sys.stderr, flush=True)

    launcher.on_stuck = stuck
    failed = True
    try:
        yield
        failed = False
    except Interrupted:
        failed = False
        raise
    finally:
        if not failed and dist.is_initialized():
            # The others may wait for this before they end.
            dist.destroy_process_group()
        launcher.close(failed=failed)


@contextlib.contextmanager
def losses_ended(trainer: L.Trainer, run_dir: Path | None) -> Iterator[None]:
    """A process that lost another ends with a sentence, unless it is for another process to say it.

    Raises:
        Interrupted: from within, where another rank was lost.
    """
    try:
        with losses_named(trainer):
            yield
    except RankLostError as error:
        launcher = _launcher(trainer)
        told_elsewhere = launcher is not None and not launcher.tells
        message = "" if told_elsewhere else f"{error}; {how_to_go_on(run_dir)}"
        raise Interrupted(message, error.exit_code) from error


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """In a rank that rank 0 has started: leaves rank 0 the reason of a failure, which tells the user."""
    words = LastWords.inherited()
    try:
        yield
    except (Interrupted, SystemExit):
        raise
    except Exception as error:
        if words is None or words.launcher_is_gone:
            raise
        words.leave(int(os.environ["LOCAL_RANK"]), in_words(error))
        if isinstance(error, PkmError | OSError):
            raise Interrupted("", 2) from error
        raise


@contextlib.contextmanager
def watched_evaluation(trainer: L.Trainer) -> Iterator[None]:
    """All of the above for a verb that leaves nothing to be continued."""
    with last_words(), losses_ended(trainer, None), watched(trainer, None):
        yield
