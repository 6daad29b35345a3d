"""Pieces of text: short enough to be encoded in little memory, with words short enough for a BPE to learn from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

CHUNK_CHARACTERS = 5_000
#: A piece that has no place for a cut is cut here all the same: encoding takes 250 bytes of memory per character.
MAX_CHUNK_CHARACTERS = 1_000_000

#: The longest word, number, row of signs or white space that a BPE learns from in one piece: the time of its training
#: grows with the square of that length.
MAX_WORD_CHARACTERS = 1_000
#: Characters that it learns from within longer ones: the time grows with their number times the size of the vocabulary.
MAX_LONG_CHARACTERS = 1_000_000
#: Text without white space beyond this length is encoded data, or a script that has no spaces.
MAX_UNBROKEN_CHARACTERS = 100_000
#: Characters that a BPE learns from within such text: in encoded data nearly every word is a new one.
MAX_ENCODED_CHARACTERS = 10_000_000

# The classes of characters between which byte-level BPE cuts. The search is linear, since it begins where a run begins.
_CLASSES = (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")


def _runs(classes: Iterable[str], longer_than: int) -> re.Pattern[str]:
    return re.compile("|".join(f"(?<!{c}){c}{{{longer_than + 1},}}" for c in classes))


_LONG_WORD, _LONG_SPACE = _runs(_CLASSES, MAX_WORD_CHARACTERS), _runs([r"\s"], MAX_WORD_CHARACTERS)
_UNBROKEN = _runs([r"\S"], MAX_UNBROKEN_CHARACTERS)

log = logging.getLogger(__name__)


def chunks(
    text: str, size: int = CHUNK_CHARACTERS, *, strict: bool = False, leave_out_space: bool = False
) -> list[str]:
    """Cuts `text` into pieces of at least `size` characters whose tokens together are those of the whole.

    A cut is made only before a single space between two words, which no byte-level token spans; where there is none
    within `MAX_CHUNK_CHARACTERS`, after so many.

    Args:
        text: to be cut.
        size: characters per piece, 1 or more.
        strict: cut between letters or digits only, which no normalisation takes for spaces.
        leave_out_space: at the beginning of a piece, for a tokenizer that puts one there itself.
    """
    pieces, begin, start = [], 0, 0
    while len(text) - begin > size:
        end = begin + max(size, MAX_CHUNK_CHARACTERS)
        cut = text.find(" ", begin + size, end)
        while cut >= 0 and not _is_between_words(text, cut, strict):
            cut = text.find(" ", cut + 1, end)
        if cut < 0 and end >= len(text):
            break
        begin = cut if cut >= 0 else end
        pieces.append(text[start:begin])
        start = begin + 1 if cut >= 0 and leave_out_space else begin
    return [*pieces, text[start:]]


def _is_between_words(text: str, space: int, strict: bool) -> bool:
    before, after = text[space - 1], text[space + 1 : space + 2]
    if strict:
        return before.isalnum() and after.isalnum()
    # Next to other white space a cut could change how that run of white space is tokenised.
    return after != "" and not before.isspace() and not after.isspace()


def grouped(pieces: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yields the pieces in lists of at least `characters` characters together."""
    group: list[str] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def learnable(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts for the training of a BPE: those without very long words as they are.

    Of text without white space over `MAX_UNBROKEN_CHARACTERS` the first `MAX_ENCODED_CHARACTERS` are yielded; of words
    over `MAX_WORD_CHARACTERS` the first `MAX_LONG_CHARACTERS`, cut into pieces.
    """
    sampled = _sample(texts, _UNBROKEN, MAX_UNBROKEN_CHARACTERS, MAX_ENCODED_CHARACTERS)
    return _sample(sampled, _LONG_WORD, MAX_WORD_CHARACTERS, MAX_LONG_CHARACTERS)


def _sample(texts: Iterable[str], runs: re.Pattern[str], piece: int, budget: int) -> Iterator[str]:
    """Yields the texts with each of the `runs` cut into pieces, until `budget` characters of them are used up."""
    remaining = budget
    for text in texts:
        begin = 0
        for run in runs.finditer(text) if _may_hold(text, piece) else ():
            yield text[begin : run.start()]
            end = min(run.end(), run.start() + remaining)
            for cut in range(run.start(), end, piece):
                yield text[cut : min(cut + piece, end)]
            if end < run.end() and remaining:
                log.info(
                    "The text holds more than %d characters in words of more than %d; the tokenizer learns from the "
                    "first of them. All of the text is encoded.",
                    budget,
                    piece,
                )
            remaining -= end - run.start()
            begin = run.end()
        yield text[begin:]


def _may_hold(text: str, length: int) -> bool:
    """Returns False for nearly all text, in a tenth of the time that a search for runs over `length` takes."""
    return max(map(len, text.split()), default=0) > length or _LONG_SPACE.search(text) is not None
