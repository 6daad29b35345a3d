"""A folder in which the ranks of one launch leave the reason of their end, since files outlive their writers.

Rank 0 makes the folder and names it in the environment, which the ranks that it starts inherit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_VARIABLE = "PKM_LIGHTNING_ERROR_FOLDER"


class ErrorFolder:
    """The folder of a launch, as one of its ranks sees it.

    Args:
        path: of the folder.
        launcher_pid: process id of rank 0, which made it.
    """

    def __init__(self, path: Path, launcher_pid: int) -> None:
        self._path, self._launcher_pid = path, launcher_pid

    @classmethod
    def make(cls) -> ErrorFolder:
        """Makes a folder and names it in the environment of the processes that this one starts from now on."""
        path = Path(tempfile.mkdtemp(prefix="pkm_lightning-ranks-"))
        os.environ[_VARIABLE] = f"{os.getpid()}:{path}"
        return cls(path, os.getpid())

    @classmethod
    def inherited(cls) -> ErrorFolder | None:
        """Returns the folder of the rank 0 that started this process, or None in rank 0 and without such a launch."""
        pid, _, path = os.environ.get(_VARIABLE, "").partition(":")
        return cls(Path(path), int(pid)) if pid and int(pid) != os.getpid() else None

    @property
    def launcher_is_gone(self) -> bool:
        """Rank 0 has ended: the system has given this process another parent."""
        return os.getppid() != self._launcher_pid

    def write(self, rank: int, reason: str) -> None:
        """Records why `rank` ends; only the first reason of a rank is kept."""
        self._create(f"rank-{rank}", reason)

    def read(self, rank: int) -> str | None:
        """Returns the reason that `rank` recorded, or None."""
        try:
            return (self._path / f"rank-{rank}").read_text() or None
        except OSError:
            return None

    def claim_report(self) -> bool:
        """Returns True to one rank only, which then reports that rank 0 is gone; removes the folder."""
        first = self._create("reported", "")
        if first:
            self.remove()
        return first

    def remove(self) -> None:
        """Removes the folder, and its name from the environment."""
        os.environ.pop(_VARIABLE, None)
        shutil.rmtree(self._path, ignore_errors=True)

    def _create(self, name: str, text: str) -> bool:
        try:
            # "x" creates the file or fails, so that of several ranks exactly one succeeds.
            with (self._path / name).open("x") as file:
                file.write(text)
        except OSError:
            return False
        return True
