"""Text that continues another one, for tokenizers that put a space before each text, as SentencePiece does.

The parts of a conversation are tokenised one by one, and together have to give the ids of the whole: the space stands
before the first part alone, or, with some tokenizers, also behind each control token.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Backend

from pkm_lightning.data.cutting import is_prefix

__all__ = ["rendered_ids", "without_space"]


def without_space(backend: Backend) -> Backend | None:
    """Returns a copy of `backend` that puts nothing before a text; None where `backend` does not either."""
    described: dict[str, Any] = json.loads(backend.to_str())
    changed = {
        **described,
        "normalizer": _without_prefix(described["normalizer"]),
        "pre_tokenizer": _without_prefix(described["pre_tokenizer"]),
    }
    if changed == described:
        return None
    copy = Backend.from_str(json.dumps(changed))
    copy.encode_special_tokens = True
    return copy


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or is_prefix(part):
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part = {**part, key: [kept for step in part[key] if (kept := _without_prefix(step)) is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part


def rendered_ids(backend: Backend, continuing: Backend | None, text: str, before: str) -> list[int]:
    """Returns the ids that `text` has behind `before`, with the names of control tokens read as these tokens.

    Args:
        backend: reads control tokens.
        continuing: see `without_space`.
        text: to be encoded.
        before: "" where `text` begins a document.
    """
    if continuing is None or not before:
        return _ids(backend, text)
    names = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    last = max((name for name in names if before.endswith(name)), key=len, default="")
    if last:
        # A control token begins anew, in the way of the tokenizer.
        return _ids(backend, last + text)[1:]
    words = _before_control_token(backend, text, names)
    # A space at the beginning is left to a tokenizer that puts one there: it may strip those of the text.
    of_words = _ids(backend, words[1:]) if words[:1] == " " and words[1:] else _ids(continuing, words)
    return of_words + (_ids(backend, text[len(words) :]) if len(words) < len(text) else [])


def _before_control_token(backend: Backend, text: str, names: set[str]) -> str:
    encoding = backend.encode(text, add_special_tokens=False)
    for token, (begin, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        # The unknown token stands for other text than its name.
        if token in names and text[begin:end].strip() == token:
            return text[:begin]
    return text


def _ids(backend: Backend, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids
