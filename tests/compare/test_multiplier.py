"""The compute multiplier on ladders whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tolerances import EXACT_FLOAT

from pkm_lightning.compare.bootstrap import Resampled
from pkm_lightning.compare.multiplier import Bound, multiplier, multipliers

LADDER = [(1.0, 0.2), (2.0, 0.4), (4.0, 0.8)]


@pytest.mark.parametrize(
    ("quality", "compute", "expected"),
    [
        (0.2, 1.0, 1.0),
        (0.4, 1.0, 2.0),
        (0.8, 1.0, 4.0),
        (0.6, 1.0, math.sqrt(8)),
        (0.3, 1.0, math.sqrt(2)),
        (0.6, 2.0, math.sqrt(2)),
        (0.4, 4.0, 0.5),
    ],
)
def test_the_multiplier_is_exact_on_a_constructed_ladder(quality: float, compute: float, expected: float) -> None:
    for order in (LADDER, LADDER[::-1]):
        found = multiplier(order, quality, compute)
        assert (found.value, found.sign) == (pytest.approx(expected, rel=EXACT_FLOAT), "")


def test_beyond_the_ladder_it_is_a_bound() -> None:
    assert str(multiplier(LADDER, 0.9, 0.8)) == ">= 5.00x"
    assert str(multiplier(LADDER, 0.1, 0.5)) == "<= 2.00x"


@pytest.mark.parametrize(("quality", "expected"), [(0.5, 2**0.8), (0.6, 2.0), (0.75, math.sqrt(32))])
def test_a_rung_that_is_worse_than_a_smaller_one_counts_as_level(quality: float, expected: float) -> None:
    found = multiplier([(1.0, 0.1), (2.0, 0.6), (4.0, 0.4), (8.0, 0.9)], quality, 1.0)
    assert found == Bound(pytest.approx(expected, rel=EXACT_FLOAT))  # type: ignore[arg-type]


def test_a_quality_that_a_smaller_rung_reaches_is_not_beyond_the_ladder() -> None:
    ladder = [(1.0, 0.2), (2.0, 0.8), (4.0, 0.6)]
    assert multiplier(ladder, 0.75, 1.0).value < 2
    assert str(multiplier(ladder, 0.81, 1.0)) == ">= 4.00x"


def test_a_level_ladder_gives_only_a_bound() -> None:
    assert str(multiplier([(1.0, 0.0), (2.0, 0.0), (4.0, 0.0)], 0.0, 1.0)) == "<= 1.00x"


def test_lower_may_be_better() -> None:
    losses = Resampled(
        mean={"small": 0.8, "large": 0.2, "own": 0.5},
        resamples={"small": np.full(9, 0.8), "large": np.full(9, 0.2), "own": np.full(9, 0.5)},
        is_paired=True,
        over="seeds",
    )
    found = multipliers(losses, ["small", "large"], {"small": 1.0, "large": 4.0, "own": 1.0}, higher_is_better=False)
    assert set(found) == {"own"}
    assert found["own"].value.value == pytest.approx(2.0, rel=EXACT_FLOAT)
    assert str(found["own"].low) == str(found["own"].high) == "2.00x"


def test_the_interval_over_resamples_has_bounds_at_its_ends() -> None:
    qualities = np.linspace(0.1, 0.9, 201)
    means = Resampled(
        mean={"small": 0.2, "large": 0.8, "own": 0.5},
        resamples={"small": np.full(201, 0.2), "large": np.full(201, 0.8), "own": qualities},
        is_paired=True,
        over="seeds",
    )
    found = multipliers(means, ["small", "large"], {"small": 1.0, "large": 4.0, "own": 1.0}, higher_is_better=True)
    assert (found["own"].low.sign, found["own"].high.sign) == ("<=", ">=")
    assert str(found["own"].value) == "2.00x"


def test_a_bound_sorts_after_the_same_value_without_a_sign() -> None:
    means = Resampled(
        mean={"small": 0.2, "large": 0.8, "own": 0.8},
        resamples={"small": np.full(4, 0.2), "large": np.full(4, 0.8), "own": np.array([0.9, 0.8, 0.9, 0.8])},
        is_paired=True,
        over="seeds",
    )
    found = multipliers(means, ["small", "large"], {"small": 1.0, "large": 4.0, "own": 1.0}, higher_is_better=True)
    assert (str(found["own"].low), str(found["own"].high)) == ("4.00x", ">= 4.00x")


def test_a_variant_without_known_compute_has_no_multiplier() -> None:
    means = Resampled(
        mean={"a": 0.1, "b": 0.2, "c": 0.3}, resamples={k: np.zeros(3) for k in "abc"}, is_paired=True, over="seeds"
    )
    assert multipliers(means, ["a", "b"], {"a": 1.0, "b": 2.0}, higher_is_better=True) == {}
