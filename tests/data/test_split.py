"""Parts of documents: by number alone, near their fractions, never empty, and not moved by later documents."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data.split import FIRST_DOCUMENTS, Fractions, always_held_out, part_of
from pkm_lightning.errors import ConfigError

shares = st.builds(
    Fractions,
    validation=st.sampled_from([0.001, 0.01, 0.05, 0.3, 0.5]),
    test=st.sampled_from([0.0, 0.001, 0.1, 0.4]),
    seed=st.integers(0, 2**40),
)


def parts(documents: int, fractions: Fractions) -> list[str]:
    always = always_held_out(min(documents, FIRST_DOCUMENTS), fractions)
    return [part_of(number, fractions, always) for number in range(documents)]


@given(fractions=shares, documents=st.integers(FIRST_DOCUMENTS, 60), later=st.integers(1, 60))
def test_later_documents_move_no_other(fractions: Fractions, documents: int, later: int) -> None:
    assert parts(documents + later, fractions)[:documents] == parts(documents, fractions)


@given(fractions=shares, documents=st.integers(2, 40))
def test_no_part_is_empty(fractions: Fractions, documents: int) -> None:
    wanted = {"train", "validation"} | ({"test"} if fractions.test and documents > 2 else set())
    assert wanted <= set(parts(documents, fractions))
    assert fractions.test or "test" not in parts(documents, fractions)


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.0), (0.05, 0.1), (0.5, 0.4), (0.0, 0.1)])
def test_the_parts_are_as_large_as_their_fractions(validation: float, test: float) -> None:
    counts = Counter(parts(20_000, Fractions(validation, test, seed=5)))
    for part, share in (("validation", validation), ("test", test)):
        # One document may be there in any case; four standard deviations of chance.
        assert abs(counts[part] - 20_000 * share) <= 1 + 4 * (20_000 * share * (1 - share)) ** 0.5


def test_the_seed_decides() -> None:
    assert parts(100, Fractions(0.3, 0.1, 1)) == parts(100, Fractions(0.3, 0.1, 1))
    assert parts(100, Fractions(0.3, 0.1, 1)) != parts(100, Fractions(0.3, 0.1, 2))


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.val_fraction=0\.5 and data\.test_fraction=0\.5 leave less than a tenth"
    ):
        Fractions(0.5, 0.5, 0)
