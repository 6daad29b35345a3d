"""Texts as tokens, and long ones in windows that the model's context holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkm_lightning.data.base import TextCodec

#: Tokens per window where the context of a model is not known.
DEFAULT_CONTEXT = 1024


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

    def _decoded(self, token: int, before: int | None) -> str:
        text = self._tokenizer.decode([token])
        if before is not None:
            first, both = self._tokenizer.decode([before]), self._tokenizer.decode([before, token])
            if first and both.startswith(first) and len(both) > len(first):
                text = both[len(first) :]
        name = getattr(self._tokenizer, "token", None)
        return text if text or name is None else str(name(token))
