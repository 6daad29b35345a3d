"""Both backends of count_reads against a loop over the reads in Python, exactly and in any order.

Letters: M = N + 1 counters, C reads per token.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_host import NoHost
from torch import Tensor

from pkm_lightning.ops.count_reads import WEIGHT_LIMIT, count_reads

BACKENDS = ["cpu", "reference"]


def recount(n_slots: int, ids: Tensor, weights: Tensor, valid: Tensor | None) -> tuple[list[int], list[int]]:
    counts, units = [0] * n_slots, [0] * n_slots
    for t, (slots, amounts) in enumerate(zip(ids.tolist(), weights.double().tolist(), strict=True)):
        for slot, amount in zip(slots, amounts, strict=True):
            if 0 <= slot < n_slots and (valid is None or valid[t]):
                counts[slot] += 1
                amount = 0.0 if math.isnan(amount) else min(abs(amount), WEIGHT_LIMIT)
                units[slot] += math.floor(amount * 2**24 + 0.5)
    return counts, units


def counters(n_slots: int, value: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    kinds = (torch.int64, torch.int64, torch.int32)
    counts_M, units_M, last_M = (torch.full((n_slots + 1,), value, dtype=kind) for kind in kinds)
    return counts_M, units_M, last_M


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_equals_a_loop_over_the_reads(data: st.DataObject) -> None:
    n_slots, tokens, reads = data.draw(st.tuples(st.integers(1, 9), st.integers(0, 7), st.integers(1, 5)))
    row = st.lists(st.integers(-2, n_slots + 1), min_size=reads, max_size=reads)
    ids = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    ids_TC = torch.tensor(ids, dtype=dtype).view(tokens, reads)
    kind = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    numbers = st.floats(-4, 4) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30, 2.0**-26])
    weights = data.draw(st.lists(numbers, min_size=tokens * reads, max_size=tokens * reads))
    weights_TC = torch.tensor(weights, dtype=torch.float64).to(kind).view(tokens, reads)
    flags = data.draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    valid_T = None if flags is None else torch.tensor(flags, dtype=torch.bool)
    expected = recount(n_slots, ids_TC, weights_TC, valid_T)
    for backend in BACKENDS:
        counts_M, units_M, last_M = counters(n_slots)
        count_reads(counts_M, units_M, last_M, ids_TC, weights_TC, valid_T, 7, backend=backend)
        assert (counts_M[:-1].tolist(), units_M[:-1].tolist()) == expected
        assert last_M[:-1].tolist() == [7 * (count > 0) for count in expected[0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_to_the_counters_and_writes_nowhere_else(backend: str) -> None:
    memory = [torch.full((9,), -(10**6), dtype=kind) for kind in (torch.int64, torch.int64, torch.int32)]
    counts_M, units_M, last_M = (
        whole[2:7] for whole in memory
    )  # 4 slots and the last counter; values around them must not change
    ids_TC = torch.tensor([[0, 3], [3, 3], [-1, 99]])
    count_reads(counts_M, units_M, last_M, ids_TC, torch.full((3, 2), -0.5), None, 3, backend=backend)
    assert (counts_M[:4] + 10**6).tolist() == [1, 0, 0, 3]
    assert (units_M[:4] + 10**6).tolist() == [2**23, 0, 0, 3 * 2**23]
    assert last_M[:4].tolist() == [3, -(10**6), -(10**6), 3]
    for whole in memory:
        assert set(whole[[0, 1, 7, 8]].tolist()) == {-(10**6)}


def test_takes_views_and_transposed_reads() -> None:
    ids_TC, weights_TC = torch.randint(50, (6, 31)).int().T, torch.rand(6, 31).T
    results = []
    for backend in BACKENDS:
        results.append(counters(50))
        count_reads(*results[-1], ids_TC, weights_TC, torch.arange(31) % 3 > 0, 1, backend=backend)
    assert all(torch.equal(one[:-1], other[:-1]) for one, other in zip(*results, strict=True))


def test_the_reference_never_waits_for_a_device() -> None:
    counters_3M = counters(5)
    with NoHost():
        count_reads(
            *counters_3M, torch.tensor([[1, 7]]), torch.ones(1, 2), torch.tensor([True]), 1, backend="reference"
        )
    meta = [counter.to("meta") for counter in counters_3M]
    read = torch.empty(3, 2, dtype=torch.int32, device="meta"), torch.empty(3, 2, device="meta")
    count_reads(*meta, *read, None, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_TC": torch.zeros(2, 3)}, "ids are torch.float32"),
        ({"ids_TC": torch.zeros(2, 2, dtype=torch.int64)}, r"weights of shape \(2, 3\)"),
        ({"ids_TC": torch.zeros(2, dtype=torch.int64), "weights_TC": torch.zeros(2)}, r"both of one shape \(T, C\)"),
        ({"valid_T": torch.ones(3, dtype=torch.bool)}, r"valid is torch.bool of shape \(3,\); .* of shape \(2,\)"),
        ({"valid_T": torch.ones(1, dtype=torch.bool)}, r"valid is torch.bool of shape \(1,\)"),
        ({"valid_T": torch.ones(2)}, "valid is torch.float32"),
        ({"counts_M": torch.zeros(5, dtype=torch.int32)}, "counters must be contiguous"),
        ({"backend": "triton"}, "backend='triton' is not available; allowed: auto, cpu, reference"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    names = ("counts_M", "weights_M", "last_M")
    arguments = dict(zip(names, counters(4), strict=True)) | {
        "ids_TC": torch.zeros(2, 3, dtype=torch.int32), "weights_TC": torch.zeros(2, 3), "valid_T": None, "step": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        count_reads(**{**arguments, **change})  # type: ignore[arg-type]
