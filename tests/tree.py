"""The files of the project according to git: tracked files, and new ones that are not ignored."""

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
    """Lists the files relative to `ROOT`, including symbolic links, without those that are tracked but deleted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode != 0:
        pytest.skip(f"needs a git checkout: {process.stderr.strip()}")
    return tuple(Path(name) for name in sorted(set(process.stdout.split("\0")) - {""}) if os.path.lexists(ROOT / name))


def ffns_without_files() -> list[str]:
    """Lists the options of `ffn` that need no class and no files of the user."""
    names = sorted(path.stem for path in (ROOT / "configs" / "ffn").glob("*.yaml"))
    return [name for name in names if name not in ("custom", "pretrained", "engram_pretrained")]


def copy_of_the_tree(target: Path) -> Path:
    """Copies the listed files to `target`, symbolic links as links, and returns it."""
    for path in listed_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path, follow_symlinks=False)
    return target
