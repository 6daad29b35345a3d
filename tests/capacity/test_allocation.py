"""Sizes that cannot be allocated are refused by arithmetic, and what fits is not."""

from __future__ import annotations

import pytest
from small import resolved

from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.capacity import check_allocatable
from pkm_lightning.capacity.figures import amount
from pkm_lightning.errors import ConfigError


def run(*overrides: str) -> ResolvedRun:
    return resolved("model.dim=32", "trainer.accelerator=cpu", "run_dir=run", "model.vocab_size=2500", *overrides)


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        (["ffn.n_keys=46340"], "weights of tables, 274.9 GB"),
        (["ffn.n_keys=46340", "table.learning=dense"], "weights of tables, 274.9 GB"),
        (["ffn.value_dim=1000000000000"], "weights of tables"),
        (["ffn=moe", "ffn.n_experts=1000000000000"], "dense weights"),
        (["ffn.heads=10000000000000"], "dense weights"),
        (["data.global_batch_size=2000000000"], "one hidden state per token of a micro-batch"),
    ],
)
def test_what_no_machine_has_is_refused(overrides: list[str], largest: str) -> None:
    huge = run(*overrides)
    with pytest.raises(ConfigError, match=rf"needs at least .* GB of memory \(the most for {largest}"):
        check_allocatable(huge.plan, huge.config, limit=100e9)


def test_the_bound_is_what_is_held_by_all_ranks_of_a_host() -> None:
    alone, both = run(), run("strategy=ddp", "devices=2", "table.shard=none")
    memory = alone.plan.memory
    tokens = alone.plan.setting.tokens
    assert memory.dense_weights is not None
    assert memory.dense_gradients is not None
    assert tokens is not None
    held = memory.dense_weights + memory.dense_gradients + memory.table_part
    state = 16 + 4 * 32  # ids, labels and one hidden state of a token
    check_allocatable(alone.plan, alone.config, limit=held + tokens * state)
    check_allocatable(both.plan, both.config, limit=2 * held + tokens * state)
    for tried, limit in ((alone, held + tokens * state - 1), (both, 2 * held + tokens * state - 1)):
        with pytest.raises(ConfigError, match="this machine has"):
            check_allocatable(tried.plan, tried.config, limit=limit)


@pytest.mark.parametrize(
    ("size", "shown"), [(8e10, "80.0 GB"), (1.5e8, "0.1 GB"), (1e6, "1.0 MB"), (1e5, "0.1 MB"), (1e3, "1,000 bytes")]
)
def test_an_amount_is_shown_in_a_unit_in_which_it_is_not_zero(size: float, shown: str) -> None:
    assert amount(size) == shown
