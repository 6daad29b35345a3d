"""Texts on which a converted tokenizer is compared with the library that it comes from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer as Backend

from pkm_lightning.errors import DataError

#: Texts on which a conversion must agree.
ORDINARY = (
    'The quick brown fox, 1234567890 times!\nIt\'s 3.14 -- "quoted" (and more); see https://example.org/a_b?c=d#e.',
    "  two  spaces   and\ttabs\n\n\nblank lines \n  indented: def f(x): return x**2  ",
    " ",
    "Größe, façade, naïve, Привет мир, 漢字かな交じり文。 한국어 العربية עברית हिन्दी ไทย",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji \U0001f1eb\U0001f1f7 \u2603\ufe0f",
)
#: Texts on which the libraries may differ: characters that they normalise in other ways, and runs that a unigram model
#: may divide in ways of equal probability, of which rounding chooses one.
UNUSUAL = (
    *(character * length for character in "-=.!#_*~0123456789ax" for length in range(4, 9)),
    "ababababa hahahaha",
    "e\u0301 o\u0308 e\u0301\u0302 combined, \u1112\u1161\u11ab\u1100\u1173\u11af decomposed",
    "\ufb01\ufb02 \u2460 \u33a7 \uff21\uff22 \u3000wide\u3000 \u00a0fixed\u00a0 soft\u00ad \u200bzero",
    "\x00\x01 controls \x7f\x85 \ufeffmark \ufffd",
)

log = logging.getLogger(__name__)


def check_conversion(
    backend: Backend, reference: Callable[[str], list[int]], source: str, library: str, symbols: Sequence[str] = ()
) -> None:
    """Refuses a conversion that gives ordinary text other ids, and warns where it does so for unusual text.

    Args:
        backend: the result of the conversion.
        reference: gives the ids of the original.
        source: the file, for messages.
        library: that `reference` is of.
        symbols: parts of text that are tokens of their own.

    Raises:
        DataError: naming the first text that differs.
    """
    backend.encode_special_tokens = True

    def differs(text: str) -> bool:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids != reference(text)

    for text in [*ORDINARY, *(f"one{symbol}two {symbol} three" for symbol in symbols)]:
        if differs(text):
            raise DataError(
                f"{source} cannot be converted: {text!r} would get other ids than by {library}; give a tokenizer.json."
            )
    unusual = [*UNUSUAL, *(text for symbol in symbols for text in (symbol, f"{symbol}one"))]
    if differing := [text for text in unusual if differs(text)]:
        # Runs last: one kind of difference would hide the others.
        shown = ", ".join(repr(text) for text in sorted(differing, key=lambda text: text[:1] * 4 == text[:4])[:3])
        log.warning(
            "%s: %d of %d unusual texts get other ids than by %s (%s), as texts like them may.",
            source,
            len(differing),
            len(unusual),
            library,
            shown,
        )
