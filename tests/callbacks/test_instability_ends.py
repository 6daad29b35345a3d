"""How a watched training ends: what is left on disk and in memory, what is said, and who is waited for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faults
import lightning as L
import pytest
import torch
from rank_group import Groups

from pkm_lightning.callbacks import Diagnostics
from pkm_lightning.callbacks.event_log import Event, EventLog
from pkm_lightning.callbacks.policies import Tries, all_policies
from pkm_lightning.errors import ConfigError, InstabilityError


class RowBeforeSave(faults.InfiniteRow):
    """The row breaks in a step that a checkpoint is written of."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, faults.AT if batch_idx == 89 else 0)


def checkpoints(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    "policy", ["rollback", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("stop", "skip"))]
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, policy: str) -> None:
    watch = faults.watching(tmp_path, policies=faults.everything(policy), restore="disk")
    if policy == "rollback":
        trainer = faults.train(tmp_path, RowBeforeSave(), watch)[2]
        assert trainer.global_step == faults.STEPS
    else:
        with pytest.raises(InstabilityError, match=r"step-00000060\.ckpt"):
            faults.train(tmp_path, RowBeforeSave(), watch)
        assert checkpoints(tmp_path) == ["step-00000060.ckpt"]
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(file, weights_only=False)["state_dict"]
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_the_last_step_is_looked_at_before_it_is_saved(tmp_path: Path) -> None:
    class Last(faults.InfiniteRow):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, faults.AT if batch_idx == 30 else 0)

    watch = faults.watching(tmp_path, policies={"weight_not_finite": "rollback"})
    overrides = ("strategy=single", "trainer.log_every_n_steps=10")
    assert faults.train(tmp_path, Last(), watch, overrides=overrides, steps=31)[2].global_step == 31


@pytest.mark.slow
def test_what_was_saved_of_an_abandoned_branch_is_removed(tmp_path: Path) -> None:
    class Late(faults.NotANumber):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, faults.AT if batch_idx == 91 else 0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, faults.AT if batch_idx == 91 else 0)
            if batch_idx in (91, 92):
                left.append(checkpoints(tmp_path))

    left: list[list[str]] = []
    watch = faults.watching(tmp_path, policies=faults.everything("rollback"))
    faults.train(tmp_path, Late(), watch)
    assert left == [["step-00000090.ckpt"], ["step-00000080.ckpt"]]
    assert checkpoints(tmp_path) == ["step-00000160.ckpt"]


def test_the_reason_is_the_event_that_is_answered(tmp_path: Path) -> None:
    with pytest.raises(
        InstabilityError, match=r"^loss_not_finite of loss in step 81 .*its last checkpoint is step-00000060"
    ):
        faults.train(tmp_path, faults.NotANumber(), faults.watching(tmp_path, policies={"loss_not_finite": "stop"}))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["stop", "warn", "warn"]


@pytest.mark.slow
def test_a_lasting_change_of_level_is_not_refused_for_ever(tmp_path: Path) -> None:
    class Louder(faults.HugeGradient):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.batches += 1
            for parameter in pl_module.parameters():
                if parameter.grad is not None and self.batches > faults.AT:
                    parameter.grad.mul_(20)

    watch = faults.watching(tmp_path, policies={"gradient_spike": "skip"}, max_tries=30)
    assert faults.train(tmp_path, Louder(), watch)[2].global_step == faults.STEPS


def test_a_limit_of_an_unknown_figure_is_refused_at_the_first_look(tmp_path: Path) -> None:
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
    assert ranks(2).run(faults.stop_one_rank, overrides, str(tmp_path), timeout=60.0) == ["asked to stop", "SIGTERM"]
    assert checkpoints(tmp_path) == ["step-00000007.ckpt"]


def test_tries_count_skips_in_a_row_and_rollbacks_without_progress() -> None:
    tries = Tries(2)
    assert tries.allow("rollback", 50)
    for step in (20, 30, 40):
        assert tries.allow("skip", step)
        tries.made(step + 1)
    assert [tries.allow("skip", step) for step in (41, 42, 43)] == [True, True, False]
    assert tries.allow("rollback", 45)
    assert not tries.allow("rollback", 50)
    again = Tries(2)
    again.load_state_dict(tries.state_dict())
    assert not again.allow("rollback", 50)
    assert again.allow("rollback", 51)


def test_broken_weights_go_with_broken_losses() -> None:
    for given, expected in (("warn", "warn"), ("skip", "stop"), ("rollback", "rollback"), ("stop", "stop")):
        assert all_policies({"loss_not_finite": given, "weight_not_finite": None})["weight_not_finite"] == expected
    assert all_policies({"loss_not_finite": "stop", "weight_not_finite": "warn"})["weight_not_finite"] == "warn"


def test_a_killed_run_forgets_events_that_its_checkpoint_does_not_know(tmp_path: Path) -> None:
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
    fresh = EventLog(tmp_path / "events.jsonl")
    fresh.begin()
    assert not fresh.path.exists()
