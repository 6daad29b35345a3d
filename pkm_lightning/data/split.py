"""Which documents train, which validate, which test: a function of their number alone, so that text can be streamed.

The hash of a document's number decides, so that documents appended later change no other's part. So that no part is
empty, each part has one of the first `ENOUGH_DOCUMENTS` whatever its hash is: that whose hash comes closest. Where
there are fewer documents and these can be cut, the end of the text is held out instead.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pkm_lightning.errors import ConfigError

__all__ = ["ENOUGH_DOCUMENTS", "Fractions", "always_held_out", "part_of", "unit_hash"]

#: With fewer documents than these, text is cut at one place instead; among as many first ones each part has one.
ENOUGH_DOCUMENTS = FIRST_DOCUMENTS = 10


@dataclass(frozen=True)
class Fractions:
    """Shares of the documents that are held out.

    Attributes:
        validation: 0.001 to 0.5; 0 where validation has files of its own.
        test: 0 to 0.5; 0 leaves no test part, and the validation part is tested.
        seed: decides which documents.

    Raises:
        ConfigError: the shares leave nothing to train on.
    """

    validation: float
    test: float
    seed: int

    def __post_init__(self) -> None:
        if self.validation + self.test > 0.9:
            raise ConfigError(
                f"data.val_fraction={self.validation} and data.test_fraction={self.test} leave less than a tenth of "
                "the documents to train on; lower one of them."
            )


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
    """Returns the part of the documents that each part has in any case.

    Args:
        documents: in the corpus, or `FIRST_DOCUMENTS` where there are more.
        fractions: of the parts; one of 0 has no document.
    """
    hashes = {n: unit_hash(fractions.seed, n) for n in range(min(documents, FIRST_DOCUMENTS))}
    remaining = sorted(hashes, key=lambda n: hashes[n])
    chosen: dict[int, str] = {}
    # The lowest hash is most likely one of validation anyway, and the highest one of training.
    if fractions.validation and remaining:
        chosen[remaining.pop(0)] = "validation"
    if remaining:
        chosen[remaining.pop()] = "train"
    if fractions.test and remaining:
        chosen[next((n for n in remaining if hashes[n] >= fractions.validation), remaining[-1])] = "test"
    return chosen
