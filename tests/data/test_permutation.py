"""The shuffle without memory: a permutation for every n, even, of seed and epoch alone, and free for any n."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data.order import ShuffledOrder, Timeline
from pkm_lightning.data.permutation import Permutation

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 97, 101, 255, 256, 257, 1000, 1023, 1024, 1025, 65_537]


@pytest.mark.parametrize("n", SIZES)
def test_every_number_comes_once(n: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**40, 7)):
        assert np.array_equal(np.sort(Permutation(n, seed, epoch).at(np.arange(n))), np.arange(n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**31), data=st.data())
def test_places_may_be_asked_for_in_any_way(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    whole = Permutation(n, seed, epoch)[:]
    assert sorted(whole) == list(range(n))
    begin = data.draw(st.integers(0, n - 1))
    again = Permutation(n, seed, epoch)
    assert again[begin : begin + 10] == whole[begin : begin + 10]
    assert again[begin] == whole[begin] == again[begin - n]


def test_all_orders_of_a_short_list_are_as_likely() -> None:
    orders = Counter(tuple(Permutation(5, seed=3, epoch=epoch)[:]) for epoch in range(2400))
    # 120 cells of 20: chi-square has mean 119 and standard deviation 15.4.
    chi_square = sum((count - 20) ** 2 / 20 for count in orders.values()) + 20 * (120 - len(orders))
    assert chi_square < 119 + 4 * 15.4


@pytest.mark.parametrize("n", [100, 1000, 4096, 10_007])
def test_neighbours_are_as_far_apart_as_chance_has_it(n: int) -> None:
    numbers = Permutation(n, seed=0, epoch=0).at(np.arange(n))
    # Two random numbers below n differ by n / 3 on average, with a standard deviation of n / sqrt(18).
    assert abs(np.abs(np.diff(numbers)).mean() / n - 1 / 3) < 4 / np.sqrt(18 * n)
    # Place and number are not correlated; nor are the orders of two epochs, or of two seeds.
    for other in (np.arange(n), Permutation(n, 0, 1).at(np.arange(n)), Permutation(n, 1, 0).at(np.arange(n))):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 4 / np.sqrt(n)


def test_numbers_of_one_seed_never_change() -> None:
    # Resuming a run with a later version needs them.
    assert Permutation(10, seed=1, epoch=2)[:] == [8, 5, 3, 7, 4, 9, 1, 2, 6, 0]
    assert Permutation(10**12, seed=1, epoch=2)[5:7] == [132074242642, 461124629442]


def test_a_trillion_sequences_cost_nothing() -> None:
    tracemalloc.start()
    begin = time.process_time()
    order = ShuffledOrder(10**12, seed=0)
    keys = Timeline(order).keys(10**12 - 3, 6)
    assert len(set(keys)) == 6
    assert max(keys) < 10**12
    assert time.process_time() - begin < 0.05
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
