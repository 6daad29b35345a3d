"""Every figure of slot usage against its formula in plain Python, on any counts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from pkm_lightning.usage.slot_metrics import dead_slots, effective_slots, spread

COUNTS = st.lists(st.integers(0, 3) | st.integers(0, 10**6), min_size=1, max_size=20)


def naive(counts: list[int]) -> dict[str, float]:
    total, n = sum(counts), len(counts)
    if not total:
        return dict.fromkeys(("kl_count", "gini", "top50", "top90", "top99"), math.nan) | {"used_percent": 0.0}
    z = sorted(count / total for count in counts)
    sums = [sum(z[: i + 1]) for i in range(n)]
    figures = {
        "used_percent": 100 * sum(count > 0 for count in counts) / n,
        "kl_count": math.log(n) + sum(share * math.log(share) for share in z if share),
        "gini": 1 - 2 * sum(sums) / n,
    }
    for percent in (50, 90, 99):
        falling = sorted(counts, reverse=True)
        figures[f"top{percent}"] = next(m for m in range(1, n + 1) if 100 * sum(falling[:m]) >= percent * total)
    return figures


def assert_figures(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, nan_ok=True, abs=1e-9), name


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_figures_are_their_formulas(counts: list[int]) -> None:
    halves = [3 * count for count in counts]
    found = spread(torch.tensor(counts), torch.tensor(halves, dtype=torch.float64))
    expected = naive(counts)
    assert_figures(found, {**expected, "kl_weight": expected["kl_count"]})


def test_weights_have_a_divergence_of_their_own() -> None:
    found = spread(torch.tensor([1, 1, 1, 1]), torch.tensor([4.0, 0, 0, 0]))
    assert (found["kl_count"], found["kl_weight"]) == (pytest.approx(0, abs=1e-12), pytest.approx(math.log(4)))


@pytest.mark.parametrize(("counts", "gini", "top99"), [([5], -1.0, 1), ([0, 0, 0, 9], 0.5, 1), ([2] * 4, -0.25, 4)])
def test_the_ends_of_the_scales(counts: list[int], gini: float, top99: int) -> None:
    found = spread(torch.tensor(counts), torch.tensor(counts))
    assert (found["gini"], found["top99"]) == (pytest.approx(gini), top99)
    assert found["kl_count"] == pytest.approx(math.log(len(counts)) if counts.count(0) else 0, abs=1e-12)


def test_marginals_are_those_of_the_sub_keys() -> None:
    ids = torch.randint(9, (40,)).tolist() + [4] * 10
    found = spread(torch.tensor([ids.count(slot) for slot in range(9)]), torch.ones(9), 3)
    for name, part in (("kl_rows", lambda slot: slot // 3), ("kl_columns", lambda slot: slot % 3)):
        reads = Counter(part(slot) for slot in ids)
        assert found[name] == pytest.approx(naive([reads[key] for key in range(3)])["kl_count"])


def test_dead_is_unread_for_that_many_steps() -> None:
    assert dead_slots(torch.tensor([0, 7, 8, 10]), step=10, dead_after=3).tolist() == [True, True, False, False]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_effective_slots_are_the_exponential_of_an_entropy(data: st.DataObject) -> None:
    tokens, heads, k = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)))
    number = st.floats(-3, 3, allow_subnormal=False) | st.sampled_from([0.0, math.nan])
    values = data.draw(st.lists(number, min_size=tokens * heads * k, max_size=tokens * heads * k))
    weights_THK = torch.tensor(values, dtype=torch.float64).view(tokens, heads, k)
    valid = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    total, reads = 0.0, 0
    for t in range(tokens):
        for read in weights_THK[t].abs().tolist():
            if valid[t] and math.isfinite(sum(read)) and sum(read) > 0:
                shares = [amount / sum(read) for amount in read if amount / sum(read) > 0]
                total, reads = total + math.exp(-sum(z * math.log(z) for z in shares)), reads + 1
    assert_close(effective_slots(weights_THK, torch.tensor(valid)), torch.tensor([total, reads], dtype=torch.float64))
