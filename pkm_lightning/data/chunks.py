"""Pieces of text: short enough to be encoded in little memory, with words short enough for a BPE to learn from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

CHUNK_CHARACTERS = 20_000
#: A piece that has no place for a cut is cut here all the same: encoding takes 250 bytes of memory per character.
MAX_CHUNK_CHARACTERS = 1_000_000

#: The longest word, number, row of signs or white space that a BPE learns from in one piece: the time of its training
#: grows with the square of that length.
MAX_WORD_CHARACTERS = 1_000
#: Characters that it learns from within longer ones: the time grows with their number times the size of the vocabulary.
MAX_LONG_CHARACTERS = 1_000_000

# The classes of characters between which byte-level BPE cuts. The search is linear, since it begins where a run begins.
_CLASSES = (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")
_LONG_RUN = re.compile("|".join(f"(?<!{c}){c}{{{MAX_WORD_CHARACTERS + 1},}}" for c in _CLASSES))
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{MAX_WORD_CHARACTERS + 1},}}")

log = logging.getLogger(__name__)


def chunks(text: str, size: int = CHUNK_CHARACTERS) -> list[str]:
    """Cuts `text` into pieces of at least `size` characters whose tokens together are those of the whole.

    A cut is made only before a single space between two words, which no byte-level token spans; where there is none
    within `MAX_CHUNK_CHARACTERS`, after so many.
    """
    pieces, begin = [], 0
    while len(text) - begin > size:
        end = begin + max(size, MAX_CHUNK_CHARACTERS)
        cut = text.find(" ", begin + size, end)
        # Next to other white space a cut could change how that run of white space is tokenised.
        while 0 < cut < len(text) - 1 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.find(" ", cut + 1, end)
        if cut <= 0 or cut == len(text) - 1:
            if end >= len(text):
                break
            cut = end
        pieces.append(text[begin:cut])
        begin = cut
    return [*pieces, text[begin:]]


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

    Words of more than `MAX_WORD_CHARACTERS` are cut, and left out when `MAX_LONG_CHARACTERS` of them have been yielded.
    """
    remaining = MAX_LONG_CHARACTERS
    for text in texts:
        if not _may_hold_long_run(text):
            yield text
            continue
        begin = 0
        for run in _LONG_RUN.finditer(text):
            if remaining == MAX_LONG_CHARACTERS:
                log.info(
                    "The text holds words of more than %d characters; the tokenizer learns from pieces of them, %d "
                    "characters in all. What it encodes is the whole text.",
                    MAX_WORD_CHARACTERS,
                    MAX_LONG_CHARACTERS,
                )
            yield text[begin : run.start()]
            end = min(run.end(), run.start() + remaining)
            for cut in range(run.start(), end, MAX_WORD_CHARACTERS):
                yield text[cut : min(cut + MAX_WORD_CHARACTERS, end)]
            remaining -= end - run.start()
            begin = run.end()
        yield text[begin:]


def _may_hold_long_run(text: str) -> bool:
    """Returns False for nearly all text, in a tenth of the time that the search for runs takes."""
    longest = max(map(len, text.split()), default=0)
    return longest > MAX_WORD_CHARACTERS or _LONG_SPACE.search(text) is not None
