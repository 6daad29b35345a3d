"""Which documents train, which validate, which test: a function of their number alone, so that text can be streamed.

The hash of a document's number decides, so that documents appended later change no other's part. Where there are few,
those with the lowest hashes are held out all the same, so that no part is empty; where there are fewer than
`ENOUGH_DOCUMENTS` and these can be cut, the end of the text is held out instead.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["ENOUGH_DOCUMENTS", "Fractions", "part_of", "unit_hash"]

#: With fewer documents than these, text is cut at one place instead.
ENOUGH_DOCUMENTS = 10
#: Documents among which one is held out in any case.
FIRST_DOCUMENTS = 1_000


@dataclass(frozen=True)
class Fractions:
    """Shares of the documents that are held out.

    Attributes:
        validation: 0.001 to 0.5.
        test: 0 to 0.5; 0 leaves no test part, and the validation part is tested.
        seed: decides which documents.
    """

    validation: float
    test: float
    seed: int


def unit_hash(seed: int, number: int) -> float:
    """Returns a number in [0, 1) that depends on seed and number alone."""
    return int(hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()[:15], 16) / 16.0**15


def part_of(number: int, fractions: Fractions, always: dict[int, str]) -> str:
    """Returns the part of document `number`; `always` (of `always_held_out`) goes before its hash."""
    if number in always:
        return always[number]
    value = unit_hash(fractions.seed, number)
    if value < fractions.validation:
        return "validation"
    return "test" if value < fractions.validation + fractions.test else "train"


def always_held_out(documents: int, fractions: Fractions) -> dict[int, str]:
    """Returns the part of the documents that are held out whatever their hash is.

    Args:
        documents: in the corpus, or `FIRST_DOCUMENTS` where there are more.
        fractions: of the parts; one of 0 has no document.
    """
    lowest = sorted(range(min(documents, FIRST_DOCUMENTS)), key=lambda number: unit_hash(fractions.seed, number))
    wanted = ["validation", *(["test"] if fractions.test else [])]
    # The lowest hash of all lies in the validation part by itself, unless the fraction is small for so few documents.
    test = next((n for n in lowest[1:] if unit_hash(fractions.seed, n) >= fractions.validation), None)
    chosen = [lowest[0] if lowest else None, test if test is not None or len(lowest) < 3 else lowest[1]]
    return {number: part for number, part in zip(chosen, wanted, strict=False) if number is not None}
