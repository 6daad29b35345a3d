"""A run's directory: one process holds its lock, `run.json` has the run's status, earlier runs are continued or not.

The status `"running"` without the lock means that the process was killed: that run is resumed like an interrupted one.
A command that is refused leaves the directory as it was: the files of an earlier run that is to be replaced are renamed
(`run.json.earlier`) until the new one is accepted, and where there was nothing before, nothing stays.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.errors import RunDirectoryError, check_choice
from pkm_lightning.storage import HeldFolder, open_regular, write_beside

_FILES = (  # what a run writes, and a run in its place removes
    "run.json",
    "config.yaml",
    "tokenizer.json",
    "chat_template.jinja",
    "heldout",
    "metrics.csv",
    "recall.csv",
    "usage.json",
    "events.jsonl",
    "checkpoints",
    "tensorboard",
    "wandb",
    "mlflow",
    # Of commands that evaluate it.
    "validate.json",
    "test.json",
    "predictions.jsonl",
    "edits",
    "evaluation.json",
)
#: What a run leaves that was killed before its record was written.
_AT_START = {
    *(".lock", "config.yaml", "config.yaml.tmp", "run.json.tmp", "tensorboard", "wandb", "mlflow"),
    *("tokenizer.json", "tokenizer.json.tmp", "chat_template.jinja", "heldout", "heldout.part"),
    *("metrics.csv", "events.jsonl"),  # begun before the run is accepted
}
_STATUSES = ("running", "finished", "failed", "interrupted", "pruned")
#: In place of the status where run.json cannot be read.
_DAMAGED = "damaged"


class RunDirectory:
    """The directory `path`, locked until `close`.

    Args:
        path: created if it does not exist.
        resume: `auto` continues interrupted runs and refuses finished and failed ones, `always` continues any,
            `never` replaces the files of an earlier run. A run that failed before it trained is always replaced.

    Attributes:
        record: the content of an earlier `run.json`, or an empty dict.
        resumes: whether an earlier run is continued.

    Raises:
        RunDirectoryError: it cannot be written, another process holds it, or the run in it has ended.
    """

    def __init__(self, path: str | Path, *, resume: str) -> None:
        self.path = Path(path)
        self._began = self._is_accepted = False
        self._held = self._hold()
        try:
            self._put_back()  # a command that was killed before its run was accepted has left them aside
            self.resumes = continues_run(self.path, resume)
            self.record = _read_record(self.path)
            if not self.record:
                self._refuse_foreign_files()
        except BaseException:
            self.close()
            raise

    def begin(self, config: dict[str, Any]) -> None:
        """Makes room for a run that continues no other: sets the files of an earlier one aside, writes config.yaml."""
        if self.resumes:
            return
        if self.record:
            # run.json first, and back last: while it lies aside, a kill leaves the others to be moved back.
            for name in _FILES:
                _move(self.path / name, self._aside(name))
        self._began = True
        self._clear()
        # Without a record it marks the directory as that of a run.
        self.save_config(config)

    def accept(self, config: dict[str, Any], record: dict[str, Any]) -> None:
        """Writes config.yaml and run.json of a run whose data and checkpoint are accepted; forgets the earlier run."""
        self.save_config(config)
        self.save_record(record)
        self._is_accepted = True
        self._forget_earlier()

    def close(self) -> None:
        """Releases the lock; without an accepted run the directory becomes what it was before."""
        if self._is_accepted:
            self._held.close()
            return
        with contextlib.suppress(OSError):
            if self._began:
                self._clear()
            self._put_back()
        self._held.withdraw()

    def checkpoint(self) -> Path | None:
        """Returns the latest checkpoint of the run that is continued, if there is one."""
        return latest_checkpoint(self.path) if self.resumes else None

    def save_config(self, config: dict[str, Any]) -> None:
        """Writes config.yaml, resolved."""
        write_beside(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def save_record(self, record: dict[str, Any]) -> None:
        """Writes run.json."""
        write_record(self.path, record)

    def _hold(self) -> HeldFolder:
        try:
            return HeldFolder(self.path)
        except BlockingIOError:
            raise RunDirectoryError(
                f"run_dir={self.path} is held by another process that is running; wait for it or choose another."
            ) from None
        except OSError as error:
            raise RunDirectoryError(
                f"run_dir={self.path} cannot be written ({error.strerror}); choose another with run_dir=PATH."
            ) from None

    def _refuse_foreign_files(self) -> None:
        """Refuses a directory without a record, unless it is empty or left by a run that was killed at its start."""
        files = {entry.name for entry in self.path.iterdir()}
        if files <= {".lock"} or (files <= _AT_START and _has_saved_config(self.path)):
            return
        shown = sorted(files - {".lock"})[:4]
        raise RunDirectoryError(
            f"run_dir={self.path} is not empty ({', '.join(shown)}) and has no run.json: it holds something else; "
            "choose another."
        )

    def _aside(self, name: str) -> Path:
        return self.path / f"{name}.earlier"

    def _unfinished(self, name: str) -> Path:
        """Returns where `written_beside` writes `name`; a kill leaves it behind."""
        return self.path / f"{name}.tmp"

    def _put_back(self) -> None:
        """Moves the files of an earlier run back, or removes them if a later run was accepted."""
        if not self._aside("run.json").exists():
            return
        if (self.path / "run.json").exists():
            self._forget_earlier()
        for name in reversed(_FILES):
            _remove(self._unfinished(name))
            _move(self._aside(name), self.path / name)

    def _forget_earlier(self) -> None:
        for name in reversed(_FILES):
            _remove(self._aside(name))

    def _clear(self) -> None:
        for name in _FILES:
            _remove(self._unfinished(name))
            _remove(self.path / name)


def continues_run(path: Path, resume: str) -> bool:
    """Returns whether a run in `path` is to be continued; reads only.

    Raises:
        RunDirectoryError: the run there has ended and `resume` is `auto`, or its record is unreadable.
    """
    check_choice("resume", resume, ("auto", "always", "never"))
    record = _read_record(path)
    status = record.get("status")
    if resume == "never" or _failed_before_training(path, record):
        return False
    if resume == "auto" and status in ("finished", "failed", "pruned", _DAMAGED):
        verb = "was pruned" if status == "pruned" else status
        what = "a run whose run.json is damaged" if status == _DAMAGED else f"a run that {verb}"
        raise RunDirectoryError(
            f"run_dir={path} holds {what}; choose another run_dir, continue it with resume=always, or replace it with "
            "resume=never."
        )
    return bool(record)


def add_to_record(path: Path, key: str, entries: dict[str, Any]) -> None:
    """Adds `entries` to those that the record of the run in `path` has under `key`.

    Raises:
        RunDirectoryError: it cannot be written, has no sound record, or the run is being trained.
    """
    try:
        held = HeldFolder(path)
    except BlockingIOError:
        raise RunDirectoryError(f"run_dir={path} is held by another process that is running.") from None
    except OSError as error:
        raise RunDirectoryError(f"run_dir={path} cannot be written ({error.strerror}).") from None
    try:
        record = _read_record(path)
        if record.get("status") not in _STATUSES:
            raise RunDirectoryError(f"{path / 'run.json'} is missing or damaged.")
        earlier = record.get(key)
        record[key] = {**(earlier if isinstance(earlier, dict) else {}), **entries}
        write_record(path, record)
    finally:
        held.close()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes run.json."""
    write_beside(path / "run.json", json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")


def _failed_before_training(path: Path, record: dict[str, Any]) -> bool:
    """Returns whether a run ended by a mistake and there is nothing to continue: mended, the same command starts."""
    return record.get("status") == "failed" and not record.get("tokens") and latest_checkpoint(path) is None


def _read_record(path: Path) -> dict[str, Any]:
    """Returns the content of run.json, an empty dict where there is none.

    Raises:
        RunDirectoryError: it is not a record, and the directory is not that of a run.
    """
    file = path / "run.json"
    if not file.exists():
        return {}
    try:
        with open_regular(file, encoding="utf-8") as opened:
            record = json.load(opened)
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read ({error.strerror}); choose another run_dir.") from None
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and record.get("status") in _STATUSES:
        return record
    if not _has_saved_config(path):
        raise RunDirectoryError(f"{file} is not a record of a run; choose another run_dir.")
    return {"status": _DAMAGED}


def _has_saved_config(path: Path) -> bool:
    """Returns whether config.yaml is one that a run has saved."""
    try:
        with open_regular(path / "config.yaml", errors="replace") as file:
            return "\nffn:" in file.read()
    except OSError:
        return False


def _move(entry: Path, to: Path) -> None:
    if entry.exists() or entry.is_symlink():
        _remove(to)
        os.replace(entry, to)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Returns `value` with None in place of NaN and infinities, and numbers in place of scalars of NumPy, for JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):  # a figure from questions of a data module of the user's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
