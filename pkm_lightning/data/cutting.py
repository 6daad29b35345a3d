"""Where a text may be cut so that the ids of its pieces are those of the whole, derived from a `tokenizer.json`.

Byte-level vocabularies such as those of this package may be cut before a single space. Others may not: SentencePiece
puts a space before each text, a unigram model weighs whole sentences, a pattern of the user's may look anywhere. What
is not known to be exact is encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pkm_lightning.data.sentencepiece_file import SPACE, WORDS, crosses_space
from pkm_lightning.data.tiktoken_file import ENCODINGS

#: Patterns of `tokenizer.json` files that match a space at the beginning of a match only, and no space after a word.
_CUT_AT_SPACES = {
    *(encoding.pattern for encoding in ENCODINGS.values()),
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Qwen2 and its descendants: as Llama 3, with single digits.
    ENCODINGS["llama3"].pattern.replace("{1,3}", ""),
    WORDS,
}
#: Work on single characters and the marks after them: never on both sides of the place before a space.
_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled", "ByteLevel"),
}
_LOCAL_PRE_TOKENIZERS = {"Digits", "Punctuation", "ByteLevel", "Metaspace"}
_SPLIT_AT_SPACES = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_OUTER_SPACES = "^ +| +$"


@dataclass(frozen=True)
class Cutting:
    """Where texts may be cut for a tokenizer.

    Attributes:
        exact: before a single space between two words.
        strict: only between letters and digits.
        adds_space: the tokenizer puts a space before each piece, which therefore leaves its own out.
    """

    exact: bool
    strict: bool = True
    adds_space: bool = False


def cutting_of(described: Mapping[str, Any]) -> Cutting:
    """Returns how texts may be cut for the content of a `tokenizer.json`."""
    normalizers = list(_parts(described["normalizer"], "normalizers"))
    adds_space = any(is_prefix(part) for part in normalizers)
    exact = (
        all(_is_local(part, adds_space) for part in normalizers)
        and _separates_words(described, normalizers)
        and not any(_reaches_over_space(token) for token in described["added_tokens"])
    )
    cutters = list(_parts(described["pre_tokenizer"], "pretokenizers"))
    byte_level = [(part["type"], part.get("use_regex")) for part in cutters] == [("ByteLevel", True)]
    return Cutting(exact, strict=not exact or not byte_level or bool(normalizers), adds_space=adds_space)


def _parts(described: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    if described is None:
        return
    if described["type"] != "Sequence":
        yield described
    for part in described.get(key, []):
        yield from _parts(part, key)


def is_prefix(part: Mapping[str, Any]) -> bool:
    """Returns whether a normalizer puts a space before each text, as SentencePiece does."""
    if part["type"] == "Prepend":
        return bool(part["prepend"] == SPACE)
    return part["type"] == "Replace" and part["content"] == SPACE and part["pattern"].get("Regex", "")[:2] == r"\A"


def _is_local(part: Mapping[str, Any], adds_space: bool) -> bool:
    if is_prefix(part):
        return True
    if part["type"] == "Strip":
        return not part["strip_left"]
    if part["type"] == "Replace":
        pattern = part["pattern"]
        return pattern in ({"String": " "}, {"Regex": " {2,}"}) or (adds_space and pattern == {"Regex": _OUTER_SPACES})
    return part["type"] in _LOCAL_NORMALIZERS


def _separates_words(described: Mapping[str, Any], normalizers: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether what stands before and after the place before a space is encoded each for itself."""
    parts = list(_parts(described["pre_tokenizer"], "pretokenizers"))
    first = next((i for i, part in enumerate(parts) if _splits_at_space(part)), None)
    if first is not None:
        # What comes after it sees single words.
        return all(part["type"] in _LOCAL_PRE_TOKENIZERS for part in parts[:first])
    if not all(part["type"] == "Metaspace" for part in parts):
        return False
    # Merges of a BPE that runs over the whole text never meet where no token has a space after another character.
    model = described["model"]
    replaced = parts or any(part["type"] == "Replace" and part["content"] == SPACE for part in normalizers)
    space = SPACE if replaced else " "
    vocab = model["vocab"] if model["type"] == "BPE" else ()
    return space in vocab and not any(crosses_space(token, space) for token in vocab)


def _splits_at_space(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Split":
        pattern = part["pattern"].get("Regex")
        return pattern in _CUT_AT_SPACES and part["behavior"] == "Isolated" and not part["invert"]
    regex = part["type"] == "ByteLevel" and part["use_regex"]
    return regex or part["type"] in _SPLIT_AT_SPACES or (part["type"] == "Metaspace" and part.get("split", True))


def _reaches_over_space(token: Mapping[str, Any]) -> bool:
    """Returns whether an added token, which is found before anything is cut, may hold the place before a space."""
    # Special tokens are not looked for in texts.
    return not token["special"] and (
        token["lstrip"] or token["rstrip"] or bool(re.search(rf"[^\s{SPACE}][\s{SPACE}]", token["content"]))
    )
