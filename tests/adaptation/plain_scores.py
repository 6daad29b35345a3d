"""The scores of rows and the choice by them, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def plain_scores(
    counts: Sequence[int], score: str, n_batches: int, batches: Sequence[int], reads: Sequence[int]
) -> dict[int, float]:
    """Returns the scores of the rows that were read."""
    total, expected_total = sum(counts), sum(r + 1 for r in reads)
    scores = {}
    for row, count in enumerate(counts):
        if count == 0:
            continue
        share = count / total
        if score == "tf":
            scores[row] = share
        elif score == "tfidf":
            scores[row] = share * math.log((n_batches + 1) / (batches[row] + 1))
        else:
            scores[row] = share * math.log(share / ((reads[row] + 1) / expected_total))
    return scores


def plain_choice(scores: dict[int, float], rows: int) -> list[int]:
    """Returns the rows of the highest scores, of equal ones the lower rows."""
    # Rounded, so that scores which are equal in exact arithmetic are.
    return sorted(scores, key=lambda row: (-round(scores[row], 13), row))[:rows]
