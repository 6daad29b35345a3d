"""The package's commands in this process: a start of Python per run would cost more than many of the runs."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from pkm_lightning.cli.main import main


class CommandFailed(Exception):
    """A command that ended with an error, whose message is that of the command."""


def run_command(log: Path, *arguments: str) -> None:
    """Runs a command of the package, its output appended to `log`.

    Raises:
        CommandFailed: it ended with an error.
        KeyboardInterrupt: it was interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before = list(sys.argv)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        start = file.tell()
        print(shown(arguments), flush=True)
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
            # The command has set them up, for a stream that is about to be closed.
            logging.getLogger().handlers.clear()
            GlobalHydra.instance().clear()
            gc.collect()
    if code:
        lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        message = next((line for line in reversed(lines) if line.startswith("error:")), f"exit code {code}")
        if code in (129, 130, 143):
            raise KeyboardInterrupt(message)
        raise CommandFailed(message)


def shown(arguments: Sequence[str]) -> str:
    """Returns the command as a user types it."""
    quoted = [f"'{text}'" if any(c in text for c in " [](){}*") else text for text in arguments]
    return " ".join(["python -m pkm_lightning", *quoted])


def status(run: Path) -> str | None:
    """Returns the status in run.json; None where there is none."""
    try:
        return str(json.loads((run / "run.json").read_text())["status"])
    except (OSError, ValueError, LookupError):
        return None


def fit(run: Path, log: Path, overrides: Sequence[str]) -> None:
    """Trains `run`, unless it is finished; one that was interrupted or has failed begins anew.

    Raises:
        CommandFailed: `fit` ended with an error.
    """
    if status(run) != "finished":
        run_command(log, "fit", f"run_dir={run}", *overrides, "resume=never")
