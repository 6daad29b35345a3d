"""The files of the project as git sees them: tracked, or new and not ignored."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def listed_files() -> tuple[Path, ...]:
    """Paths relative to `ROOT`, links among them; files deleted but still tracked are left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs a git checkout: {done.stderr.strip()}")
    return tuple(Path(name) for name in sorted(set(done.stdout.split("\0")) - {""}) if os.path.lexists(ROOT / name))


def copy_of_the_tree(target: Path) -> Path:
    """Copies the listed files to `target`, links as links."""
    for path in listed_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path, follow_symlinks=False)
    return target
