"""Every Triton kernel compiles for the GPUs that the package supports. Compiled ahead of time, not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

pytest.importorskip("triton")
FOLDERS = {path.parent.name for path in (ROOT / "pkm_lightning" / "ops").glob("*/triton.py")}


def folders_compiled(cache: Path, *arguments: str) -> set[str]:
    """Runs compile_kernels.py in a process of its own and returns the folders of the ops that it has compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    script = ROOT / "tests" / "ops" / "compile_kernels.py"
    process = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return {line.split()[2].split(".")[-2] for line in process.stdout.splitlines()}


def test_each_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    assert folders_compiled(tmp_path, "cuda:90", "--once") == FOLDERS


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_all_signatures_compile(target: str, tmp_path: Path) -> None:
    assert folders_compiled(tmp_path, target) == FOLDERS
