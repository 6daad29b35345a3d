"""Faults in a real training, and what each policy makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from rank_group import Groups

from pkm_lightning.errors import InstabilityError

FAULTS = [faults.NotANumber, faults.HugeGradient, faults.HugeRate, faults.InfiniteRow]
#: One in every run, all in the long ones.
ONE_OF_THEM = [FAULTS[0], *(pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS[1:])]


def events(path: Path) -> list[dict[str, Any]]:
    file = path / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> float:
    path = tmp_path_factory.mktemp("undisturbed")
    module, losses, _ = faults.train(path, faults.watching(path, policies=faults.everything("rollback")))
    assert events(path) == []
    assert len(losses.losses) == faults.STEPS
    return faults.loss_on_other_rows(module)


@pytest.mark.parametrize("fault", ONE_OF_THEM)
def test_after_a_rollback_training_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: float, fault: Any
) -> None:
    watch = faults.watching(tmp_path, policies=faults.everything("rollback"))
    module, losses, trainer = faults.train(tmp_path, fault(), watch)
    assert faults.loss_on_other_rows(module) == pytest.approx(undisturbed, rel=0.02)
    assert trainer.global_step == faults.STEPS
    assert len(losses.losses) > faults.STEPS
    went_back = [event for event in events(tmp_path) if event["action"] == "rollback"]
    assert faults.AT < went_back[0]["step"] <= faults.AT + 10
    assert all(event["returned_to"] < event["step"] for event in went_back)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_without_an_answer_three_of_the_faults_spoil_the_run(tmp_path: Path, undisturbed: float, fault: Any) -> None:
    module, *_ = faults.train(tmp_path, fault(), faults.watching(tmp_path))
    loss = faults.loss_on_other_rows(module)
    # Clipping alone mends a gradient that is too large.
    spoiled = math.isnan(loss) or loss > 1.02 * undisturbed
    assert spoiled == (fault is not faults.HugeGradient)
    assert {event["action"] for event in events(tmp_path)} == {"warn"}


@pytest.mark.parametrize("fault", ONE_OF_THEM[:2])
def test_a_bad_step_is_skipped(tmp_path: Path, undisturbed: float, fault: Any) -> None:
    module, losses, trainer = faults.train(
        tmp_path, fault(), faults.watching(tmp_path, policies=faults.everything("skip"))
    )
    assert len(losses.losses) == trainer.global_step == faults.STEPS
    assert {event["step"] for event in events(tmp_path)} == {faults.AT + 1}
    assert faults.loss_on_other_rows(module) == pytest.approx(undisturbed, rel=0.02)


@pytest.mark.parametrize("fault", ONE_OF_THEM)
def test_stop_ends_the_run_and_the_last_checkpoint_is_good(tmp_path: Path, fault: Any) -> None:
    policies = {**faults.everything("stop"), "weight_not_finite": "stop"}
    with pytest.raises(InstabilityError, match=r"in step 8\d"):
        faults.train(tmp_path, fault(), faults.watching(tmp_path, policies=policies))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_what_cannot_be_skipped_away_ends_the_run(tmp_path: Path) -> None:
    policies = {**faults.everything("skip"), "weight_not_finite": "warn"}
    watch = faults.watching(tmp_path, policies=policies, max_tries=4)
    with pytest.raises(InstabilityError, match=r"4 times skip did not get beyond it: lower optim\.lr"):
        faults.train(tmp_path, faults.InfiniteRow(), watch)


def test_what_comes_back_after_each_rollback_ends_the_run(tmp_path: Path) -> None:
    class Always(faults.NotANumber):
        """At the same step again and again."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, faults.AT if trainer.global_step == 30 else 0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if hasattr(self, "hook"):
                self.hook.remove()

    watch = faults.watching(tmp_path, policies=faults.everything("rollback"), max_tries=3)
    with pytest.raises(InstabilityError, match="3 times rollback did not get beyond it"):
        faults.train(tmp_path, Always(), watch)
    assert len({event["returned_to"] for event in events(tmp_path)}) == 1


def test_the_rate_is_lowered_once_a_rollback_even_from_an_older_state(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies=faults.everything("rollback"), lr_factor=0.5)
    _, _, trainer = faults.train(tmp_path, faults.HugeRate(), watch)
    count = len({(event["step"], number) for number, event in enumerate(events(tmp_path))})
    rates = trainer.lr_scheduler_configs[0].scheduler.base_lrs
    assert count >= 2
    assert rates[0] == pytest.approx(0.006 * 0.5**count)


@pytest.mark.slow
def test_an_infinite_row_is_found_before_it_is_read(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies={"weight_not_finite": "rollback"})
    faults.train(tmp_path, faults.InfiniteRow(), watch)
    (found,) = events(tmp_path)
    assert found["event"] == "weight_not_finite"
    assert found["layer"] == "model.tables.0.weight"
    assert found["step"] == faults.AT + 1


@pytest.mark.slow
def test_a_rollback_from_disk(tmp_path: Path, undisturbed: float) -> None:
    watch = faults.watching(tmp_path, policies=faults.everything("rollback"), restore="disk")
    module, _, trainer = faults.train(tmp_path, faults.NotANumber(), watch)
    assert {event["returned_to"] for event in events(tmp_path)} == {60}
    assert trainer.global_step == faults.STEPS
    assert faults.loss_on_other_rows(module) == pytest.approx(undisturbed, rel=0.02)


@pytest.mark.parametrize(
    ("strategy", "restore"),
    [
        pytest.param("ddp", "memory", marks=pytest.mark.slow),
        pytest.param("fsdp", "memory", marks=pytest.mark.slow),
        pytest.param("ddp", "disk", marks=pytest.mark.slow),
        pytest.param("deepspeed_1", "disk", marks=pytest.mark.slow),
        pytest.param("deepspeed_3", "disk", marks=pytest.mark.slow),
    ],
)
def test_ranks_go_back_together(ranks: Groups, tmp_path: Path, strategy: str, restore: str) -> None:
    found = ranks(2).run(faults.spread, [f"strategy={strategy}", "table.shard=dim"], str(tmp_path), restore)
    for rank in found:
        assert rank["final"] == 45
        assert rank["losses"][37] != rank["losses"][37]
        assert rank["steps"][37] == 30
        assert all(math.isfinite(loss) for loss in rank["losses"][38:] + rank["norms"])
    assert found[0]["steps"] == found[1]["steps"]
    assert found[0]["losses"][38:] == pytest.approx(found[1]["losses"][38:])
