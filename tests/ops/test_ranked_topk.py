"""Every backend of ranked_topk against plain Python: ties, NaN, infinities, signed zeros, odd sizes, dtypes.

Letters: R rows, L scores per row; K indices kept.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_backends import BACKENDS, device_of
from torch import Tensor, library

from pkm_lightning.ops import ranked_topk

# Rows, scores, kept: one score, k = L, k = 1, sizes at and beside multiples of 64 and 16, bounds from blocks or scores.
SIZES = [(3, 1, 1), (5, 7, 7), (2, 64, 1), (9, 65, 13), (4, 128, 64), (3, 1000, 32), (2, 1024, 5), (2, 300, 40)]
# Sizes and numbers of levels (None: all scores differ). The interpreter of the GPU kernel is slow: two programs of one
# block, and one program of two blocks, with ties.
CASES = [
    *itertools.product(["cpu", "eager", "reference"], SIZES, [None, 3]),
    # Of 64 rows, some have their only tie across the k-th place, between a score that is kept and one that is not.
    *itertools.product(["cpu", "eager"], [(64, 20, 2)], [50]),
    ("triton", (5, 7, 7), None),
    ("triton", (1, 250, 7), 3),
]


def by_definition(scores: list[float], k: int) -> list[int]:
    """Sorts NaN first, then descending; Python's sort is stable and takes -0.0 as equal to 0.0."""
    return sorted(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), -scores[i]))[:k]


def assert_ranked(scores_RL: Tensor, k: int, backend: str) -> None:
    indices_RK = ranked_topk(scores_RL.to(device_of(backend)), k, backend=backend)
    assert indices_RK.dtype is torch.int64
    assert indices_RK.tolist() == [by_definition(row, k) for row in scores_RL.tolist()]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_rows_equal_the_definition(data: st.DataObject) -> None:
    level = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -2.0])
    scores = data.draw(st.lists(level, min_size=1, max_size=40))
    k = data.draw(st.integers(1, len(scores)))
    for backend in ("cpu", "eager", "reference"):
        assert_ranked(torch.tensor([scores]), k, backend)


@pytest.mark.parametrize(("backend", "sizes", "levels"), CASES)
def test_random_rows_equal_the_definition(backend: str, sizes: tuple[int, int, int], levels: int | None) -> None:
    rows, n_scores, k = sizes
    scores_RL = torch.randn(rows, n_scores) if levels is None else torch.randint(levels, (rows, n_scores)).float()
    assert_ranked(scores_RL, k, backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *itertools.product(["cpu", "eager"], [torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        *itertools.product(["triton"], [torch.float32, torch.bfloat16, torch.float16]),
        ("reference", torch.float32),
    ],
)
def test_every_dtype_with_every_kind_of_value(backend: str, dtype: torch.dtype) -> None:
    scores_RL = (torch.randn(4, 75) * 2).round().to(dtype)
    scores_RL[:, ::9], scores_RL[:, 4::9], scores_RL[:, 5::9] = torch.nan, torch.inf, -torch.inf
    scores_RL[1:3, 7::9] = -torch.tensor(torch.nan, dtype=dtype)
    scores_RL[2] = -torch.inf
    scores_RL[3, 1::2] = -0.0
    # Of the GPU kernel's dtypes only float32 is ranked beyond the NaNs; the others differ in the widening alone.
    assert_ranked(scores_RL, 8 if backend == "triton" and dtype is not torch.float32 else 30, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_no_rows(backend: str) -> None:
    strided_XL = torch.randn(9, 2, 2).to(device_of(backend)).movedim(0, -1)
    expected_XK = ranked_topk(strided_XL.contiguous(), 4, backend="reference")
    assert torch.equal(ranked_topk(strided_XL, 4, backend=backend), expected_XK)
    assert ranked_topk(strided_XL[:0], 4, backend=backend).shape == (0, 2, 4)
    if backend != "triton":
        assert torch.equal(ranked_topk(strided_XL[0, 0], 4, backend=backend), expected_XK[0, 0])


def test_rows_in_which_almost_all_scores_tie() -> None:
    """Makes more scores tie at the k-th place than are ranked, so that the kernel bisects down to exactly k."""
    scores_RL = torch.zeros(2, 900)
    scores_RL[0, 700], scores_RL[1, :860] = 1.0, 2.0
    assert_ranked(scores_RL, 8, "cpu")
    assert_ranked(scores_RL, 300, "cpu")


def test_the_number_of_threads_changes_nothing() -> None:
    scores_RL = torch.randn(11, 300)
    expected_RK = ranked_topk(scores_RL, 9, backend="cpu")
    torch.set_num_threads(2)
    try:
        assert torch.equal(ranked_topk(scores_RL, 9, backend="cpu"), expected_RK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_operator_is_registered_completely_and_traced_without_a_break() -> None:
    scores_RL = torch.randn(3, 20, requires_grad=True)
    library.opcheck(torch.ops.pkm_lightning.ranked_topk.default, (scores_RL.detach(), 4, "cpu"))
    traced = torch.compile(ranked_topk, backend="eager", fullgraph=True)
    assert torch.equal(traced(scores_RL, 4), ranked_topk(scores_RL, 4, backend="reference"))


def test_large_k_is_left_to_torch() -> None:
    scores_RL = torch.randn(2, 700)
    assert torch.equal(ranked_topk(scores_RL, 600), ranked_topk(scores_RL, 600, backend="cpu"))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ranked_topk: k=5 is out of range; allowed: 1 to 4 \(scores per row\)\."):
        ranked_topk(torch.zeros(2, 4), 5)
    with pytest.raises(ValueError, match=r"ranked_topk: backend='knn' is not available; allowed: auto, cpu, triton"):
        ranked_topk(torch.zeros(2, 4), 2, backend="knn")
    with pytest.raises(ValueError, match=r"ranked_topk: backend='triton' takes k up to 128, got 200; use backend=eag"):
        ranked_topk(torch.zeros(2, 400), 200, backend="triton")
    with pytest.raises(ValueError, match=r"takes float32, bfloat16, float16, got float64; use backend=eager"):
        ranked_topk(torch.zeros(2, 4).double(), 2, backend="triton")
