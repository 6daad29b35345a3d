"""run.json has the figures of a run, with and without other callbacks, and over resumes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import SMALL_DATA, SMALL_RUN, Run, record, rows

from pkm_lightning.callbacks import RunRecord


def test_the_best_validation_of_abandoned_steps_is_forgotten() -> None:
    kept = RunRecord()
    kept.load_state_dict({"best_validation": {"loss": 1.0, "step": 8}, "throughput": {"mfu": 0.5}, "seconds": 1.0})
    for step, best in ((9, 8), (10, 8), (8, 8), (9, 8), (6, None), (7, None)):
        kept.on_train_batch_end(SimpleNamespace(global_step=step, callbacks=[]), SimpleNamespace())  # type: ignore[arg-type]
        assert (kept.state_dict()["best_validation"] or {}).get("step") == best, step
    assert kept.state_dict()["throughput"] == {"mfu": 0.5}


def test_without_callbacks_the_record_is_complete(cli: Run, tmp_path: Path) -> None:
    options = ["model.memory.n_keys=16", "trainer.max_steps=4", "trainer.val_check_interval=2", "logger=none"]
    shown = cli("fit", *SMALL_DATA, *options, "callbacks=none", "run_dir=run")
    assert shown.code == 0, shown.err
    content = record(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *(".lock", "config.yaml", "run.json", "tokenizer.json", "heldout"),
    }
    assert content["status"] == "finished"
    assert content["metrics"].keys() == {"test/loss", "test/perplexity"}
    assert content["throughput"] is None
    assert content["best_validation"]["step"] in (2, 4)
    assert 0 < content["seconds"]["train"] < content["seconds"]["total"]
    assert (content["world_size"], len(content["data"])) == (1, 64)
    assert content["device"].endswith(f"{os.cpu_count()} cores")
    assert content["tokens"] > 0
    assert content["tokens_per_second"] > 0
    assert "tokens/s" in shown.out


def validated(callback: RunRecord, step: int, loss: float, *, fn: str = "fit", sanity: bool = False) -> None:
    """Ends a validation of this loss."""
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=fn),
        sanity_checking=sanity,
        global_step=step,
        callback_metrics={"val/loss": torch.tensor(loss)},
    )
    module: Any = None
    callback.on_validation_end(trainer, module)


def test_the_best_validation_is_the_lowest_finite_one_in_training() -> None:
    callback = RunRecord()
    validated(callback, 0, 0.1, sanity=True)
    validated(callback, 1, float("nan"))
    assert callback.state_dict()["best_validation"] is None
    for step, loss in [(2, 3.0), (3, 2.0), (4, 2.5), (5, float("nan")), (6, 2.0)]:
        validated(callback, step, loss)
    validated(callback, 7, 0.5, fn="validate")
    assert callback.state_dict()["best_validation"] == {"loss": 2.0, "step": 3}
    assert callback.metrics == {"val/loss": 0.5}


def test_a_resumed_run_keeps_the_best_and_the_seconds() -> None:
    first, resumed = RunRecord(), RunRecord()
    validated(first, 2, 1.5)
    resumed.load_state_dict({**first.state_dict(), "seconds": 7.0, "processor_seconds": 9.0})
    validated(resumed, 4, 1.75)
    assert resumed.state_dict()["best_validation"] == {"loss": 1.5, "step": 2}
    assert resumed.stopwatch.seconds >= 7.0
    assert resumed.processor_stopwatch.seconds >= 9.0


@pytest.mark.parametrize(("ranks", "device"), [(2, "cpu"), (1, "meta")])
def test_processor_seconds_are_of_a_run_that_was_one_process_on_cpus_all_the_time(ranks: int, device: str) -> None:
    callback, trainer = RunRecord(), SimpleNamespace(world_size=ranks, is_global_zero=True)
    trainer.strategy = SimpleNamespace(root_device=torch.device(device))
    module: Any = None
    callback.load_state_dict({**callback.state_dict(), "processor_seconds": 9.0})
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    callback.on_train_end(trainer, module)  # type: ignore[arg-type]
    resumed = RunRecord()
    resumed.load_state_dict(callback.state_dict())
    assert math.isnan(resumed.processor_stopwatch.seconds)
    assert resumed.stopwatch.seconds > 0


def test_an_interrupted_and_resumed_run_agrees_with_its_metrics_csv(cli: Run, tmp_path: Path) -> None:
    command = ["fit", *SMALL_RUN, "ffn=dense", "+callbacks.interrupt._target_=toys.InterruptOnce", "run_dir=run"]
    (tmp_path / "interrupt").touch()
    assert cli(*command).code == 130
    half = record(tmp_path / "run")
    assert half["status"] == "interrupted"
    assert half["metrics"] == {}
    assert half["tokens"] > int(rows(tmp_path / "run")[-1]["tokens"])  # the row is of step 6, the stop in step 7
    assert half["best_validation"]["step"] == 4
    assert half["throughput"]["tokens_per_sec"] > 0
    assert cli("fit", "run_dir=run", "trust_config=true").code == 0
    whole, written = record(tmp_path / "run"), rows(tmp_path / "run")
    assert whole["tokens"] > half["tokens"]
    assert whole["tokens"] == int(written[-1]["tokens"])
    assert whole["seconds"]["train"] > half["seconds"]["train"] > 0
    assert whole["seconds"]["processor"] > half["seconds"]["processor"] > 0
    assert whole["seconds"]["train"] >= float(written[-1]["seconds"])
    assert whole["tokens_per_second"] == pytest.approx(whole["tokens"] / whole["seconds"]["train"], rel=0.01)
    losses = {float(row["val/loss"]): int(row["step"]) for row in written if row["val/loss"]}
    assert whole["best_validation"] == {"loss": pytest.approx(min(losses)), "step": losses[min(losses)]}
    last = [row for row in written if row["train/loss"]][-1]
    for name, value in whole["throughput"].items():
        assert float(last[f"train/throughput/{name}"]) == pytest.approx(value)
    assert whole["throughput"].keys() >= {"tokens_per_sec", "samples_per_sec", "steps_per_sec", "flops_per_sec"}
