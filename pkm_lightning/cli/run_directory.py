"""A run's directory: one process holds its lock, `run.json` has the run's status, earlier runs are continued or not.

The status `"running"` without the lock means that the process was killed: that run is resumed like an interrupted one.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import IO, Any

import yaml

from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.errors import RunDirectoryError, check_choice
from pkm_lightning.storage import hold, write_beside

_FILES = (  # what a run writes, and `resume=never` removes
    "config.yaml",
    "run.json",
    "metrics.csv",
    "recall.csv",
    "usage.json",
    "events.jsonl",
    "checkpoints",
    "tensorboard",
)


class RunDirectory:
    """The directory `path`, locked until `close`.

    Args:
        path: created if it does not exist.
        resume: `auto` continues interrupted runs and refuses finished and failed ones, `always` continues any,
            `never` removes the files of an earlier run and starts anew.

    Attributes:
        record: the content of an earlier `run.json`, or an empty dict.
        resumes: whether an earlier run is continued.

    Raises:
        RunDirectoryError: it cannot be written, another process holds it, or the run in it has ended.
    """

    def __init__(self, path: str | Path, *, resume: str) -> None:
        self.path = Path(path)
        self._lock = self._acquire()
        try:
            self.resumes = continues_run(self.path, resume)
            self.record = _read_record(self.path)
            if not self.record:
                self._refuse_foreign_files()
            if resume == "never":
                self._clear()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    def checkpoint(self) -> Path | None:
        """Returns the latest checkpoint, if there is one."""
        return latest_checkpoint(self.path)

    def save_config(self, config: dict[str, Any]) -> None:
        """Writes config.yaml, resolved."""
        write_beside(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def save_record(self, record: dict[str, Any]) -> None:
        """Writes run.json."""
        self.record = record
        write_beside(self.path / "run.json", json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")

    def _acquire(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise RunDirectoryError(
                f"run_dir={self.path} cannot be written ({error.strerror}); choose another with run_dir=PATH."
            ) from None
        if not hold(lock):
            lock.close()
            raise RunDirectoryError(
                f"run_dir={self.path} is held by another process that is running; wait for it or choose another."
            )
        return lock

    def _refuse_foreign_files(self) -> None:
        """Refuses a directory without a record, unless it is empty or left by a run that was killed at its start."""
        files = {entry.name for entry in self.path.iterdir()} - {".lock", "config.yaml.tmp", "run.json.tmp"}
        if files == {"config.yaml"} and "\nffn:" in (self.path / "config.yaml").read_text(errors="replace"):
            return
        if files:
            raise RunDirectoryError(
                f"run_dir={self.path} is not empty ({', '.join(sorted(files)[:4])}) and has no run.json: it holds "
                "something else; choose another."
            )

    def _clear(self) -> None:
        for name in _FILES:
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def continues_run(path: Path, resume: str) -> bool:
    """Returns whether a run in `path` is to be continued; reads only.

    Raises:
        RunDirectoryError: the run there has ended and `resume` is `auto`, or its record is unreadable.
    """
    check_choice("resume", resume, ("auto", "always", "never"))
    record = _read_record(path)
    if resume == "auto" and record.get("status") in ("finished", "failed"):
        raise RunDirectoryError(
            f"run_dir={path} holds a run that {record['status']}; choose another run_dir, continue it with "
            "resume=always, or replace it with resume=never."
        )
    return bool(record) and resume != "never"


def _read_record(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or "status" not in record:
        raise RunDirectoryError(f"{file} is not a record of a run; choose another run_dir or start with resume=never.")
    return record


def _finite(value: Any) -> Any:
    """Returns `value` with None in place of NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
