"""What every part that writes files must get right."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on disk and would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
