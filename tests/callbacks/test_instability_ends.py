"""How a watched training ends: what remains on disk and in memory, and which ranks are waited for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faults
import lightning as L
import pytest
from faults import assert_finite
from rank_group import Groups

from pkm_lightning.callbacks import Diagnostics
from pkm_lightning.callbacks.event_log import Event, EventLog
from pkm_lightning.callbacks.event_policies import Retries, policies_by_event
from pkm_lightning.errors import ConfigError, InstabilityError


def checkpoints(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    "policy", ["rollback", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("stop", "skip"))]
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, policy: str) -> None:
    """Breaks a row in step 10, of which a checkpoint is due."""
    watch = faults.watching(tmp_path, policies=faults.everything(policy), restore="disk")
    if policy == "rollback":
        trainer = faults.train(tmp_path, faults.InfiniteRow(9), watch, steps=12, save_every=5)[2]
        assert trainer.global_step == 12
        assert_finite(tmp_path, "step-00000012.ckpt")
    else:
        with pytest.raises(InstabilityError, match=r"step-00000005\.ckpt"):
            faults.train(tmp_path, faults.InfiniteRow(9), watch, steps=12, save_every=5)
        assert_finite(tmp_path, "step-00000005.ckpt")


def test_the_last_step_is_checked_before_it_is_saved(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies={"weight_not_finite": "rollback"})
    overrides = (*faults.SMALL, "trainer.log_every_n_steps=5")
    trainer = faults.train(tmp_path, faults.InfiniteRow(6), watch, overrides=overrides, steps=7)[2]
    assert trainer.global_step == 7
    assert_finite(tmp_path, "step-00000007.ckpt")


def test_checkpoints_of_abandoned_steps_are_removed(tmp_path: Path) -> None:
    """Breaks step 12: training returns to step 8, whose checkpoint replaces that of step 10."""

    class Late(faults.NotANumber):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if batch_idx in (11, 12):
                seen.append(checkpoints(tmp_path))

    seen: list[list[str]] = []
    watch = faults.watching(tmp_path, policies=faults.everything("rollback"))
    faults.train(tmp_path, Late(11), watch, steps=13)
    assert seen == [["step-00000010.ckpt"], ["step-00000008.ckpt"]]
    assert checkpoints(tmp_path) == ["step-00000013.ckpt"]


@pytest.mark.slow
def test_a_lasting_change_of_level_is_not_refused_for_ever(tmp_path: Path) -> None:
    class Louder(faults.HugeGradient):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.batches += 1
            for parameter in pl_module.parameters():
                if parameter.grad is not None and self.batches > faults.LONG_AT:
                    parameter.grad.mul_(20)

    watch = faults.long_watch(tmp_path, policies={"gradient_spike": "skip"}, max_tries=30)
    assert faults.train_long(tmp_path, Louder(), watch)[2].global_step == faults.LONG_STEPS


def test_a_limit_of_an_unknown_figure_is_refused_at_the_first_log(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, limits={"atention_logit_max": 1.0})
    with pytest.raises(ConfigError, match=r"'atention_logit_max' is not known.*Did you mean 'attention_logit_max'"):
        faults.train(tmp_path, Diagnostics(rows=1), watch, steps=2)


def test_nothing_is_held_after_an_error(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.module = pl_module
            if trainer.global_step == 3:
                raise ValueError("the original fault")

    fails, watch = Fails(), faults.watching(tmp_path, policies=faults.everything("rollback"))
    with pytest.raises(ValueError, match="the original fault"):
        faults.train(tmp_path, fails, watch, steps=5)
    assert fails.module.watch.judges == []
    assert watch.good is not None
    assert watch.good._states == []


@pytest.mark.slow
def test_a_rank_that_alone_is_asked_to_stop_stops_all(ranks: Groups, tmp_path: Path) -> None:
    overrides = ["strategy=ddp", "table.shard=dim"]
    assert ranks(2).run(faults.stop_one_rank, overrides, str(tmp_path), timeout=60.0) == ["SIGTERM", "SIGTERM"]
    assert checkpoints(tmp_path) == ["step-00000007.ckpt"]


def test_retries_count_skips_in_a_row_and_rollbacks_without_progress() -> None:
    retries = Retries(2)
    assert retries.allow("rollback", 50)
    for step in (20, 30, 40):
        assert retries.allow("skip", step)
        retries.register_success(step + 1)
    assert [retries.allow("skip", step) for step in (41, 42, 43)] == [True, True, False]
    assert retries.allow("rollback", 45)
    assert not retries.allow("rollback", 50)
    again = Retries(2)
    again.load_state_dict(retries.state_dict())
    assert not again.allow("rollback", 50)
    assert again.allow("rollback", 51)


def test_the_policy_of_weights_follows_that_of_losses() -> None:
    for policy, expected in (("warn", "warn"), ("skip", "stop"), ("rollback", "rollback"), ("stop", "stop")):
        policies = policies_by_event({"loss_not_finite": policy, "weight_not_finite": None})
        assert policies["weight_not_finite"] == expected
    assert policies_by_event({"loss_not_finite": "stop", "weight_not_finite": "warn"})["weight_not_finite"] == "warn"


def test_an_event_that_is_only_warned_of_is_shown_once_per_100_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in (1, 2, 100, 101, 150):
        log.write(Event("limit", step, 2.0), "warn")
    log.write(Event("limit", 151, 2.0), "stop")
    assert [message.split()[3] for message in caplog.messages] == ["1", "101", "151"]
    assert log.lines == 6


def test_a_killed_run_forgets_events_that_its_checkpoint_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = EventLog(tmp_path / "events.jsonl")
    first.begin()
    for step in (1, 2, 3):
        first.write(Event("limit", step, 2.0, "score_max", 0, 1.0), "warn")
    again = EventLog(tmp_path / "events.jsonl")
    again.lines = 2
    again.begin()
    again.write(Event("loss_not_finite", 9, float("nan"), "loss"), "stop", returned_to=4)
    lines = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 9]
    assert (lines[2]["value"], lines[2]["threshold"], lines[2]["returned_to"]) == ("nan", None, 4)
    again.lines = 7  # of which a loss of power has left three
    again.begin()
    assert again.lines == again.lines_on_disk() == 3
    assert "has 3 of the 7 events before the checkpoint" in caplog.text
    fresh = EventLog(tmp_path / "events.jsonl")
    fresh.begin()
    assert not fresh.path.exists()
