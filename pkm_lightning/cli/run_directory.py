"""A run's directory: one process holds it, `run.json` says how the run stands, and old runs are resumed or refused.

`"running"` without the lock means that the process was killed: the run is then resumed like an interrupted one.
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

_OURS = (
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
    """Holds the directory `path` until `close`.

    Args:
        path: created if it does not exist.
        resume: `auto` takes up interrupted runs and refuses finished and failed ones, `always` takes up any,
            `never` removes an earlier run's files and starts afresh.

    Attributes:
        record: the content of an earlier `run.json`, or an empty dict.
        resumes: an earlier run is to be continued.

    Raises:
        RunDirectoryError: it cannot be written, another process holds it, or the run in it has ended.
    """

    def __init__(self, path: str | Path, *, resume: str) -> None:
        check_choice("resume", resume, ("auto", "always", "never"))
        self.path = Path(path)
        self._lock = self._acquire()
        try:
            self.record = self._read_record()
            if not self.record:
                self._refuse_foreign_files()
            self.resumes = bool(self.record) and resume != "never"
            if resume == "never":
                self._clear()
            elif resume == "auto" and self.record.get("status") in ("finished", "failed"):
                raise RunDirectoryError(
                    f"run_dir={self.path} holds a run that {self.record['status']}; choose another run_dir, "
                    "continue it with resume=always, or replace it with resume=never."
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    def checkpoint(self) -> Path | None:
        """The latest checkpoint, if there is one."""
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

    def _read_record(self) -> dict[str, Any]:
        file = self.path / "run.json"
        if not file.exists():
            return {}
        try:
            record = json.loads(file.read_text())
        except ValueError:
            record = None
        if not isinstance(record, dict) or "status" not in record:
            raise RunDirectoryError(f"{file} is no record of a run; choose another run_dir or start with resume=never.")
        return record

    def _refuse_foreign_files(self) -> None:
        """Without a record the directory must be empty, but for what a run leaves that was killed at its very start."""
        found = {entry.name for entry in self.path.iterdir()} - {".lock", "config.yaml.tmp", "run.json.tmp"}
        if found == {"config.yaml"} and "\nffn:" in (self.path / "config.yaml").read_text(errors="replace"):
            return
        if found:
            raise RunDirectoryError(
                f"run_dir={self.path} is not empty ({', '.join(sorted(found)[:4])}) and has no run.json: it holds "
                "something else; choose another."
            )

    def _clear(self) -> None:
        for name in _OURS:
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no word for: NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
