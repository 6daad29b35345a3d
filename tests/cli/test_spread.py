"""A stopped run resumes on other ranks or with another strategy, with the losses of a run that was not stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from processes import finish, fit, metrics, start

STEPS = ["trainer.max_steps=24", "trainer.val_check_interval=24", "callbacks.step_checkpoint.every_n_steps=1"]


@pytest.mark.slow
@pytest.mark.parametrize("then", [["strategy=fsdp", "devices=4", "table.shard=row"], ["strategy=single", "devices=1"]])
def test_a_stopped_run_resumes_with_another_strategy(tmp_path: Path, then: list[str]) -> None:
    finish(fit(*STEPS, "run_dir=whole", cwd=tmp_path))
    process = fit(*STEPS, "strategy=ddp", "devices=2", "run_dir=parts", cwd=tmp_path)
    while process.poll() is None and not (
        (tmp_path / "parts" / "metrics.csv").exists() and metrics(tmp_path / "parts")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    assert len(metrics(tmp_path / "parts")) < 12
    finish(start("fit", "run_dir=parts", *then, cwd=tmp_path))
    for whole, parts in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert whole["tokens"] == parts["tokens"]
        for name in ("train/loss", "val/loss"):
            if whole[name]:
                assert float(whole[name]) == pytest.approx(float(parts[name]), rel=1e-3), (name, whole["step"])
    finish(start("validate", "run_dir=parts", "strategy=deepspeed_3", "devices=2", cwd=tmp_path))
