"""What the ranks of one launch leave behind for each other: why one ended, and that the user has been told.

Rank 0 makes a folder and names it in the environment that the other ranks inherit; files in it outlive their writers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_VARIABLE = "PKM_LIGHTNING_LAST_WORDS"


class LastWords:
    """The folder, as one rank sees it.

    Args:
        folder: where the words are left.
        launcher_pid: the process that made it, rank 0.
    """

    def __init__(self, folder: Path, launcher_pid: int) -> None:
        self._folder, self._launcher_pid = folder, launcher_pid

    @classmethod
    def make(cls) -> LastWords:
        """A new folder, named in the environment of the processes that this one starts from now on."""
        folder = Path(tempfile.mkdtemp(prefix="pkm_lightning-ranks-"))
        os.environ[_VARIABLE] = f"{os.getpid()}:{folder}"
        return cls(folder, os.getpid())

    @classmethod
    def inherited(cls) -> LastWords | None:
        """That of the process that started this one as a further rank; None in a rank 0 or one started otherwise."""
        pid, _, folder = os.environ.get(_VARIABLE, "").partition(":")
        return cls(Path(folder), int(pid)) if pid and int(pid) != os.getpid() else None

    @property
    def launcher_is_gone(self) -> bool:
        """Rank 0 has ended: its children have another parent."""
        return os.getppid() != self._launcher_pid

    def leave(self, rank: int, words: str) -> None:
        """Says why `rank` ends; the first words count."""
        self._create(f"rank-{rank}", words)

    def of(self, rank: int) -> str | None:
        """What `rank` said."""
        try:
            return (self._folder / f"rank-{rank}").read_text() or None
        except OSError:
            return None

    def may_tell(self) -> bool:
        """True for the first rank that asks after rank 0 is gone, which then removes the folder."""
        first = self._create("told", "")
        if first:
            self.remove()
        return first

    def remove(self) -> None:
        """Removes the folder, and its name from the environment."""
        os.environ.pop(_VARIABLE, None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _create(self, name: str, text: str) -> bool:
        try:
            with (self._folder / name).open("x") as file:
                file.write(text)
        except OSError:
            return False
        return True
