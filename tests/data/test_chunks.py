"""Pieces of text: they tokenise as the whole, and a BPE learns from words of a bearable length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data import chunks as module
from pkm_lightning.data.chunks import MAX_LONG_CHARACTERS, MAX_WORD_CHARACTERS, chunks, grouped, learnable
from pkm_lightning.data.tokenizer import bytes_tokenizer


@given(text=st.text(st.sampled_from("ab \n"), max_size=200), size=st.integers(1, 30))
def test_chunks_are_tokenised_as_the_whole(text: str, size: int) -> None:
    tokenizer = bytes_tokenizer()
    pieces = chunks(text, size)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["a" * 95, "a" * 30 + " b" + "a" * 95, "a" * 40 + "  " * 30, "\u6f22" * 80, " " * 85])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHUNK_CHARACTERS", 20)
    pieces = chunks(text, 10)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 20


def test_strict_cuts_are_made_between_letters_and_digits_only() -> None:
    text = "(a) b \u200bc d. e 1 f" * 3
    assert chunks(text, 1, strict=True)[:4] == ["(a) b \u200bc", " d. e", " 1", " f(a) b \u200bc"]
    assert chunks(text, 1)[:3] == ["(a)", " b", " \u200bc"]
    assert chunks(text, 1, strict=True, leave_out_space=True)[:3] == ["(a) b \u200bc", "d. e", "1"]


def test_groups_hold_all_pieces_in_order() -> None:
    assert list(grouped(["a", "bb", "ccc", "d"], 3)) == [["a", "bb"], ["ccc"], ["d"]]
    assert list(grouped([], 3)) == []


ORDINARY = [
    "Words of any kind, 12345 numbers\n\n\n and --- signs.",
    "\u6f22\u5b57\u3002" * 5_000,
    "one\u3002" + "word " * 500,
    "x" * MAX_WORD_CHARACTERS,
    "mixed1" * 2_000,
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_learned_from_as_it_is(text: str) -> None:
    assert list(learnable([text])) == [text]


@pytest.mark.parametrize("letter", ["a", "\u6f22", "7", "-", "_", "\n", " "])
def test_long_words_of_every_kind_are_cut_and_sampled(letter: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    n = MAX_LONG_CHARACTERS + 5_000
    edge = "x" if letter == "7" else "7"
    pieces = list(learnable(["before. ", f"x{edge}{letter * n}{edge}{letter * n}{edge} end"]))
    assert max(map(len, pieces)) <= MAX_WORD_CHARACTERS
    text = "".join(pieces)
    # The second run comes after the last character that is learned from.
    assert text.startswith(f"before. x{edge}{letter}")
    assert text.endswith(f"{edge}{edge} end")
    assert MAX_LONG_CHARACTERS <= text.count(letter) <= MAX_LONG_CHARACTERS + MAX_WORD_CHARACTERS
    assert caplog.text.count("more than 1000000 characters in words of more than 1000;") == 1


def test_of_text_without_spaces_a_sample_is_learned_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "MAX_ENCODED_CHARACTERS", 250_000)
    encoded = "a1" * 200_000
    assert "".join(learnable(["one ", f"two {encoded} three", encoded])) == f"one two {encoded[:250_000]} three"
    assert caplog.text.count("more than 250000 characters in words of more than 100000;") == 1
