"""The sample that a vocabulary is learned from: bounded, even, and a pure function of what it is drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from pkm_lightning.data import learning_sample
from pkm_lightning.data.learning_sample import GROUP_CHARACTERS, PIECE_CHARACTERS, sampled

DOCUMENTS = [f"document {i} has the number {i} é. " * (1 + i % 50) for i in range(3_000)]
TOTAL = sum(len(document.encode()) for document in DOCUMENTS)


def test_what_fits_is_read_as_it_is() -> None:
    long = "x" * (10 * PIECE_CHARACTERS)
    assert list(sampled([*DOCUMENTS, long], TOTAL + len(long))) == [*DOCUMENTS, long]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_sample_is_bounded_even_and_always_the_same(share: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    budget = int(TOTAL * share)
    chosen = list(sampled(iter(DOCUMENTS), budget))
    size = sum(len(text.encode()) for text in chosen)
    assert 0.9 * budget - 2 * GROUP_CHARACTERS < size <= budget
    numbers = np.asarray([int(text.split()[1]) for text in chosen])
    counts, _ = np.histogram(numbers, bins=4, range=(0, 3_000))
    assert counts.min() > 0.5 * counts.max()
    assert chosen == list(sampled(DOCUMENTS, budget))
    assert chosen != list(sampled(DOCUMENTS, budget, seed=1))
    assert f"learns from {size / 1e6:.1f} MB of {TOTAL / 1e6:.1f} MB of text" in caplog.text


@pytest.mark.parametrize("word", ["word ", "漢"])
def test_of_one_long_document_pieces_are_read(word: str) -> None:
    document = word * 2_000_000
    total = len(document.encode())
    pieces = list(sampled([document], total // 10))
    assert max(map(len, pieces)) <= PIECE_CHARACTERS
    assert 0.9 * total // 10 < sum(len(piece.encode()) for piece in pieces) <= total // 10


def test_pieces_are_the_whole_document() -> None:
    for text in ("", "a b", "word " * 5_000, "x" * 25_000, "x" * 12_000 + " " + "y" * 30_000):
        pieces = list(learning_sample._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= PIECE_CHARACTERS
