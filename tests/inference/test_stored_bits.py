"""Bits stored by models whose probabilities are chosen, against the formula of the paper in plain Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tolerances import EXACT_FLOAT

from pkm_lightning.data.base import NO_TARGET, FactSpace
from pkm_lightning.inference.stored_bits import FactLosses, fact_nats

SPACE = FactSpace(people=50, names=8**3, attributes=2, values=8**2)
#: Tokens of a document: three of a name, and per attribute a phrase and two of a value.
IS_TARGET = [True] * 3 + [False, True, True] * 2


def figures(probabilities: list[list[float]], *, per_row: int = 1) -> dict[str, float]:
    """Scores people, each with the probabilities of the 7 words of name and values, `per_row` of them in a sequence."""
    losses = FactLosses.none(SPACE, torch.device("cpu"))
    rows = [probabilities[i : i + per_row] for i in range(0, len(probabilities), per_row)]
    for row in rows:
        width = per_row * 9 + 2
        labels, docs = torch.full((1, width), NO_TARGET), torch.full((1, width), -1)
        for number in range(len(row)):
            # No gap between documents: the last value of one ends where the name of the next begins.
            labels[0, 9 * number : 9 * (number + 1)] = torch.tensor([7 if t else NO_TARGET for t in IS_TARGET])
            docs[0, 9 * number : 9 * (number + 1)] = number
        nll_M = -torch.tensor([p for person in row for p in person], dtype=torch.float64).log()
        losses.add(*fact_nats(nll_M, labels, docs if per_row > 1 else None))
    return losses.figures()


def test_the_formula_of_the_paper() -> None:
    """R(F) P = N log2(N0 / e^p1) + N log2(S0 / e^p2), with losses summed over tokens and averaged over people."""
    rng = random.Random(3)
    people = [[rng.uniform(0.01, 1) for _ in range(7)] for _ in range(5)]
    p1 = -sum(math.log(p) for person in people for p in person[:3]) / 5
    p2 = -sum(math.log(p) for person in people for p in person[3:]) / 5
    stored = 50 * math.log2(512 / math.exp(p1)) + 50 * math.log2(64**2 / math.exp(p2))
    clipped = 0.0
    for person in people:
        for prior, words in ((9, person[:3]), (6, person[3:5]), (6, person[5:])):
            clipped += max(0.0, prior + math.log2(math.prod(words))) / 5
    for per_row in (1, 2):  # the same, however documents lie in sequences
        scored = figures(people, per_row=per_row)
        assert scored["stored_bits"] == pytest.approx(stored, rel=EXACT_FLOAT)
        assert scored["bits_person"] == pytest.approx(stored / 50, rel=EXACT_FLOAT)
        assert scored["bits_person"] == pytest.approx(scored["bits_name"] + 2 * scored["bits_value"], rel=EXACT_FLOAT)
        assert scored["bits_person_clipped"] == pytest.approx(clipped, rel=EXACT_FLOAT)
        assert scored["bits_person_clipped"] > scored["bits_person"]


def test_a_uniform_model_stores_nothing_and_one_that_knows_everything_all() -> None:
    uniform = figures([[1 / 8] * 7] * 4)
    assert uniform["stored_bits"] == pytest.approx(0, abs=1e-9)
    # It names each of the 50 people with probability 1 / 50, and their values with certainty.
    perfect = figures([[1 / 50, 1, 1, 1, 1, 1, 1]] * 4)
    assert perfect["stored_bits"] == pytest.approx(SPACE.bits, rel=EXACT_FLOAT)
    assert perfect["stored_share"] == pytest.approx(1, rel=EXACT_FLOAT)
    # Certain and wrong: below zero, and clipped at it.
    wrong = figures([[1e-9] * 7] * 4)
    assert wrong["stored_bits"] < 0 == wrong["stored_bits_clipped"]
