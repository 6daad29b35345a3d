"""Packed sequences hold whole statements, each once per epoch, and are a function of seed and epoch alone."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data.packing import PackedOrder, next_fit, pack

LENGTHS = np.random.default_rng(0).integers(5, 20, size=1000)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_next_fit_matches_the_naive_loop(lengths: list[int]) -> None:
    bounds, used = [0], 0
    for i, length in enumerate(lengths):
        if used + length > 9:
            bounds.append(i)
            used = 0
        used += length
    assert next_fit(np.asarray(lengths), 9).tolist() == [*bounds, len(lengths)]


def test_every_statement_once_per_epoch_and_no_sequence_too_long() -> None:
    order = PackedOrder(np.arange(1000), LENGTHS, capacity=64, seed=5)
    for epoch in (0, 7):
        sequences = order.keys(epoch)
        assert len(sequences) == order.size(epoch)
        assert sorted(np.concatenate(list(sequences)).tolist()) == list(range(1000))
        assert max(LENGTHS[sequence].sum() for sequence in sequences) <= 64


def test_packing_depends_on_seed_and_epoch_alone() -> None:
    one = PackedOrder(np.arange(1000), LENGTHS, capacity=64, seed=5)
    two = PackedOrder(np.arange(1000), LENGTHS, capacity=64, seed=5)
    one.keys(0), one.keys(3)
    assert all(np.array_equal(a, b) for a, b in zip(one.keys(2), two.keys(2), strict=True))
    other = PackedOrder(np.arange(1000), LENGTHS, capacity=64, seed=6)
    assert not np.array_equal(other.keys(2)[0], two.keys(2)[0])


def test_without_capacity_each_statement_is_a_sequence() -> None:
    sequences = pack(np.asarray([4, 2, 4]), LENGTHS, None)
    assert [sequence.tolist() for sequence in sequences[0:3]] == [[4], [2], [4]]


def test_packing_an_epoch_of_300_000_statements_is_fast() -> None:
    lengths = np.random.default_rng(0).integers(8, 20, size=300_000)
    order = PackedOrder(np.arange(300_000), lengths, capacity=64, seed=0)
    # CPU time: the clock on the wall would measure the machine's other processes as well.
    begin = time.process_time()
    order.keys(0)
    assert time.process_time() - begin < 0.5
