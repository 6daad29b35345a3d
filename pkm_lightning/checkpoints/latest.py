"""Where a run keeps its checkpoints."""

from __future__ import annotations

from pathlib import Path


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of `run_dir` with the highest step."""
    found = sorted((run_dir / "checkpoints").glob("step-*.ckpt"))
    return found[-1] if found else None
