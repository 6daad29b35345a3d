"""Text around a token, where characters are several tokens and the excerpt may cut them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pkm_lightning.inspection.windows import Pieces

TEXT = "Alcúdia € 😀 日本"


class Bytes:
    """A token per byte; the last but one id is both bytes around the border of the two last characters."""

    eos_id, vocab_size = 0, 258

    def __init__(self) -> None:
        self.border = TEXT.encode()[-4:-2]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        parts = (self.border if token == 256 else bytes([token]) for token in ids)
        return b"".join(parts).decode("utf-8", errors="replace")


def test_a_token_within_a_character_is_shown_as_the_character() -> None:
    pieces, ids = Pieces(Bytes()), Bytes().encode(TEXT)
    characters = [character for character in TEXT for _ in character.encode()]
    for place, character in enumerate(characters):
        before, token, after = pieces.excerpt(ids, place)
        assert token == character
        assert before + token + after == TEXT


def test_tokens_across_the_border_of_two_characters_are_shown_together() -> None:
    ids = Bytes().encode(TEXT)
    ids[-4:-2] = [256]
    for place in range(len(ids) - 5, len(ids)):
        assert Pieces(Bytes()).excerpt(ids, place) == (TEXT[:-2], TEXT[-2:], "")


@pytest.mark.parametrize(
    ("start", "stop", "place", "excerpt"),
    [
        (4, 8, 2, ("d", "i", "a")),
        (0, 4, 1, ("A", "l", "c")),
        (4, 8, 0, ("", "\N{REPLACEMENT CHARACTER}", "dia")),
        (15, 17, 1, ("", "\N{REPLACEMENT CHARACTER}", "")),
    ],
)
def test_parts_of_characters_that_an_excerpt_cuts_are_left_out(
    start: int, stop: int, place: int, excerpt: tuple[str, str, str]
) -> None:
    assert Pieces(Bytes()).excerpt(Bytes().encode(TEXT)[start:stop], place) == excerpt
