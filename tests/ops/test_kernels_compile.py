"""Every Triton kernel compiles for the GPUs we know, so that one that does not cannot land. Compiled, not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

pytest.importorskip("triton")


def compiled(target: str, cache: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    script = ROOT / "tests" / "ops" / "compile_kernels.py"
    ended = subprocess.run(
        [sys.executable, str(script), target], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_compile_for_hopper(tmp_path: Path) -> None:
    lines = compiled("cuda:90", tmp_path).splitlines()
    folders = {path.parent.name for path in (ROOT / "pkm_lightning" / "ops").glob("*/triton.py")}
    assert {line.split()[2].split(".")[-2] for line in lines} == folders


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_compile_for_others(target: str, tmp_path: Path) -> None:
    assert compiled(target, tmp_path)
