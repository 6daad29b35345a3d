"""A trained run for what reads one back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small import SMALL_RUN, Run


@pytest.fixture
def trained(cli: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, trained once a worker and copied for each test."""
    kept = tmp_path_factory.getbasetemp() / "trained-run"
    if not kept.exists():
        # With these reads its answers are not empty.
        reads = ["model.memory.heads=2", "model.memory.knn=8", "optim.table_lr_factor=4"]
        assert cli("fit", *SMALL_RUN, "run_dir=run", "model.tied=true", *reads).code == 0
        shutil.copytree(tmp_path / "run", kept)
    shutil.copytree(kept, tmp_path / "run", dirs_exist_ok=True)
    return tmp_path / "run"
