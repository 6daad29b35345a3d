"""Byte-level tokenizers: any text is representable, and no token crosses a boundary between words.

Hence tokens(prompt) + tokens(" answer") are the tokens of the whole, on which the scoring of answers relies.
Text never becomes a control token: a literal "<eos>" in it is encoded as ordinary text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from pkm_lightning.data.cache import sha256_file
from pkm_lightning.errors import ConfigError, DataError, nearest

__all__ = ["Tokenizer"]

PAD, EOS = "<pad>", "<eos>"
BYTES_VOCAB = 258
# Names of control tokens in the vocabularies of common models, the preferred ones first.
END_NAMES = (EOS, "<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PAD_NAMES = (PAD, "<|pad|>", "[PAD]")


class Tokenizer:
    """A byte-level encoding of text as ids.

    Attributes:
        pad_id: the id at padded positions.
        eos_id: the id that ends a document.
    """

    def __init__(self, backend: Backend, source: str) -> None:
        end_ids = _known_ids(backend, END_NAMES)
        if not end_ids:
            raise DataError(f"{source} has no end token; add one of: {', '.join(END_NAMES)}.")
        pad_ids = _known_ids(backend, PAD_NAMES)
        # Else `<eos>` in a text would end a document.
        backend.encode_special_tokens = True
        self._backend = backend
        self.eos_id: int = end_ids[0]
        self.pad_id: int = (pad_ids or end_ids)[0]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides how text becomes ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without an end token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of several texts, computed in parallel where the machine allows."""
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without pad and end tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json`."""
        path.write_text(self._backend.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`, ours or any of the `tokenizers` library.

        Raises:
            DataError: if the file is missing, unreadable, or has no end token.
        """
        if not path.is_file():
            raise DataError(f"data.tokenizer={path} does not exist; set bpe, bytes or the path of a tokenizer.json.")
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            reason = str(error).splitlines()[0]
            raise DataError(
                f"data.tokenizer={path} cannot be read ({reason}); set the path of a tokenizer.json."
            ) from error
        return cls(backend, str(path))

    # The library's own pickling loses `encode_special_tokens`.
    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return _from_json, (self._backend.to_str(),)


def _known_ids(backend: Backend, names: Iterable[str]) -> list[int]:
    ids = (backend.token_to_id(name) for name in names)
    return [i for i in ids if i is not None]


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(Backend.from_str(text), "the tokenizer")


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    # No space is added before a text: an answer brings its own, and a document may begin without one.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def bytes_tokenizer() -> Tokenizer:
    """Returns a tokenizer with one token per byte: ids 0 `<pad>`, 1 `<eos>`, 2 to 257 the bytes."""
    # Sorted, since the library returns the alphabet in an order that changes from call to call.
    vocab = {token: i for i, token in enumerate([PAD, EOS, *_alphabet()])}
    backend = _byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([PAD, EOS])
    return Tokenizer(backend, "the byte tokenizer")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on `texts`; equal texts in equal order give an equal tokenizer."""
    backend = _byte_level(models.BPE())
    # The alphabet holds all 256 bytes, also those that do not occur in `texts`: any other text must be representable.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=_alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(backend, "the trained tokenizer")


@dataclass(frozen=True)
class TokenizerChoice:
    """The keys `data.tokenizer` and `data.vocab_size`.

    Args:
        kind: `bpe`, `bytes`, or the path of a `tokenizer.json`.
        size: tokens of a `bpe` vocabulary, at least 258; the other kinds have their own size.

    Raises:
        ConfigError: for an unknown kind or a vocabulary below the 256 bytes and 2 control tokens.
        DataError: for a tokenizer file that cannot be read.
    """

    kind: str
    size: int

    def __post_init__(self) -> None:
        if self.kind == "bpe" and self.size < BYTES_VOCAB:
            raise ConfigError(
                f"data.vocab_size={self.size} is too small for data.tokenizer=bpe; 256 bytes and 2 control tokens need "
                f"{BYTES_VOCAB} or more."
            )
        if self.kind not in ("bpe", "bytes") and not self.kind.endswith(".json"):
            raise ConfigError(
                f"data.tokenizer={self.kind!r} is not known; allowed: bpe, bytes, or the path of a tokenizer.json."
                f"{nearest(self.kind, ['bpe', 'bytes'])}"
            )

    def vocab_size(self) -> int:
        """Returns the number of ids that a model must provide for; every id is below it."""
        if self.kind == "bpe":
            return self.size
        return BYTES_VOCAB if self.kind == "bytes" else self._from_file().vocab_size

    def identity(self) -> dict[str, object]:
        """Returns what distinguishes this tokenizer from others: kind and size, or the hash of its file."""
        if self.kind in ("bpe", "bytes"):
            return {"kind": self.kind, "size": self.vocab_size()}
        return {"kind": "file", "sha256": sha256_file(Path(self.kind).expanduser())}

    def make(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Makes the tokenizer; `texts` is called only if there is something to learn."""
        if self.kind == "bpe":
            return train_bpe(texts(), self.size)
        return bytes_tokenizer() if self.kind == "bytes" else self._from_file()

    def _from_file(self) -> Tokenizer:
        return Tokenizer.load(Path(self.kind).expanduser())
