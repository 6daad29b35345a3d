"""The text that a vocabulary is learned from: all of it, or a share spread evenly over a corpus of any size.

Which pieces are read is a pure function of the seed, the sizes and the number of each piece. So the memory of the
training is bounded, which grows with the number of different words: to learn 32,768 tokens from 100 MB took 0.2 GB where
the text was source code and its documentation, and 2.0 GB where a third of the words occurred only once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator

#: Longer documents are cut into pieces, so that the share of a corpus of few long ones is a sample too.
PIECE_CHARACTERS = 10_000

log = logging.getLogger(__name__)


def sampled(documents: Iterable[str], total_bytes: int, budget: int, seed: int = 0) -> Iterator[str]:
    """Yields the documents as they are where they fit into `budget`, else evenly chosen pieces of them.

    Args:
        documents: all of them, in an order that is always the same.
        total_bytes: of their text, in UTF-8; an estimate makes the sample larger or smaller, never more than `budget`.
        budget: bytes that are yielded at most.
        seed: of the choice.
    """
    if total_bytes <= budget:
        yield from documents
        return
    bound = int(2**64 * budget / total_bytes)
    size = 0
    for number, piece in enumerate(piece for document in documents for piece in _pieces(document)):
        if _hash(seed, number) >= bound:
            continue
        bytes_of_piece = len(piece.encode())
        if size + bytes_of_piece > budget:
            break
        size += bytes_of_piece
        yield piece
    log.info(
        "data.tokenizer=bpe: learns from %.1f MB of %.1f MB of text (%.2g%%), spread evenly; "
        "data.tokenizer_bytes=%d allows no more.",
        size / 1e6,
        total_bytes / 1e6,
        100 * size / total_bytes,
        budget,
    )


def _hash(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8])


def _pieces(document: str) -> Iterator[str]:
    """Yields a document in pieces of at most `PIECE_CHARACTERS`, cut before a space where one is near."""
    begin = 0
    while len(document) - begin > PIECE_CHARACTERS:
        cut = document.rfind(" ", begin + PIECE_CHARACTERS // 2, begin + PIECE_CHARACTERS)
        cut = cut if cut > 0 else begin + PIECE_CHARACTERS
        yield document[begin:cut]
        begin = cut
    yield document[begin:]
