"""The text that a vocabulary is learned from: all of it, or a share spread evenly over a corpus of any size.

Which pieces are read is a pure function of the seed, the budget and the corpus. The size of the corpus need not be
known: those pieces are kept whose hashes are lowest, as many as the budget allows. They are held in memory; the
training needs more. To learn 32,768 tokens from 100 MB took 0.2 GB where the text was source code and its
documentation, and 2.0 GB where a third of the words occurred only once.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import deque
from collections.abc import Iterable, Iterator

from pkm_lightning.data.chunks import grouped

#: Longer documents are cut into pieces, so that the share of a corpus of few long ones is a sample too.
PIECE_CHARACTERS = 10_000
#: Shorter ones are chosen several at a time: a record of each would take more memory than its text.
GROUP_CHARACTERS = 1_000

log = logging.getLogger(__name__)


def sampled(documents: Iterable[str], budget: int, seed: int = 0) -> Iterator[str]:
    """Yields the documents as they are where they fit into `budget`, else evenly chosen pieces of them.

    Args:
        documents: all of them, in an order that is always the same.
        budget: bytes of UTF-8 that are yielded at most.
        seed: of the choice.
    """
    first: deque[str] = deque()
    size, others = 0, iter(documents)
    for document in others:
        first.append(document)
        size += len(document.encode())
        if size > budget:
            yield from _chosen((piece for text in _all(first, others) for piece in _pieces(text)), budget, seed)
            return
    yield from first


def _all(first: deque[str], others: Iterator[str]) -> Iterator[str]:
    """Yields the first texts, which it removes, and the others."""
    while first:
        yield first.popleft()
    yield from others


def _chosen(pieces: Iterable[str], budget: int, seed: int) -> Iterator[str]:
    # The highest hash of those that are kept comes first.
    sample: list[tuple[int, int, int, list[str]]] = []
    total = size = 0
    for number, group in enumerate(grouped(pieces, GROUP_CHARACTERS)):
        n_bytes = sum(len(piece.encode()) for piece in group)
        total, size = total + n_bytes, size + n_bytes
        heapq.heappush(sample, (-_hash(seed, number), number, n_bytes, group))
        while size > budget:
            size -= heapq.heappop(sample)[2]
    log.info(
        "data.tokenizer=bpe: learns from %.1f MB of %.1f MB of text (%.2g%%), spread evenly; "
        "data.tokenizer_bytes=%d allows no more.",
        size / 1e6,
        total / 1e6,
        100 * size / total,
        budget,
    )
    for _, _, _, group in sorted(sample, key=lambda entry: entry[1]):
        yield from group


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
