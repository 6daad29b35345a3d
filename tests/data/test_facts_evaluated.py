"""The division of facts among test and validations: no common one, none lost, a test that keeps every kind."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from pkm_lightning.data.facts.evaluated import divide_sample
from pkm_lightning.data.facts.selection import Fact

Sizes = tuple[int, int, int]


def made(sizes: Sizes) -> tuple[list[Fact], np.ndarray]:
    """Returns so many facts of subjects with questions, without, and controls, and their numbers in random order."""
    kinds = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    facts = [Fact(f"{i}", "capital", "x", 1, 0, kind == 0, 0, kind == 2) for i, kind in enumerate(kinds)]
    return facts, np.random.default_rng(sum(sizes)).permutation(len(facts))


def kinds(facts: list[Fact], numbers: np.ndarray) -> Counter[int]:
    return Counter(2 if facts[i].control else 0 if facts[i].questioned else 1 for i in numbers.tolist())


@pytest.mark.parametrize("eval_facts", [1, 2, 20, 10_000])
def test_no_fact_is_in_both_and_none_is_lost(eval_facts: int) -> None:
    for sizes in itertools.product([0, 1, 3, 4, 9, 50], repeat=3):
        facts, sample = made(sizes)
        test, validation = divide_sample(facts, sample, eval_facts)
        assert sorted([*test.tolist(), *validation.tolist()]) == list(range(len(facts)))
        # In the order of the sample.
        assert [i for i in sample.tolist() if i in set(test.tolist())] == test.tolist()
        expected = [min(eval_facts, size // 4) for size in sizes]
        if not any(expected[:2]):
            expected = [0, 0, 0]
        asked, remaining = kinds(facts, validation), kinds(facts, test)
        assert [asked[kind] for kind in range(3)] == expected
        assert [remaining[kind] for kind in range(3)] == [s - n for s, n in zip(sizes, expected, strict=True)]


def test_a_large_sample_asks_in_the_test_what_it_asked_without_validations() -> None:
    facts, sample = made((4_000, 4_000, 700))
    test, _ = divide_sample(facts, sample, 500)
    first = [i for i in sample.tolist() if not facts[i].control][:500]
    assert [i for i in test.tolist() if not facts[i].control][:500] == first
    for control in (False, True):
        of_kind = [i for i in sample.tolist() if facts[i].control is control][:500]
        assert [i for i in test.tolist() if facts[i].control is control][:500] == of_kind
