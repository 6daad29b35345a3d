"""Numbers as a report writes them."""

from __future__ import annotations

import math

import pytest

from pkm_lightning.compare.amounts import compact, plain, seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (9999, "9,999"), (12_800, "12.8 k"), (345_600, "346 k"), (999_499, "999 k"), (999_999, "1.00 M"),
        (2_767_904, "2.77 M"), (-55_296_000, "-55.3 M"), (1.5e13, "15.0 T"), (1e23, "100000 E"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_large_numbers_have_three_digits(value: float, text: str) -> None:
    assert compact(value) == text


def test_seconds_and_ticks_have_no_exponent() -> None:
    assert [seconds(value) for value in (0.34, 9.96, 12.4, 1234.5, math.nan)] == ["0.3", "10.0", "12", "1,234", "-"]
    assert [plain(value) for value in (1e-7, 0.25, 1500.0, 2e6, -1e-17)] == [
        "0.0000001",
        "0.25",
        "1,500",
        "2,000,000",
        "0",
    ]
