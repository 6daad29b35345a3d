"""Settings of slot usage and revival that do not go together are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import distributed_jobs as jobs
import pytest
from small import SMALL_RUN, Run

from pkm_lightning.build.run import resolve
from pkm_lightning.errors import ConfigError

QUERIES = ["callbacks=[default,slot_revival]", "callbacks.slot_revival.source=queries"]
HALVES = "callbacks.slot_usage.per_head=halves"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks.slot_usage.every_n_steps=3", "trainer.log_every_n_steps=2"], "every_n_steps=3 is no multiple of"),
        ([*QUERIES], "needs callbacks.slot_usage.per_head=halves"),
        ([*QUERIES, HALVES, "model.compile=true"], "model.compile=true hides"),
        ([*QUERIES, HALVES, "strategy=deepspeed_2"], "DeepSpeed's engine owns"),
        (["callbacks=slot_revival"], "needs callbacks.slot_usage, which knows what is dead"),
    ],
)
def test_what_cannot_work_leaves_no_run_directory(overrides: list[str], message: str, tmp_path: Path) -> None:
    given = jobs.config("ffn=memory_plus", f"run_dir={tmp_path / 'run'}", "model.vocab_size=auto", *overrides)
    with pytest.raises(ConfigError, match=message):
        resolve(given, trains=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("per_head", ["halves", "full", "true"])
def test_what_goes_together_is_assembled(per_head: str, tmp_path: Path) -> None:
    given = [*QUERIES, f"callbacks.slot_usage.per_head={per_head}", "strategy=single"]
    resolve(jobs.config("ffn=memory_plus", f"run_dir={tmp_path / 'run'}", "model.vocab_size=auto", *given), trains=True)


def test_tables_with_too_many_slots_are_said_and_not_counted(cli: Run, tmp_path: Path) -> None:
    shown = cli("fit", *SMALL_RUN, "run_dir=run", "callbacks.slot_usage.max_slots=255", "trainer.max_steps=2")
    assert shown.code == 0, shown.err
    assert "layer0.slot, layer1.slot have more slots than callbacks.slot_usage.max_slots" in shown.out + shown.err
    assert not (tmp_path / "run" / "usage.json").exists()
