"""Faults in a real training, and what each policy makes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from faults import assert_finite, events
from rank_group import Groups

from pkm_lightning.errors import InstabilityError

FAULTS = [faults.NotANumber, faults.HugeGradient, faults.HugeRate, faults.InfiniteRow]


def assert_same_weights(module: Any, other: Any) -> None:
    for (name, ours), theirs in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_after_a_rollback_training_is_that_of_a_run_without_the_abandoned_batches(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies=faults.everything("rollback"))
    module, losses, trainer = faults.train(tmp_path, faults.NotANumber(), watch)
    written = events(tmp_path)
    # The state of step 16 was settled; that of step 24 was younger than 3 steps.
    assert {(event["step"], event["action"], event["returned_to"]) for event in written} == {(27, "rollback", 16)}
    assert written[0].keys() == {"step", "event", "layer", "figure", "value", "threshold", "action", "returned_to"}
    assert (written[0]["event"], written[0]["value"], written[0]["threshold"]) == ("loss_not_finite", "nan", None)
    assert trainer.global_step == faults.STEPS
    assert losses.steps == [*range(1, 27), 16, *range(17, faults.STEPS + 1)]
    quiet = faults.watching(tmp_path / "quiet", policies=faults.everything("rollback"))
    other, *_ = faults.train(tmp_path / "quiet", quiet, without=range(16, 27))
    assert events(tmp_path / "quiet") == []
    assert_same_weights(module, other)
    assert_finite(tmp_path, f"step-{faults.STEPS:08d}.ckpt")


def test_a_skipped_step_leaves_the_weights_alone(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies=faults.everything("skip"))
    still = (*faults.SMALL, "optim.warmup_share=0", "optim.final_factor=1.0")
    module, losses, trainer = faults.train(tmp_path, faults.NotANumber(), watch, overrides=still, steps=32)
    assert len(losses.losses) == trainer.global_step == 32
    assert {event["step"] for event in events(tmp_path)} == {faults.AT + 1}
    dropped = range(faults.AT, faults.AT + 1)
    other, *_ = faults.train(tmp_path / "other", overrides=still, steps=31, without=dropped)
    assert_same_weights(module, other)


@pytest.mark.slow
def test_the_reason_of_a_stop_is_the_event_that_is_answered(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies={"loss_not_finite": "stop"})
    with pytest.raises(
        InstabilityError, match=r"^loss_not_finite of loss in step 27 .*its last checkpoint is step-00000020"
    ):
        faults.train(tmp_path, faults.NotANumber(), watch)
    assert [event["action"] for event in events(tmp_path)] == ["stop", "warn", "warn"]
    assert_finite(tmp_path, "step-00000020.ckpt")


def test_what_skipping_does_not_mend_ends_the_run(tmp_path: Path) -> None:
    policies = {**faults.everything("skip"), "weight_not_finite": "warn"}
    watch = faults.watching(tmp_path, policies=policies, max_tries=4)
    with pytest.raises(InstabilityError, match=r"4 times skip did not get beyond it: lower optim\.lr"):
        faults.train(tmp_path, faults.InfiniteRow(), watch)


def test_what_comes_back_after_each_rollback_ends_the_run_at_a_lower_rate(tmp_path: Path) -> None:
    class Always(faults.NotANumber):
        """At the same step again and again."""

        def is_due(self, trainer: Any, batch_idx: int) -> bool:
            return trainer.global_step == 13

    watch = faults.watching(tmp_path, policies=faults.everything("rollback"), max_tries=3, lr_factor=0.5)
    fault, losses = Always(), faults.Losses()
    with pytest.raises(InstabilityError, match="3 times rollback did not get beyond it"):
        faults.train(tmp_path, fault, losses, watch)
    assert {event["returned_to"] for event in events(tmp_path)} == {8}
    # Each rollback restores the same state, whose rate was never lowered.
    assert losses.trainer.lr_scheduler_configs[0].scheduler.base_lrs[0] == pytest.approx(0.006 * 0.5**3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> float:
    path = tmp_path_factory.mktemp("undisturbed")
    module, losses, _ = faults.train_long(path, faults.long_watch(path, policies=faults.everything("rollback")))
    assert events(path) == []
    assert len(losses.losses) == faults.LONG_STEPS
    return faults.loss_on_other_rows(module)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_rollback_training_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: float, fault: Any
) -> None:
    watch = faults.long_watch(tmp_path, policies=faults.everything("rollback"))
    module, losses, trainer = faults.train_long(tmp_path, fault(faults.LONG_AT), watch)
    assert faults.loss_on_other_rows(module) == pytest.approx(undisturbed, rel=0.02)
    assert trainer.global_step == faults.LONG_STEPS
    assert len(losses.losses) > faults.LONG_STEPS
    rollbacks = [event for event in events(tmp_path) if event["action"] == "rollback"]
    assert faults.LONG_AT < rollbacks[0]["step"] <= faults.LONG_AT + 10
    assert all(event["returned_to"] < event["step"] for event in rollbacks)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_without_an_answer_three_of_the_faults_spoil_the_run(tmp_path: Path, undisturbed: float, fault: Any) -> None:
    module, *_ = faults.train_long(tmp_path, fault(faults.LONG_AT), faults.long_watch(tmp_path))
    loss = faults.loss_on_other_rows(module)
    # Clipping alone mends a gradient that is too large.
    spoiled = math.isnan(loss) or loss > 1.02 * undisturbed
    assert spoiled == (fault is not faults.HugeGradient)
    assert {event["action"] for event in events(tmp_path)} == {"warn"}


@pytest.mark.slow
def test_a_huge_gradient_is_skipped(tmp_path: Path, undisturbed: float) -> None:
    watch = faults.long_watch(tmp_path, policies=faults.everything("skip"))
    module, _, trainer = faults.train_long(tmp_path, faults.HugeGradient(faults.LONG_AT), watch)
    assert trainer.global_step == faults.LONG_STEPS
    assert {event["step"] for event in events(tmp_path)} == {faults.LONG_AT + 1}
    assert faults.loss_on_other_rows(module) == pytest.approx(undisturbed, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_stop_ends_the_run_and_the_last_checkpoint_is_good(tmp_path: Path, fault: Any) -> None:
    policies = {**faults.everything("stop"), "weight_not_finite": "stop"}
    with pytest.raises(InstabilityError, match=r"in step 8\d"):
        faults.train_long(tmp_path, fault(faults.LONG_AT), faults.long_watch(tmp_path, policies=policies))
    assert_finite(tmp_path, "step-00000060.ckpt")


@pytest.mark.slow
def test_the_rate_is_lowered_once_per_rollback_even_from_an_older_state(tmp_path: Path) -> None:
    watch = faults.long_watch(tmp_path, policies=faults.everything("rollback"), lr_factor=0.5)
    _, _, trainer = faults.train_long(tmp_path, faults.HugeRate(faults.LONG_AT), watch)
    count = len(events(tmp_path))
    rates = trainer.lr_scheduler_configs[0].scheduler.base_lrs
    assert count >= 2
    assert rates[0] == pytest.approx(0.006 * 0.5**count)


@pytest.mark.slow
def test_an_infinite_row_is_found_before_it_is_read(tmp_path: Path) -> None:
    watch = faults.watching(tmp_path, policies={"weight_not_finite": "rollback"})
    faults.train(tmp_path, faults.InfiniteRow(), watch)
    (event,) = events(tmp_path)
    assert event["event"] == "weight_not_finite"
    assert event["layer"] == "model.tables.0.weight"
    assert event["step"] == faults.AT + 1


@pytest.mark.slow
def test_a_rollback_from_disk(tmp_path: Path, undisturbed: float) -> None:
    watch = faults.long_watch(tmp_path, policies=faults.everything("rollback"), restore="disk")
    module, _, trainer = faults.train_long(tmp_path, faults.NotANumber(faults.LONG_AT), watch)
    assert {event["returned_to"] for event in events(tmp_path)} == {60}
    assert trainer.global_step == faults.LONG_STEPS
    assert faults.loss_on_other_rows(module) == pytest.approx(undisturbed, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "restore"),
    [("ddp", "memory"), ("fsdp", "memory"), ("ddp", "disk"), ("deepspeed_1", "disk"), ("deepspeed_3", "disk")],
)
def test_ranks_go_back_together(ranks: Groups, tmp_path: Path, strategy: str, restore: str) -> None:
    both = ranks(2).run(faults.spread, [f"strategy={strategy}", "table.shard=dim"], str(tmp_path), restore)
    for rank in both:
        assert rank["final"] == 45
        assert rank["losses"][37] != rank["losses"][37]
        assert rank["steps"][37] == 30
        assert all(math.isfinite(loss) for loss in rank["losses"][38:] + rank["norms"])
    assert both[0]["steps"] == both[1]["steps"]
    assert both[0]["losses"][38:] == pytest.approx(both[1]["losses"][38:])
