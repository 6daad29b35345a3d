"""`data=text data.path=...`: any UTF-8 text as training data, cut into windows of `seq_len` tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pkm_lightning.data.cache import CacheKey, Source, sha256_file
from pkm_lightning.data.datamodule import Splits, TokenDataModule
from pkm_lightning.data.files import file_identities, find_files, read_documents
from pkm_lightning.data.order import ShuffledOrder
from pkm_lightning.data.tokenizer import Tokenizer, TokenizerChoice
from pkm_lightning.data.windows import WindowRows, chunks, write_tokens
from pkm_lightning.errors import DataError, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pkm_lightning.data.datamodule import LoaderOptions

SUFFIXES = (".txt", ".md")
ENOUGH_DOCUMENTS = 10


class TextDataModule(TokenDataModule):
    """Windows over the concatenated documents of text files.

    Validation holds whole documents where there are 10 or more, else the end of the text.

    Args:
        path: a file, a directory (*.txt, *.md at any depth), a glob, or a list of them.
        document_separator: so many blank lines or more end a document; None makes each file one document.
        val_fraction: part of the documents (or of the text) that validation gets, 0.001 to 0.5.
        seed: decides which documents.
        tokenizer: `bpe`, `bytes`, or the path of a `tokenizer.json`.
        vocab_size: of a `bpe` tokenizer, 258 or more.
        loader: see `LoaderOptions`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for text that is missing, empty, not UTF-8 or too short.
    """

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        document_separator: int | None,
        val_fraction: float,
        seed: int,
        tokenizer: str,
        vocab_size: int,
        **loader: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**loader)
        check_range("data.val_fraction", val_fraction, low=0.001, high=0.5)
        check_range("data.seed", seed, low=0)
        if document_separator is not None:
            check_range("data.document_separator", document_separator, low=1)
        self.path = path if isinstance(path, str) else tuple(path)
        self.document_separator = document_separator
        self.val_fraction = val_fraction
        self.seed = seed
        self._tokenizer_choice = TokenizerChoice(tokenizer, vocab_size)

    @property
    def vocab_size(self) -> int:
        """The configured vocabulary; every id is below it."""
        return self._tokenizer_choice.vocab_size()

    def cache_key(self) -> CacheKey:
        """The files as they are now, how they are split, and the tokenizer."""
        arguments = {
            "files": file_identities(self._files()),
            "document_separator": self.document_separator,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "tokenizer": self._tokenizer_choice.identity(),
        }
        return CacheKey("text", arguments)

    def build(self, folder: Path) -> list[Source]:
        """Split, learn the tokenizer from the training part, and tokenise both parts."""
        files = self._files()
        train, validation = self._parts(files)
        tokenizer = self._tokenizer_choice.make(lambda: (piece for text in train() for piece in chunks(text)))
        tokenizer.save(folder / "tokenizer.json")
        write_tokens(folder / "train.bin", train(), tokenizer)
        write_tokens(folder / "validation.bin", validation(), tokenizer)
        return [Source(str(self.path), files={str(file): sha256_file(file) for file in files})]

    def load(self, folder: Path) -> Splits:
        """Open both parts; refuses a part that holds less than one row."""
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        train = WindowRows(folder / "train.bin", tokenizer, self.seq_len)
        validation = WindowRows(folder / "validation.bin", tokenizer, self.seq_len)
        for part, rows, remedy in (
            ("training", train, "lower data.seq_len or add text"),
            ("validation", validation, "raise data.val_fraction, lower data.seq_len or add text"),
        ):
            if len(rows) == 0:
                raise DataError(
                    f"data.path={self.path}: the {part} part has {rows.n_tokens} tokens, a row of "
                    f"data.seq_len={self.seq_len} needs {self.seq_len + 1}; {remedy}."
                )
        return Splits(
            tokenizer=tokenizer,
            train=train,
            order=ShuffledOrder(len(train), self.order_seed),
            validation=validation,
            validation_keys=range(len(validation)),
        )

    def _files(self) -> list[Path]:
        return find_files(self.path, SUFFIXES)

    def _documents(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            yield from read_documents(file, self.document_separator)

    def _parts(self, files: list[Path]) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
        """Two functions that read the training and the validation documents anew, so that memory holds one file."""
        lengths = np.asarray([len(document) for document in self._documents(files)])
        if len(lengths) == 0:
            raise DataError(f"data.path={self.path}: all {len(files)} files are empty; give files with text.")
        if len(lengths) >= ENOUGH_DOCUMENTS:
            n_validation = max(1, round(len(lengths) * self.val_fraction))
            chosen = set(np.random.default_rng(self.seed).permutation(len(lengths))[:n_validation].tolist())

            def whole(validation: bool) -> Iterator[str]:
                return (text for i, text in enumerate(self._documents(files)) if (i in chosen) == validation)

            return lambda: whole(False), lambda: whole(True)
        cut = round(int(lengths.sum()) * (1 - self.val_fraction))
        return lambda: head(self._documents(files), cut), lambda: tail(self._documents(files), cut)


def head(documents: Iterator[str], cut: int) -> Iterator[str]:
    """The text before character `cut`, moved on to the end of the word."""
    for document in documents:
        if cut <= 0:
            return
        yield document[: _word_end(document, cut)]
        cut -= len(document)


def tail(documents: Iterator[str], cut: int) -> Iterator[str]:
    """The text that `head` leaves."""
    for document in documents:
        rest = document if cut <= 0 else document[_word_end(document, cut) :]
        if rest.strip():
            yield rest
        cut -= len(document)


def _word_end(document: str, cut: int) -> int:
    while cut < len(document) and not document[cut].isspace():
        cut += 1
    return cut
