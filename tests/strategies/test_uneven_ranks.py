"""Ranks that hold different numbers of rows train on; ranks with different numbers of batches are refused by name."""

from __future__ import annotations

import distributed_jobs as jobs
import pytest
from rank_group import Groups
from tolerances import RANKS


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param("strategy=ddp ffn=memory_plus table.shard=dim", marks=pytest.mark.slow),
        "strategy=fsdp ffn=peer table.shard=row",
        pytest.param("strategy=ddp ffn=moe", marks=pytest.mark.slow),
    ],
)
def test_batches_of_different_sizes_give_the_losses_of_one_process(ranks: Groups, overrides: str) -> None:
    ffn = overrides.split()[1]
    expected = jobs.train(["strategy=single", ffn], steps=4)
    for found in ranks(2).run(jobs.train_unevenly, overrides.split(), 4, [7, 1]):
        losses = [step["train/loss"] for step in found]
        assert losses == pytest.approx([step["train/loss"] for step in expected], rel=RANKS["loss"])


@pytest.mark.parametrize("known", [True, False])
def test_different_numbers_of_batches_are_refused_on_every_rank(ranks: Groups, known: bool) -> None:
    for message in ranks(2).run(jobs.train_on, ["strategy=ddp", "ffn=memory_plus"], [3, 5], known):
        expected = "gives the ranks 3, 5 batches" if known else "has ended on rank 0 at step 2"
        assert expected in message
