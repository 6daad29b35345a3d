"""The tokenizer that the configuration of data names: learned from the data, of bytes, or read from files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import models

from pkm_lightning.data.bpe_process import EOS, NORMALIZATIONS, PAD, byte_level
from pkm_lightning.data.cache import sha256_file
from pkm_lightning.data.files import expanded
from pkm_lightning.data.learning_sample import sampled
from pkm_lightning.data.pretrained_files import default_cache
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from pkm_lightning.data.tokenizer_files import ENDINGS, tokenizer_json
from pkm_lightning.errors import ConfigError, check_choice, check_integer, nearest

__all__ = ["TokenizerChoice"]

BYTES_VOCAB = 258
#: Bytes of text that a BPE learns from unless the configuration says otherwise, and at least.
SAMPLE_BYTES, LEAST_SAMPLE_BYTES = 100_000_000, 100_000
#: Texts, and characters of each, with which a tokenizer that may change texts is tried.
TRIED_TEXTS, TRIED_CHARACTERS = 32, 1_000
KINDS = ("bpe", "bytes")

#: Cuts as a vocabulary of this package does: what is learned is never longer than one of the pieces.
_WORDS = byte_level(models.BPE()).pre_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerChoice:
    """The keys of `data` that decide the tokenizer.

    Args:
        kind: `bpe`, `bytes`, or a path: see `tokenizer_files`.
        size: tokens of a `bpe` vocabulary, at least 258; the other kinds have their own size.
        cache_dir: where conversions of files are kept.
        special_tokens: names of control tokens that are added to a vocabulary of `bpe`, `bytes` or ranks of tiktoken;
            a file of another kind must have them.
        normalization: of texts before they are encoded, one of `NORMALIZATIONS`; None leaves every text as it is.
        pattern: cuts texts for ranks of tiktoken: a regular expression or the name of a published encoding.
        sample_bytes: of text that a `bpe` vocabulary is learned from at most.

    Raises:
        ConfigError: for an unknown kind or a vocabulary below the 256 bytes and the control tokens.
        DataError: for a tokenizer file that cannot be read.
    """

    kind: str
    size: int
    cache_dir: Path = field(default_factory=default_cache)
    special_tokens: tuple[str, ...] = ()
    normalization: str | None = None
    pattern: str | None = None
    sample_bytes: int = SAMPLE_BYTES

    @classmethod
    def of(cls, data: Mapping[str, Any], cache_dir: Path) -> TokenizerChoice:
        """Returns the choice of the keys of `data`; those that are missing have their defaults."""
        special_tokens = data.get("special_tokens") or ()
        if isinstance(special_tokens, str):
            raise ConfigError(
                f"data.special_tokens={special_tokens} is not a list; write data.special_tokens=[NAME,...]."
            )
        return cls(
            data["tokenizer"],
            data["vocab_size"],
            cache_dir,
            tuple(special_tokens),
            data.get("normalization"),
            data.get("tokenizer_pattern"),
            data.get("tokenizer_bytes", SAMPLE_BYTES),
        )

    def __post_init__(self) -> None:
        self._check_kind()
        self._check_special_tokens()
        if self.normalization is not None:
            check_choice("data.normalization", self.normalization, ["null", *NORMALIZATIONS])
        check_integer("data.tokenizer_bytes", self.sample_bytes, LEAST_SAMPLE_BYTES)
        if self.pattern is not None and self.kind in KINDS:
            raise ConfigError(
                f"data.tokenizer_pattern={self.pattern!r} is for .tiktoken files, and data.tokenizer={self.kind}; "
                "leave it out."
            )
        needed = BYTES_VOCAB + len(self.special_tokens)
        if self.kind == "bpe" and self.size < needed:
            raise ConfigError(
                f"data.vocab_size={self.size} is too small for data.tokenizer=bpe; 256 bytes and "
                f"{needed - 256} control tokens need {needed} or more."
            )

    def _check_kind(self) -> None:
        if self.kind in KINDS or str(self.kind).lower().endswith(ENDINGS) or expanded(self.kind).is_dir():
            return
        raise ConfigError(
            f"data.tokenizer={self.kind!r} is not known; allowed: bpe, bytes, or the path of a tokenizer.json, of a "
            f"folder that holds one, or of a .tiktoken, .model or .gguf file.{nearest(str(self.kind), KINDS)}"
        )

    def _check_special_tokens(self) -> None:
        for number, name in enumerate(self.special_tokens):
            reason = (
                "is not text"
                if not isinstance(name, str)
                else "is blank"
                if not name.strip()
                else "stands there twice"
                if name in self.special_tokens[:number]
                else "is a control token already"
                if name in (PAD, EOS) and self.kind in KINDS
                else "is a word, which text may spell; give it a name of several parts, such as <|user|>"
                if len(_WORDS.pre_tokenize_str(name)) == 1
                else ""
            )
            if reason:
                raise ConfigError(
                    f"data.special_tokens=[{', '.join(map(str, self.special_tokens))}]: {name!r} {reason}."
                )

    def vocab_size(self) -> int:
        """Returns the number of ids that a model must provide for; every id is below it."""
        if self.kind == "bpe":
            return self.size
        return BYTES_VOCAB + len(self.special_tokens) if self.kind == "bytes" else self.read().vocab_size

    def identity(self) -> dict[str, object]:
        """Returns what distinguishes this tokenizer from others: kind, size and options, or the hash of its file."""
        if self.kind in KINDS:
            options: dict[str, object] = {
                "special_tokens": list(self.special_tokens),
                "normalization": self.normalization,
            }
            if self.kind == "bpe" and self.sample_bytes != SAMPLE_BYTES:
                options["sample_bytes"] = self.sample_bytes
            # Without the options that are not used, as before there were any, so that prepared data are found.
            return {"kind": self.kind, "size": self.vocab_size(), **{k: v for k, v in options.items() if v}}
        # "whole": folders that were made while truncation and padding were obeyed must not be found.
        identity: dict[str, object] = {"kind": "file", "sha256": sha256_file(self._file()), "whole": True}
        tokenizer = self.read()
        if tokenizer.has_chosen_end:
            identity["end"] = tokenizer.eos_id
        if tokenizer.adds_space:
            # Of such a tokenizer earlier folders hold a second space before each answer.
            identity["answers"] = "follow"
        return identity

    def make(self, texts: Callable[[], Iterable[str]], *, bounded: bool = False) -> Tokenizer:
        """Makes the tokenizer from `texts`; one that may change texts is tried on the first of them.

        Args:
            texts: returns all texts, at each call from the first on.
            bounded: whether a `bpe` learns from `sample_bytes` of them at most, else from all.
        """
        if self.kind == "bpe":
            chosen = sampled(texts(), self.sample_bytes) if bounded else texts()
            tokenizer = train_bpe(chosen, self.size, self.special_tokens, self.normalization)
        elif self.kind == "bytes":
            tokenizer = bytes_tokenizer(self.special_tokens, self.normalization)
        else:
            tokenizer = self.read()
        if self.kind not in KINDS or self.normalization is not None:
            self._warn_of_changes(tokenizer, texts())
        return tokenizer

    def _warn_of_changes(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        change = find_change(tokenizer, (text[:TRIED_CHARACTERS] for text in islice(texts, TRIED_TEXTS)))
        if change:
            normalization = "" if self.normalization is None else f" with data.normalization={self.normalization}"
            log.warning(
                "data.tokenizer=%s%s changes the text: %s; training sees the text so changed.",
                self.kind,
                normalization,
                change,
            )

    def _file(self) -> Path:
        path = expanded(self.kind)
        return tokenizer_json(path, self.cache_dir, "data.tokenizer=", self.pattern, self.special_tokens)

    def read(self) -> Tokenizer:
        """Returns the tokenizer of a file.

        Raises:
            DataError: it cannot be read.
            ConfigError: it lacks what the other keys ask for.
        """
        tokenizer = Tokenizer.load(self._file(), "data.tokenizer=", f"data.tokenizer={self.kind}")
        self._check_file(json.loads(tokenizer.to_json()))
        return tokenizer

    def _check_file(self, described: Mapping[str, Any]) -> None:
        """Refuses options that the content of a `tokenizer.json` does not have, since it is used as it is."""
        known = {token["content"] for token in described["added_tokens"] if token["special"]}
        unknown = [name for name in self.special_tokens if name not in known]
        if unknown:
            raise ConfigError(
                f"data.special_tokens: {', '.join(unknown)} is no control token of data.tokenizer={self.kind}, to "
                "which none are added; leave it out, or add it to the file."
            )
        expected = byte_level_normalizer(self.normalization)
        if expected is not None and described["normalizer"] != expected:
            raise ConfigError(
                f"data.normalization={self.normalization} is for data.tokenizer=bpe and bytes; "
                f"data.tokenizer={self.kind} normalises texts as its file says: set data.normalization=null."
            )
        pattern = self.pattern
        if pattern is not None and '"pattern"' not in json.dumps(described["pre_tokenizer"]):
            raise ConfigError(
                f"data.tokenizer_pattern={pattern!r} is for .tiktoken files; data.tokenizer={self.kind} has none: "
                "leave it out."
            )


def byte_level_normalizer(normalization: str | None) -> Any:
    """Returns the normalizer of a `tokenizer.json` that `data.normalization` makes, or None."""
    return json.loads(byte_level(models.BPE(), normalization).to_str())["normalizer"]


def find_change(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """Returns the first of `texts` that does not come back from its ids, as `'before' becomes 'after'`, or ""."""
    for text in texts:
        # Spaces at the ends are left out: decoders of word pieces drop them, and add them again between texts.
        before, after = text.strip(), tokenizer.decode(tokenizer.encode(text)).strip()
        if before != after:
            pairs = zip(before, after, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
            begin = max(0, place - 10)
            return f"{before[begin : place + 20]!r} becomes {after[begin : place + 20]!r}"
    return ""
