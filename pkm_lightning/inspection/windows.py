"""Texts as tokens, and long ones in windows that the model's context holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkm_lightning.data.base import TextCodec

#: Tokens per window where the context of a model is not known.
DEFAULT_CONTEXT = 1024
#: What bytes that are no whole character are decoded as.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
#: Tokens that are tried together, at most: a character has up to four bytes, and tokens may end in the next one.
_TOGETHER = 8


class Window(NamedTuple):
    """A piece of a text, of which the tokens before `first` are there as context only."""

    begin: int
    first: int
    end: int


def windows(length: int, context: int) -> Iterator[Window]:
    """Yields windows that report each of `length` tokens once.

    Those after the first overlap by half, so that every token has at least half of the context before it, or all that
    there is.
    """
    end = min(context, length)
    yield Window(0, 0, end)
    while end < length:
        first, end = end, min(end + max(1, context // 2), length)
        yield Window(max(0, end - context), first, end)


class Pieces:
    """The texts of single tokens.

    Args:
        tokenizer: gives no spaces to a token at the beginning of a text in some cases, so that tokens are decoded
            behind the one before them.
    """

    def __init__(self, tokenizer: TextCodec) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int | None, int], str] = {}

    def __call__(self, token: int, before: int | None = None) -> str:
        """Returns the text of a token behind `before`; of tokens without text their name in the vocabulary."""
        key = (before, token)
        if key not in self._known:
            self._known[key] = self._decoded(token, before)
        return self._known[key]

    def of_text(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each token."""
        return [self(token, before) for token, before in zip(ids, (None, *ids[:-1]), strict=True)]

    def excerpt(self, ids: Sequence[int], place: int) -> tuple[str, str, str]:
        """Returns the text before a token, its own, and that behind it.

        Tokens that are parts of one character are shown as the character; parts of characters that the excerpt cuts are
        left out.
        """
        texts, spans = self.of_text(ids), list[tuple[range, str]]()
        start = 0
        while start < len(ids):
            spans.append(self._span(ids, texts, start))
            start = spans[-1][0].stop
        before = "".join(text for span, text in spans if span.stop <= place)
        token = next(text for span, text in spans if place in span)
        return before, token or texts[place], "".join(text for span, text in spans if span.start > place)

    def _span(self, ids: Sequence[int], texts: Sequence[str], start: int) -> tuple[range, str]:
        """Returns the fewest tokens from `start` on that are whole characters, and their text."""
        if _BROKEN not in texts[start]:
            return range(start, start + 1), texts[start]
        for end in range(start + 1, min(len(ids), start + _TOGETHER) + 1):
            text = self._tokenizer.decode(list(ids[start:end]))
            if _BROKEN not in text:
                return range(start, end), text
        return range(start, start + 1), texts[start].replace(_BROKEN, "")

    def _decoded(self, token: int, before: int | None) -> str:
        text = self._tokenizer.decode([token])
        if before is not None:
            first, both = self._tokenizer.decode([before]), self._tokenizer.decode([before, token])
            if first and both.startswith(first) and len(both) > len(first):
                text = both[len(first) :]
        name = getattr(self._tokenizer, "token", None)
        return text if text or name is None else str(name(token))
