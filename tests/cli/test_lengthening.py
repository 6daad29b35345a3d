"""A run that is continued with another `trainer.max_steps`, and what becomes of its learning rate."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import assert_equal_runs
from small import Run, record, rows

from pkm_lightning.build.schedule import configured_schedule
from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.cli.lengthening import describe_length, with_length
from pkm_lightning.errors import ConfigError, RunDirectoryError

COMMAND = [
    "fit", "data=text", "data.path=a.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4",
    "model.n_layers=1", "model.dim=16", "model.ffn_dim=16", "model.n_heads=2", "model.n_kv_heads=2",
    "model.memory.n_keys=16", "callbacks=[metrics_csv,step_checkpoint]", "callbacks.step_checkpoint.every_n_steps=3",
    "trainer.val_check_interval=4", "trainer.log_every_n_steps=1", "logger=none", "optim.decay_share=0.25",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on a mat and saw the dog run under the old blue tree . " * 40)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of steps at which runs are asked to stop."""
    steps: list[int] = []
    agreed = StepCheckpoint._stop_is_agreed

    def ask(self: StepCheckpoint, trainer: Any) -> bool:
        if trainer.global_step in steps:
            self.request_stop("SIGTERM")
        return agreed(self, trainer)

    monkeypatch.setattr(StepCheckpoint, "_stop_is_agreed", ask)
    return steps


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_wsd_before_its_decay_continues_like_a_run_of_the_new_length(
    cli: Run, text: None, tmp_path: Path, stopped: list[int]
) -> None:
    wsd = [*COMMAND, "optim.schedule=wsd", "optim.warmup_steps=3"]
    assert cli(*wsd, "trainer.max_steps=20", "run_dir=whole").code == 0
    stopped.append(8)
    assert cli(*wsd, "trainer.max_steps=12", "run_dir=run").code == 143
    stopped.clear()
    shown = cli("fit", "run_dir=run", "trainer.max_steps=20")
    assert shown.code == 0, shown.err
    assert "the rate has not begun to fall; the run continues exactly like one of 20 steps" in shown.out
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert record(tmp_path / "run")["metrics"] == record(tmp_path / "whole")["metrics"]
    # A finished one goes back to the checkpoint from before its decay.
    assert cli(*wsd, "trainer.max_steps=12", "run_dir=ended").code == 0
    assert names(tmp_path / "ended") == ["step-00000009.ckpt", "step-00000012.ckpt"]
    shutil.copytree("ended", "killed")
    shown = cli("fit", "run_dir=ended", "resume=always", "trainer.max_steps=20")
    assert "one of 20 steps; the 3 steps after step 9, in which the rate fell, are trained anew" in shown.out
    assert names(tmp_path / "ended") == ["step-00000015.ckpt", "step-00000020.ckpt"]
    assert_equal_runs(tmp_path / "whole", tmp_path / "ended")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    # A kill leaves the new length beside the checkpoint of the old end; the moved run goes back without a warning, too.
    (tmp_path / "killed" / "config.yaml").write_text((tmp_path / "ended" / "config.yaml").read_text())
    shown = cli("fit", "run_dir=killed", "resume=always")
    assert "the 3 steps after step 9" in shown.out
    assert not shown.err
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert saved["trainer"]["max_steps"] == 20
    assert saved["optim"] == yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["optim"]


def test_a_finished_run_follows_the_longer_schedule_from_its_end_on(cli: Run, text: None, tmp_path: Path) -> None:
    linear = [*COMMAND, "optim.warmup_share=0.25", "trainer.max_steps=8", "run_dir=run"]
    assert cli(*linear).code == 0
    first = record(tmp_path / "run")
    shown = cli("fit", "run_dir=run", "resume=always", "trainer.max_steps=12")
    assert shown.code == 0, shown.err
    assert "optim.schedule=linear had brought optim.lr to " in shown.out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["optim"]["warmup_steps"] == 2  # a quarter of 8 steps, which it has had, and not of 12
    optim = saved["optim"]
    expected = [optim["lr"] * configured_schedule(optim, 8)(step) for step in range(8)]
    expected += [optim["lr"] * configured_schedule(optim, 12)(step) for step in range(8, 12)]
    rates = [float(row["train/lr"]) for row in rows(tmp_path / "run") if row["train/lr"]]
    assert rates == pytest.approx(expected)
    after = record(tmp_path / "run")
    assert after["status"] == "finished"
    assert after["tokens"] == first["tokens"] * 12 / 8
    assert after["metrics"]["test/loss"] != first["metrics"]["test/loss"]
    # The same command again has nothing left to do, and a shorter run is refused.
    assert cli("fit", "run_dir=run", "resume=always", "trainer.max_steps=12").code == 0
    shown = cli("fit", "run_dir=run", "resume=always", "trainer.max_steps=11")
    assert "trainer.max_steps=11 is less than the 12 steps that run_dir=" in shown.err


def saved(schedule: str, **optim: Any) -> dict[str, Any]:
    given = {"lr": 1.0, "schedule": schedule, "warmup_share": 0.1, "final_factor": 0.0, "decay_share": 0.2, **optim}
    return {"run_dir": "run", "optim": given, "trainer": {"max_steps": 100}}


@pytest.mark.parametrize(
    ("schedule", "step", "max_steps", "words"),
    [
        ("wsd", 80, 200, "exactly like one of 200 steps"),
        ("wsd", 90, 200, "had brought optim.lr to 0.55 at step 90; from here on .* which begins with 1$"),
        ("linear", 5, 200, "exactly like one of 200 steps"),
        ("linear", 100, 200, "had brought optim.lr to 0.0111 at step 100; .* which begins with 0.526$"),
        ("cosine", 100, 200, "optim.schedule=cosine had brought"),
        ("wsd", 90, 95, "had brought optim.lr to 0.55 at step 90; .* a run of 95 steps, which begins with 0.263$"),
    ],
)
def test_what_another_length_does_is_described(schedule: str, step: int, max_steps: int, words: str) -> None:
    before = saved(schedule)
    after = with_length(before, max_steps, step=step)
    assert after["trainer"]["max_steps"] == max_steps
    assert after["optim"]["warmup_steps"] == 10
    sentence = describe_length(before, after, step=step)
    assert sentence is not None
    assert re.search(words, sentence), sentence
    assert describe_length(before, with_length(before, 100, step=step), step=step) is None


@pytest.mark.parametrize(
    ("max_steps", "error"),
    [(99, "99 is less than the 100 steps"), (0, "trainer.max_steps=0"), ("many", "trainer.max_steps='many'")],
)
def test_a_length_that_cannot_be_is_refused(max_steps: Any, error: str) -> None:
    with pytest.raises((RunDirectoryError, ConfigError), match=error):
        with_length(saved("wsd"), max_steps, step=100)
