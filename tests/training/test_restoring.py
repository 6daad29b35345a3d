"""A state in memory is complete: restored at any time, training continues bit for bit as it did from there."""

from __future__ import annotations

from typing import Any

import distributed_jobs as jobs
import lightning as L
import pytest
import torch
from rank_group import Groups

from pkm_lightning.training.restoring import HostSnapshot, scale_learning_rates


@pytest.mark.parametrize(
    ("overrides", "kept_at"),
    [("ffn=memory_plus", 0), ("ffn=memory_plus table.learning=dense", 2), ("ffn=peer", 2), ("ffn=moe", 2)],
)
def test_training_repeats_itself_from_a_restored_state(overrides: str, kept_at: int) -> None:
    assert jobs.repeat([*overrides.split(), "strategy=single"], kept_at) == []


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_on_ranks_too(ranks: Groups, strategy: str) -> None:
    overrides = ["ffn=memory_plus", f"strategy={strategy}", "table.shard=row"]
    assert ranks(2).run(jobs.repeat, overrides, 2) == [[], []]


def test_a_lower_rate_lasts_and_keeps_the_shape_of_the_schedule() -> None:
    class Lower(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                scale_learning_rates(trainer, 0.5)

    given = jobs.settings("ffn=dense", "strategy=single", steps=6)
    usual = jobs.fit(given, 6)[2]
    lowered = jobs.fit(given, 6, watching=[Lower()])[2]
    rates = [[step["train/lr"] for step in seen] for seen in (usual, lowered)]
    assert rates[1][:3] == rates[0][:3]
    assert rates[1][3:] == pytest.approx([rate / 2 for rate in rates[0][3:]])


def test_loggers_count_on_from_the_step_that_was_gone_back_to() -> None:
    seen: list[tuple[int, int]] = []

    class GoBack(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.state = HostSnapshot(trainer, pl_module)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))
            if len(seen) == 3:
                self.state.restore(trainer, pl_module)

    jobs.fit(jobs.settings("ffn=memory_plus", "strategy=single", steps=4), 7, watching=[GoBack()])
    assert seen == [(1, 0), (2, 1), (3, 2), (1, 0), (2, 1), (3, 2), (4, 3)]


def test_a_state_is_a_copy() -> None:
    kept: list[HostSnapshot] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            kept.append(HostSnapshot(trainer, pl_module))

    jobs.fit(jobs.settings("ffn=memory_plus", "strategy=single", steps=3), 3, watching=[Keep()])
    first, last = kept[0]._weights, kept[2]._weights
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert [state.step for state in kept] == [1, 2, 3]
