"""The directory of a comparison: one command works on it at a time, and `resume=never` empties it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pkm_lightning.compare.comparison_file import NAME
from pkm_lightning.compare.run_state import is_held
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import HeldFolder

# Earlier versions wrote `hparams`.
_FOLDERS = ("runs", "sweep", "speed", "logs", "plots", "hparams")
_FILES = ("report.html", "report.md", "runs.csv", "differences.csv")


@contextlib.contextmanager
def held_directory(out: Path) -> Iterator[None]:
    """Creates `out` if necessary and holds its lock; removes what it has made if no comparison comes of it.

    Raises:
        RunDirectoryError: another command holds it, it cannot be written, or it holds files and no comparison.
    """
    try:
        held = HeldFolder(out)
    except BlockingIOError:
        raise RunDirectoryError(f"out={out} is held by another comparison that is running; wait for it.") from None
    except OSError as error:
        raise RunDirectoryError(f"out={out} cannot be written ({error.strerror}); choose another.") from None
    try:
        # A command that was killed at its very start leaves only these two.
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in (".lock", f"{NAME}.tmp"))
        if others and not (out / NAME).exists():
            raise RunDirectoryError(
                f"out={out} is not empty ({', '.join(others[:4])}) and holds no comparison; choose another."
            )
        yield
    finally:
        held.close() if (out / NAME).exists() else held.withdraw()


def clear_directory(out: Path) -> None:
    """Removes the runs and reports of an earlier comparison.

    compare.json stays until it is replaced: it marks the directory as that of a comparison.

    Raises:
        RunDirectoryError: one of the runs is still running, or a file cannot be removed.
    """
    held = [lock.parent for lock in out.glob("*/**/.lock") if is_held(lock.parent)]
    if held:
        raise RunDirectoryError(f"{held[0]} is in use by another process; wait for it or stop it.")
    try:
        for name in _FOLDERS:
            if (out / name).exists():
                shutil.rmtree(out / name)
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{error.filename} cannot be removed ({error.strerror}); choose another out.") from None
