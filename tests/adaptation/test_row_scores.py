"""Scores of rows against their formulas in plain Python, and which of equal rows are chosen.

Letters: N rows.
"""

from __future__ import annotations

import pytest
import torch
from adaptation.plain_scores import plain_choice, plain_scores
from tolerances import assert_close

from pkm_lightning.adaptation.row_scores import BackgroundReads, Score, choose_rows, draw_seed

N = 40


def drawn(seed: int) -> tuple[torch.Tensor, BackgroundReads]:
    """Few different counts, so that many scores are equal, and rows that nobody has read."""
    generator = torch.Generator().manual_seed(seed)
    counts_N = torch.randint(4, (N,), generator=generator)
    batches_N = torch.randint(9, (N,), generator=generator, dtype=torch.int32)
    return counts_N, BackgroundReads(8, batches_N, batches_N.long() * 5)


@pytest.mark.parametrize("rows", [1, 7, 25, 1000])
@pytest.mark.parametrize("score", ["tfidf", "kl", "tf"])
def test_the_choice_is_that_of_the_formula(score: Score, rows: int) -> None:
    for seed in range(5):
        counts_N, background = drawn(seed)
        choice = choose_rows(counts_N, score, rows, background=background)
        expected = plain_scores(counts_N.tolist(), score, 8, background.batches_N.tolist(), background.reads_N.tolist())
        assert choice.rows_U.tolist() == plain_choice(expected, rows)
        assert_close(
            choice.scores_U, torch.tensor([expected[row] for row in choice.rows_U.tolist()], dtype=torch.float64)
        )


def test_without_a_number_all_rows_that_were_read_are_chosen() -> None:
    counts_N, _ = drawn(0)
    assert sorted(choose_rows(counts_N, "tf", None).rows_U.tolist()) == counts_N.nonzero().flatten().tolist()
    assert len(choose_rows(torch.zeros(N, dtype=torch.int64), "tf", 5).rows_U) == 0


def test_a_random_choice_is_of_rows_that_were_read_and_follows_its_seed() -> None:
    counts_N, _ = drawn(0)
    first, again, other = (
        choose_rows(counts_N, "random", 6, seed=draw_seed(1, step, "table0")).rows_U.tolist() for step in (1, 1, 2)
    )
    assert first == again != other
    assert all(counts_N[first])
    assert draw_seed(1, 1, "table0") != draw_seed(1, 1, "table1")
    picked = torch.zeros(N)
    for step in range(400):
        picked[choose_rows(counts_N, "random", 6, seed=draw_seed(1, step, "table0")).rows_U] += 1
    read = counts_N > 0
    # Each row is chosen 400 * 6 / (rows that were read) times on average; five standard deviations.
    mean = 400 * 6 / int(read.sum())
    assert ((picked[read] - mean).abs() < 5 * mean**0.5).all()


def test_a_score_that_needs_a_background_is_refused_without_one_of_these_rows() -> None:
    counts_N, background = drawn(0)
    with pytest.raises(ValueError, match="score=kl compares with a background"):
        choose_rows(counts_N, "kl", 5)
    with pytest.raises(ValueError, match="counts 40 rows, the table has 41"):
        choose_rows(torch.ones(N + 1, dtype=torch.int64), "tfidf", 5, background=background)
