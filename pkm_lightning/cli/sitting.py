"""One sitting of a run: run.json from the moment when training starts to the end of the process.

A refused command must leave the record of an earlier sitting as it is, so nothing is written before the data are
prepared, the checkpoint is loaded and training starts.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.cli.assembly import Assembly
from pkm_lightning.cli.loggers import ids_of
from pkm_lightning.cli.run_contents import keep_with_run
from pkm_lightning.cli.run_directory import RunDirectory
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.supervision.rank_failures import describe
from pkm_lightning.training.machine import now, reset_peak_memory
from pkm_lightning.training.record import start_record

_log = logging.getLogger(__name__)

#: What a continued run keeps from its record until this sitting has figures of its own.
_KEPT = ("started", "tokens", "tokens_per_second", "throughput", "best_validation", "metrics", "init_from", "loggers")


class Sitting:
    """The keeper of a run's record on rank 0.

    Args:
        directory: of the run, held by this process.
        resolved: the run.
        assembly: its Trainer and callbacks; its `RunRecord` reports the start of training.

    Attributes:
        record: the content of run.json.
    """

    def __init__(self, directory: RunDirectory, resolved: ResolvedRun, assembly: Assembly) -> None:
        self._directory, self._config, self._assembly = directory, resolved.config, assembly
        self._data = resolved.data
        self._began, self._is_accepted = time.perf_counter(), False
        self.record = start_record(resolved.config, resolved.cost, resolved.of_variants)
        before = directory.record if directory.resumes else {}
        self.record.update({key: before[key] for key in _KEPT if key in before})
        # Else a kill in this sitting would lose the time of earlier ones.
        self.record["seconds"] = {**self.record["seconds"], **before.get("seconds", {})}
        self._earlier_seconds = self.record["seconds"]["total"]
        assembly.record.on_start = self.accept
        reset_peak_memory()

    @property
    def resumes(self) -> bool:
        """Whether an earlier run is continued."""
        return self._directory.resumes

    def begin(self) -> None:
        """Makes room for the run, whose data are prepared."""
        if self._directory.resumes:
            _log.info("continues the run in %s", self._directory.path)
        self._directory.begin(self._config)

    def accept(self) -> None:
        """Writes the record of a run that starts to train; later calls have no effect."""
        if not self._is_accepted:
            keep_with_run(self._data, self._directory.path)
            if ids := ids_of(self._config, self._assembly.trainer.loggers):
                self.record["loggers"] = ids
            self._directory.accept(self._config, self.record)
            self._is_accepted = True

    def finish(self) -> None:
        """Records the end of a run that has trained and tested."""
        self._end("finished")

    def interrupt(self, reason: str | None = None) -> None:
        """Records that the same command continues the run."""
        self._end_after_error("interrupted", reason)

    def fail(self, error: BaseException) -> None:
        """Records an error: of a full disk or a lost file system the run is only interrupted."""
        self._end_after_error("interrupted" if _is_of_files(error) else "failed", describe(error))

    def _end_after_error(self, status: str, reason: str | None) -> None:
        if not self._is_accepted:
            return
        try:
            self._end(status, **({} if reason is None else {"reason": reason}))
        except RunDirectoryError as error:
            # The error that ended the run must be reported; `running` without the lock is resumed as well.
            _log.warning("the end of the run is not recorded: %s", error)

    def _end(self, status: str, **fields: Any) -> None:
        before = self.record
        self.record = {**before, **self._assembly.record.fields(self._assembly.trainer)}
        self.record["metrics"] = self.record["metrics"] or before["metrics"]
        total = round(self._earlier_seconds + time.perf_counter() - self._began, 3)
        self.record["seconds"] = {**before["seconds"], **self.record["seconds"], "total": total}
        self.record.update(status=status, ended=now(), **fields)
        self._directory.save_record(self.record)


def _is_of_files(error: BaseException | None) -> bool:
    """Returns whether a file could not be read or written, which has nothing to do with the run."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False
