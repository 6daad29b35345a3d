"""One optimizer step sees the same sequences for any number of ranks and micro-batches and after any resume."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data.order import (
    Order,
    ShareBatchSampler,
    ShuffledOrder,
    StepBatchSampler,
    Timeline,
    micro_batch_size,
)
from pkm_lightning.data.packing import PackedOrder
from pkm_lightning.errors import ConfigError

GLOBAL = 8
ORDERS: dict[str, Callable[[], Order]] = {
    "shuffled": lambda: ShuffledOrder(13, seed=1),
    "packed": lambda: PackedOrder(np.arange(40), np.arange(40) % 7 + 1, capacity=10, seed=1),
}


def global_steps(order: str, *, ranks: int, accumulate: int, start: int, steps: int) -> list[list[tuple[int, ...]]]:
    micro = micro_batch_size(GLOBAL, ranks, accumulate)
    samplers = [
        iter(StepBatchSampler(ORDERS[order](), lambda: start, rank=r, world_size=ranks, micro_batch=micro))
        for r in range(ranks)
    ]
    result = []
    for _ in range(steps):
        micro_batches = [next(sampler) for _ in range(accumulate) for sampler in samplers]
        result.append([tuple(np.atleast_1d(key).tolist()) for micro_batch in micro_batches for key in micro_batch])
    return result


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_ranks_and_accumulation_see_the_same_global_batches(order: str, ranks: int, accumulate: int) -> None:
    alone = global_steps(order, ranks=1, accumulate=1, start=0, steps=12)
    assert global_steps(order, ranks=ranks, accumulate=accumulate, start=0, steps=12) == alone


@pytest.mark.parametrize("order", ORDERS)
def test_starting_at_a_position_continues_the_sequence(order: str) -> None:
    whole = global_steps(order, ranks=1, accumulate=1, start=0, steps=12)
    for step in range(12):
        assert global_steps(order, ranks=2, accumulate=2, start=step * GLOBAL, steps=12 - step) == whole[step:]


@given(position=st.integers(0, 200), count=st.integers(1, 60))
def test_keys_depend_on_the_position_alone(position: int, count: int) -> None:
    whole = Timeline(ShuffledOrder(13, seed=1)).keys(0, 260)
    assert Timeline(ShuffledOrder(13, seed=1)).keys(position, count) == whole[position : position + count]


def test_every_epoch_is_a_different_permutation() -> None:
    keys = Timeline(ShuffledOrder(50, seed=1)).keys(0, 100)
    assert sorted(keys[:50]) == sorted(keys[50:]) == list(range(50))
    assert keys[:50] != keys[50:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 17])
def test_shares_cover_every_key_once_with_equal_numbers_of_batches(ranks: int, n: int) -> None:
    shares = [list(ShareBatchSampler(range(n), rank=r, world_size=ranks, batch_size=2)) for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(key for share in shares for batch in share for key in batch) == list(range(n))


def test_the_position_is_read_when_the_iteration_begins() -> None:
    position = 0
    sampler = StepBatchSampler(ShuffledOrder(100, seed=0), lambda: position, rank=0, world_size=1, micro_batch=4)
    first = iter(sampler)
    position = 8
    later = iter(sampler)
    assert list(islice(first, 3))[2] == next(later)


def test_indivisible_global_batch_names_the_keys_and_the_nearest_size() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=10 .*trainer\.devices.*accumulate_grad_batches=2.*=8\."):
        micro_batch_size(10, 2, 2)
