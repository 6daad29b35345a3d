"""Figures of the dense parameters against sums by hand, for sizes that the plans of small models never reach.

Letters: those of `pkm_lightning.capacity`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pkm_lightning.capacity.dense import _fsdp, _zero

BILLION = 10**9


def sizes(**changes: Any) -> Any:
    """Returns M = 100, of which a block has 30 and what is outside blocks 20; four ranks hold a quarter each."""
    usual = {"all": 100, "trained": 100, "rest": 20, "block": 30, "large": 80, "share": 25, "trained_share": 25}
    return SimpleNamespace(**{**usual, "rest_share": 5, **changes})


def setting(accumulate: int = 1) -> Any:
    return SimpleNamespace(world=4, item=2, accumulate=accumulate)


@pytest.mark.parametrize(("rest", "gathered"), [(20, 20 + 60 + 30), (50, 50 + 60 + 50)])
def test_fsdp_gathers_two_blocks_and_the_larger_of_a_block_and_the_rest(rest: int, gathered: int) -> None:
    assert _fsdp(sizes(rest=rest), setting()).gathered == 2 * gathered


@pytest.mark.parametrize(
    ("stage", "accumulate", "sent", "corrected"),
    [(1, 1, 300, 0), (2, 1, 300, 0), (1, 3, 300, 800), (2, 3, 700, 800), (3, 1, 200, 0), (3, 3, 560, 0)],
)
def test_zero_receives_gradients_weights_and_corrections(
    stage: int, accumulate: int, sent: int, corrected: int
) -> None:
    assert _zero(sizes(), setting(accumulate), stage=stage).received == (2 * sent + corrected) * 3 // 4


def test_zero_3_gathers_again_what_it_has_released() -> None:
    large = sizes(all=BILLION, trained=BILLION, large=BILLION)
    # Gathered once, half of it again, and the gradients.
    assert _zero(large, setting(), stage=3).received == 2 * (BILLION + BILLION // 2 + BILLION) * 3 // 4
