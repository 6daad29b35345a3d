"""Documents fall into parts by number; few of them are cut near the end of the text, wherever pieces begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.data.shards.plan import Divider, Portion, survey
from pkm_lightning.data.split import Fractions
from pkm_lightning.errors import DataError


class Pieces:
    """A reader of given pieces."""

    files = ()

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        return iter(self._pieces)

    def where(self, file: int, record: int) -> str:
        return str(record)


def texts(documents: Sequence[Sequence[str]]) -> list[Piece]:
    return [
        Piece(0, record, (Segment(text),), ends=i == len(document) - 1)
        for record, document in enumerate(documents)
        for i, text in enumerate(document)
    ]


def divided(pieces: Sequence[Piece], fractions: Fractions) -> list[Portion]:
    divider = Divider(survey(Pieces(pieces), fractions, "data.path=x"))
    return [portion for piece in pieces for portion in divider.divide(piece)]


WORDS = st.lists(st.sampled_from([" a", " bcd", " efghij", "\n\nk", " lmnop."]), min_size=1, max_size=20).map("".join)


@settings(max_examples=50)
@given(
    documents=st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=9), test=st.sampled_from([0, 0.2])
)
def test_the_end_of_few_texts_is_held_out(documents: list[list[str]], test: float) -> None:
    portions = divided(texts(documents), Fractions(0.3, test, 0))
    names = ["train", "validation", *(["test"] if test else [])]
    whole = "".join("".join(document) for document in documents)
    parts = {name: "".join(p.segments[0].text for p in portions if p.part == name) for name in names}
    assert "".join(parts.values()).split() == whole.split()
    assert "".join("".join(parts.values()).split()) == "".join(whole.split())
    assert [p.part for p in portions] == sorted((p.part for p in portions), key=names.index)
    # A part begins where a word ends, less than a word behind its share of the characters.
    shares = [round(len(whole) * (1 - 0.3 - test)), *([round(len(whole) * (1 - test))] if test else [])]
    for place, share in zip(accumulate(len(parts[name]) for name in names), shares, strict=False):
        assert 0 <= len(whole[share:].strip()) - len(whole[place:].strip()) <= len(" efghij\n\n")
    # Each part holds whole documents, or the beginning or the end of one.
    for name in names:
        own = [p for p in portions if p.part == name]
        assert [p.begins for p in own] == [True, *(p.ends for p in own[:-1])][: len(own)]
        assert not own or own[-1].ends


def test_documents_with_questions_are_held_out_whole_however_few() -> None:
    question = [Piece(0, i, (Segment(f"q{i}", learned=False), Segment(f" a{i}"))) for i in range(3)]
    portions = divided(question, Fractions(0.01, 0.01, 0))
    assert sorted(p.part for p in portions) == ["test", "train", "validation"]
    assert all(p.begins and p.ends and p.segments == p.piece.segments for p in portions)


@pytest.mark.parametrize("n", [10, 999, 1_500])
def test_many_documents_fall_into_parts_by_the_hash_of_their_number(n: int) -> None:
    first = [p.part for p in divided(texts([[f"document {i}"] for i in range(n)]), Fractions(0.1, 0.05, 0))]
    assert {"train", "validation", "test"} == set(first)
    more = [p.part for p in divided(texts([[f"document {i}"] for i in range(n + 500)]), Fractions(0.1, 0.05, 0))]
    assert sum(a != b for a, b in zip(first, more, strict=False)) <= 2
    if n > 1_000:
        assert first == more[:n]
        assert 0.05 < first.count("validation") / n < 0.15


def test_all_pieces_of_a_document_fall_into_its_part() -> None:
    portions = divided(texts([[f"{i}", " and", " more"] for i in range(40)]), Fractions(0.3, 0, 1))
    assert all(len({p.part for p in portions[i : i + 3]}) == 1 for i in range(0, 120, 3))
    assert {p.part for p in portions} == {"train", "validation"}


QUESTION = Piece(0, 0, (Segment("q", learned=False), Segment(" a")))


@pytest.mark.parametrize(
    ("pieces", "fractions", "message"),
    [
        ([], Fractions(0.1, 0, 0), "data.path=x: no text in 0 files; give files that are not empty."),
        ([QUESTION], Fractions(0.1, 0, 0), "data.path=x has 1 document; training and validation need one each."),
        ([QUESTION], Fractions(0, 0.1, 0), "data.path=x has 1 document; training and test need one each."),
        ([QUESTION] * 2, Fractions(0.1, 0.1, 0), "has 2 documents; training, validation and testing need one each."),
    ],
)  # fmt: skip
def test_too_little_is_refused(pieces: list[Piece], fractions: Fractions, message: str) -> None:
    with pytest.raises(DataError) as error:
        survey(Pieces(pieces), fractions, "data.path=x")
    assert message in str(error.value)
    if fractions.test == 0 and pieces:
        assert {p.part for p in divided(pieces, Fractions(0, 0, 0))} == {"train"}
