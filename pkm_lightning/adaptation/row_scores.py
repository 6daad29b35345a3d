"""The rows of a table that a step or a task reads unusually often: scores of the rows that it reads, and the highest.

With c(i) the reads of row i in the step, b(i) the number of the B background batches that read it, and r(i) its reads
in all of them:

| score | of row i |
|---|---|
| `tfidf` | p(i) log((B + 1) / (b(i) + 1)), where p(i) = c(i) / sum c |
| `kl` | p(i) log(p(i) / q(i)), where q(i) = (r(i) + 1) / sum (r + 1) |
| `tf` | p(i), which no background enters |
| `random` | uniform from 0 to 1, by a seed |

`tfidf` is the score of Sparse Memory Finetuning (Lin et al. 2025, arXiv 2510.15103, section 3). `kl` is the part of a
row in the divergence KL(p, q) of the step's reads from those of the background, by which "Improving Sparse Memory
Finetuning" (arXiv 2604.05248) ranks slots. The 1 added to each count is ours: a row that the background never reads
then has a finite score.

All in float64 from whole numbers, so that ranks that have summed these choose alike.

Letters: N rows, U rows that were read.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float64, Int
    from torch import Tensor

Score = Literal["tfidf", "kl", "tf", "random"]
SCORES: tuple[Score, ...] = ("tfidf", "kl", "tf", "random")
#: Scores that compare the reads with those of a background.
WITH_BACKGROUND: tuple[Score, ...] = ("tfidf", "kl")


class BackgroundReads(NamedTuple):
    """The reads of one table in the background."""

    #: Batches B.
    n_batches: int
    #: In how many of them each row was read, (N,) integers.
    batches_N: Tensor
    #: How often each row was read in all of them, (N,) integers.
    reads_N: Tensor


class Choice(NamedTuple):
    """Chosen rows and their scores, the highest first; rows of equal score by rising number."""

    rows_U: Tensor
    scores_U: Tensor


def choose_rows(
    counts_N: Int[Tensor, " N"],
    score: Score,
    rows: int | None,
    *,
    background: BackgroundReads | None = None,
    seed: int = 0,
) -> Choice:
    """Returns the `rows` rows of the highest score among those that were read; the host waits for their number.

    Args:
        counts_N: reads c(i) of each row, summed over ranks.
        score: by the table above.
        rows: number of rows, t; None: all that were read.
        background: for `tfidf` and `kl`.
        seed: for `random`; another one for every choice.

    Raises:
        ValueError: the score needs a background that is missing, or that has another number of rows.
    """
    if score in WITH_BACKGROUND:
        if background is None:
            raise ValueError(f"choose_rows: score={score} compares with a background; pass background=.")
        if len(background.batches_N) != len(counts_N):
            raise ValueError(
                f"choose_rows: the background counts {len(background.batches_N)} rows, the table has {len(counts_N)}."
            )
    read_U = counts_N.nonzero().squeeze(-1)
    scores_U = _scores(counts_N, read_U, score, background, seed)
    # The sort is stable and the rows rise, so that equal scores are ranked by row.
    scores_U, order_U = scores_U.sort(descending=True, stable=True)
    return Choice(read_U[order_U][:rows], scores_U[:rows])


def _scores(
    counts_N: Tensor, read_U: Tensor, score: Score, background: BackgroundReads | None, seed: int
) -> Float64[Tensor, " U"]:
    """Returns the scores of the rows `read_U`."""
    if score == "random":
        # Drawn on the CPU for all rows: every device and every rank gets the same numbers.
        generator = torch.Generator().manual_seed(seed)
        draws_N = torch.rand(len(counts_N), dtype=torch.float64, generator=generator, device="cpu")
        return draws_N.to(counts_N.device)[read_U]
    share_U = counts_N[read_U].double() / counts_N.sum().double()
    if score == "tf":
        return share_U
    assert background is not None
    n_batches, batches_N, reads_N = background
    if score == "tfidf":
        return share_U * ((n_batches + 1) / (batches_N[read_U].double() + 1)).log()
    expected_U = (reads_N[read_U].double() + 1) / (reads_N.sum().double() + len(reads_N))
    return share_U * (share_U / expected_U).log()


def draw_seed(seed: int, step: int, table: str) -> int:
    """Returns the seed of the random choice of one step for one set of tables."""
    digest = hashlib.sha256(f"{seed}/{step}/{table}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
