"""Canonical tokens: one token for all that differ in case, white space and Unicode form only.

N-grams of canonical tokens are fewer, and each is met more often (Cheng et al. 2026, arXiv 2601.07372, section 2.2).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

#: The decoded form of bytes that are no whole character, which different tokens share.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def canonical_ids(texts: Iterable[str]) -> list[int]:
    """Returns for each token of a vocabulary the first token with the same folded text.

    Folding is Unicode NFKC, then case folding, then one blank for each run of white space, and none at the ends.

    Args:
        texts: the text of each token, by id. A token without text (control tokens have none) and one that is a part of
            a character stand for themselves.
    """
    first: dict[str, int] = {}
    return [
        token if not text or _BROKEN in text else first.setdefault(_folded(text), token)
        for token, text in enumerate(texts)
    ]


def _folded(text: str) -> str:
    # NFKC once more, since case folding can take a text out of that form.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())
