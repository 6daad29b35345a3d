"""Invented names: words of random syllables, which no corpus holds but by chance.

Words are numbered, and draw d has the words whose number leaves the remainder d when it is divided by `DRAWS`. Two
draws therefore share no word, whatever their sizes and seeds.
"""

from __future__ import annotations

import numpy as np

#: Number of disjoint draws; coprime to the number of words, or all words of a draw would end alike.
DRAWS = 61
_ONSETS = (
    *("b", "br", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l"),
    *("m", "n", "p", "pr", "r", "s", "t", "tr", "v", "vr", "z"),
)
_VOWELS = tuple("aeiouy")
_ENDS = ("n", "r", "l", "s", "th", "x", "nd", "m")
_SYLLABLES = len(_ONSETS) * len(_VOWELS)
_WORDS = _SYLLABLES**3 * len(_ENDS)
# Coprime to the number of words, so that numbers that follow each other are unlike words and each word has one number.
_STEP = 7_919_003


class InventedNames:
    """A source of distinct words of one draw, in an order that the seed decides.

    Args:
        draw: 0 to `DRAWS` - 1.
        rng: decides the order.
    """

    def __init__(self, draw: int, rng: np.random.Generator) -> None:
        self._draw, self._rng = draw, rng
        self._used: set[int] = set()

    def word(self) -> str:
        """Returns a capitalised word that this source has not returned before."""
        per_draw = _WORDS // DRAWS
        # Half a million; from half of them on, drawing again and again would take long.
        assert 2 * len(self._used) < per_draw
        while True:
            number = int(self._rng.integers(per_draw)) * DRAWS + self._draw
            if number not in self._used:
                self._used.add(number)
                return _spelled(number)

    def person(self) -> str:
        """Returns a name of two words; the second is as `word` returns it, the first may be used again."""
        first = self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) + self._rng.choice(_ONSETS)
        return f"{(first + self._rng.choice(_VOWELS)).capitalize()} {self.word()}"


def _spelled(number: int) -> str:
    rest = number * _STEP % _WORDS
    rest, end = divmod(rest, len(_ENDS))
    syllables = []
    for _ in range(3):
        rest, syllable = divmod(rest, _SYLLABLES)
        onset, vowel = divmod(syllable, len(_VOWELS))
        syllables.append(_ONSETS[onset] + _VOWELS[vowel])
    return ("".join(syllables) + _ENDS[end]).capitalize()
