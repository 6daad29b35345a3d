"""Rank files of tiktoken as a `Tokenizer` of the `tokenizers` library, with equal ids.

A line of a rank file holds a token in base64 and its rank, which is its id. tiktoken cuts a text by a regular
expression, takes a piece that is a token as it is, and else merges the neighbours whose union has the lowest rank, the
leftmost first. The pattern and the control tokens are not in the file: they are known for the published encodings, by
the file's name, and are configured for others.

Source of patterns and control tokens: tiktoken's `openai_public.py`.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pkm_lightning.data.bpe_process import byte_letters
from pkm_lightning.data.conversion_check import check_conversion
from pkm_lightning.errors import ConfigError, DataError, nearest

END = "<|endoftext|>"
#: An id beyond this is no rank of a vocabulary.
MOST_TOKENS = 2**24
#: Ranks that may be missing, as that of the end token of p50k_base.
MOST_GAPS = 1024


@dataclass(frozen=True)
class Encoding:
    """What a published encoding has beside its ranks.

    Attributes:
        pattern: cuts a text into pieces that are encoded each for itself, in the syntax of Oniguruma.
        control_tokens: their ids by name.
        n_ranks: lines of the published file; None where it is not published.
    """

    pattern: str
    control_tokens: Mapping[str, int] = field(default_factory=dict)
    n_ranks: int | None = None


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _CL100K = rf"{_WORDS}|{_LINES}", rf"{_WORDS}|\s+\z|{_LINES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
_FILLS = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}

#: The published encodings, by the names of their files; of Llama 3, whose file has another name, the pattern.
ENCODINGS = {
    "gpt2": Encoding(_GPT2, {END: 50256}, 50256),
    "r50k_base": Encoding(_GPT2, {END: 50256}, 50256),
    "p50k_base": Encoding(_GPT2, {END: 50256}, 50280),
    "cl100k_base": Encoding(_CL100K, {END: 100257, **_FILLS, "<|endofprompt|>": 100276}, 100256),
    "llama3": Encoding(_LLAMA3),
    "o200k_base": Encoding(_O200K, {END: 199999, "<|endofprompt|>": 200018}, 199998),
}


def is_rank_file(content: bytes) -> bool:
    """Returns whether the first line of a file is a token in base64 with its rank, as in the files of some models."""
    first = content[:4096].split(b"\n", 1)[0].split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def chosen_encoding(file: str, pattern: str | None, control_tokens: Sequence[str], n_ranks: int) -> Encoding:
    """Returns the pattern and control tokens of a rank file.

    Args:
        file: its path, whose name may be that of a published encoding.
        pattern: `data.tokenizer_pattern`: a regular expression or the name of a published encoding.
        control_tokens: `data.special_tokens`, whose ids follow those of the ranks.
        n_ranks: one more than the highest rank.

    Raises:
        ConfigError: no pattern is known.
    """
    known = None if pattern or control_tokens else ENCODINGS.get(Path(file).stem)
    if known is not None and known.control_tokens:
        return known
    pattern = pattern or Path(file).stem
    if pattern in ENCODINGS:
        pattern = ENCODINGS[pattern].pattern
    elif pattern == Path(file).stem:
        raise ConfigError(
            f"data.tokenizer={file} needs data.tokenizer_pattern, which a rank file does not hold: a regular "
            f"expression that cuts text into pieces, or one of {', '.join(ENCODINGS)}.{nearest(pattern, ENCODINGS)}"
        )
    names = control_tokens or [END]
    return Encoding(pattern, {name: n_ranks + i for i, name in enumerate(names)})


def read_ranks(content: bytes, source: str) -> dict[bytes, int]:
    """Returns the ranks of the tokens.

    Args:
        content: of the file.
        source: the file, for messages.

    Raises:
        DataError: naming the line that is malformed, or what is missing.
    """
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        token, rank = _entry(line, f"{source}, line {number}")
        if token in ranks or rank in lines:
            earlier = lines[ranks.get(token, rank)]
            what = "token" if token in ranks else f"rank {rank}"
            raise DataError(f"{source}, line {number} has the {what} of line {earlier} again; restore the file.")
        ranks[token], lines[rank] = rank, number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"{source} has no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02x}, so that not every "
            "text could be encoded; restore the file."
        )
    if max(lines) - len(lines) > MOST_GAPS:
        raise DataError(
            f"{source} has ranks up to {max(lines)} for {len(lines)} tokens, so that lines are missing; restore the file."
        )
    return ranks


def _entry(line: bytes, where: str) -> tuple[bytes, int]:
    parts = line.split()
    try:
        token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        whole = len(parts) == 2 and bool(token) and parts[1].isdigit() and rank < MOST_TOKENS
    except (binascii.Error, ValueError, IndexError):
        whole = False
    if not whole:
        shown = line[:40].decode(errors="replace")
        raise DataError(
            f"{where} holds {shown!r}; a line of a rank file has a token in base64, a space and its rank."
        )
    return token, rank


def rank_backend(ranks: Mapping[bytes, int], encoding: Encoding, source: str) -> Backend:
    """Returns the tokenizer with these ranks as ids.

    Args:
        ranks: of all tokens.
        encoding: pattern and control tokens.
        source: the file, for messages.

    Raises:
        ConfigError: for a pattern that is no regular expression, or a control token that is a word.
        DataError: lines are missing, or the id of a control token is taken.
    """
    if encoding.n_ranks not in (None, len(ranks)):
        raise DataError(
            f"{source} has {len(ranks)} tokens, and the published encoding of this name {encoding.n_ranks}; restore "
            "the file, or rename it and set data.tokenizer_pattern."
        )
    taken = {rank: token for token, rank in ranks.items()}
    for name, i in encoding.control_tokens.items():
        if i in taken or name.encode() in ranks:
            raise DataError(
                f"{source} has the token {taken.get(i, name.encode())!r} where {name} (id {i}) should be, so it is "
                "another encoding than its name or data.special_tokens say; set data.tokenizer_pattern and other names."
            )
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | dict(encoding.control_tokens)
    # The library cannot store a vocabulary with gaps between its ids.
    gaps = sorted(set(range(max(vocab.values()))) - set(vocab.values()))
    fillers = {f"<|unused_{i}|>": i for i in gaps}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    backend = Backend(models.BPE(vocab=vocab | fillers, merges=merges, ignore_merges=True))
    cut = pre_tokenizers.Split(_regex(encoding.pattern), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
    backend.decoder = decoders.ByteLevel()
    names = [*encoding.control_tokens, *fillers]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.encode_special_tokens = True
    spelled_by_text = [name for name in encoding.control_tokens if len(backend.encode(name).ids) == 1]
    if spelled_by_text:
        raise ConfigError(
            f"data.special_tokens: {spelled_by_text[0]!r} is a word, which text may spell; give it a name of several "
            "parts, such as <|user|>."
        )
    _compare(backend, ranks, encoding, source)
    return backend


def _compare(backend: Backend, ranks: Mapping[bytes, int], encoding: Encoding, source: str) -> None:
    """Compares the ids with those of tiktoken, where it is installed: it may read a pattern in another way."""
    if importlib.util.find_spec("tiktoken") is None:
        return
    import tiktoken

    try:
        reference = tiktoken.Encoding(
            source, pat_str=encoding.pattern, mergeable_ranks=dict(ranks), special_tokens=dict(encoding.control_tokens)
        )
    except ValueError as error:
        raise ConfigError(f"data.tokenizer_pattern={encoding.pattern!r} is refused by tiktoken ({error}).") from None
    check_conversion(backend, reference.encode_ordinary, source, "tiktoken")


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns all pairs of tokens whose union is a token, in the order of its rank."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _regex(pattern: str) -> Regex:
    key = f"data.tokenizer_pattern={pattern!r}"
    # In tiktoken's engine `X{1,3}+` gives nothing back and `$` is the end of the text. In that of the `tokenizers`
    # library the first repeats X{1,3}, and the second is the end of a line.
    outside_classes = re.sub(r"\\.|\[[^\]]*\]", "", pattern)
    if re.search(r"\d\}\+", outside_classes) or "$" in outside_classes:
        raise ConfigError(
            f"{key} has {{m,n}}+ or $, which the library reads in another way; write (?>X{{m,n}}) or \\z."
        )
    try:
        return Regex(pattern)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{key} is no regular expression ({error}); see data.tokenizer_pattern in docs.") from None
