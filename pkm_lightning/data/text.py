"""`data=text data.path=...`: UTF-8 text as training data, cut into windows of `seq_len` tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.chunks import MAX_WORD_CHARACTERS, chunks
from pkm_lightning.data.corpus import CorpusDataModule
from pkm_lightning.data.datamodule import Splits, TokenOptions
from pkm_lightning.data.files import file_identities
from pkm_lightning.data.order import ShuffledOrder
from pkm_lightning.data.readers.decoding import text_blocks
from pkm_lightning.data.readers.text import split_documents
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.data.windows import Windows, write_tokens
from pkm_lightning.errors import DataError, check_range

__all__ = ["TextDataModule"]

ENOUGH_DOCUMENTS = 10


class TextDataModule(CorpusDataModule):
    """Windows over the concatenated documents of text files.

    Validation holds whole documents where there are 10 or more, else the end of the text.

    Args:
        path: a file, a directory (*.txt, *.md at any depth), a glob, or a list of them.
        document_separator: blank lines (or more) that end a document; None makes each file one document.
        val_fraction: share of the documents (or of the text) that is held out for validation, 0.001 to 0.5.
        seed: decides which documents are held out.
        options: see `TokenOptions`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for text that is missing, empty, not UTF-8 or too short.
    """

    suffixes = (".txt", ".md")

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        document_separator: int | None,
        val_fraction: float,
        seed: int,
        **options: Unpack[TokenOptions],
    ) -> None:
        super().__init__(path=path, val_fraction=val_fraction, seed=seed, **options)
        if document_separator is not None:
            check_range("data.document_separator", document_separator, low=1)
        self.document_separator = document_separator

    def cache_key(self) -> CacheKey:
        """Returns the state of the files, how they are split, and the tokenizer."""
        arguments = {
            "files": file_identities(self.files()),
            "document_separator": self.document_separator,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "tokenizer": self.tokenizer_choice.identity(),
        }
        return CacheKey("text", arguments)

    def build(self, folder: Path) -> list[Source]:
        """Splits the text, trains the tokenizer on the training part, and tokenises both parts."""
        train, validation = self._parts(self.files())
        tokenizer = self.tokenizer_choice.make(lambda: (piece for text in train() for piece in chunks(text)))
        tokenizer.save(folder / "tokenizer.json")
        write_tokens(folder / "train.bin", train(), tokenizer)
        write_tokens(folder / "validation.bin", validation(), tokenizer)
        return self.sources()

    def load(self, folder: Path) -> Splits:
        """Opens both parts.

        Raises:
            DataError: a part holds less than one sequence.
        """
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        train = Windows(folder / "train.bin", tokenizer, self.seq_len)
        validation = Windows(folder / "validation.bin", tokenizer, self.seq_len)
        for part, windows, remedy in (
            ("training", train, "lower data.seq_len or add text"),
            ("validation", validation, "raise data.val_fraction, lower data.seq_len or add text"),
        ):
            if len(windows) == 0:
                raise DataError(
                    f"data.path={self.path}: the {part} part has {windows.n_tokens} tokens, a sequence of "
                    f"data.seq_len={self.seq_len} needs {self.seq_len + 1}; {remedy}."
                )
        return Splits(
            tokenizer=tokenizer,
            train=train,
            order=ShuffledOrder(len(train), self.order_seed),
            validation=validation,
            validation_keys=range(len(validation)),
            tokens=(train.n_tokens, validation.n_tokens),
        )

    def _documents(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            document = ""
            for text, ends in split_documents(text_blocks(file), self.document_separator):
                document += text
                if ends:
                    if document.strip():
                        yield document
                    document = ""

    def _parts(self, files: list[Path]) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
        """Returns two functions that read the training and the validation documents from the files.

        Each call reads again, so that memory never holds more than one file.
        """
        # Lengths first: the number of documents decides how they are split.
        lengths = np.asarray([len(document) for document in self._documents(files)])
        if len(lengths) == 0:
            raise DataError(f"data.path={self.path}: all {len(files)} files are empty; set files with text.")
        if len(lengths) >= ENOUGH_DOCUMENTS:
            n_validation = max(1, round(len(lengths) * self.val_fraction))
            self.log_split(len(lengths), "document", f"{n_validation} are")
            held_out = set(np.random.default_rng(self.seed).permutation(len(lengths))[:n_validation].tolist())

            def documents(validation: bool) -> Iterator[str]:
                return (text for i, text in enumerate(self._documents(files)) if (i in held_out) == validation)

            return lambda: documents(False), lambda: documents(True)
        # Too few documents to hold whole ones out: one cut through their concatenation.
        self.log_split(len(lengths), "document", "the end of the text is")
        cut = round(int(lengths.sum()) * (1 - self.val_fraction))
        return lambda: head(self._documents(files), cut), lambda: tail(self._documents(files), cut)


def head(documents: Iterator[str], cut: int) -> Iterator[str]:
    """Yields the text before character `cut`, which is moved on to the end of a word."""
    for document in documents:
        if cut <= 0:
            return
        yield document[: _word_end(document, cut)]
        cut -= len(document)


def tail(documents: Iterator[str], cut: int) -> Iterator[str]:
    """Yields the text that `head` leaves."""
    for document in documents:
        # Cut where `head` cuts: after the word that character `cut` falls into.
        remainder = document if cut <= 0 else document[_word_end(document, cut) :]
        if remainder.strip():
            yield remainder
        cut -= len(document)


def _word_end(document: str, cut: int) -> int:
    """Returns the end of the word that character `cut` falls into, or `cut` itself if no word ends nearby."""
    end = cut
    while end < len(document) and not document[end].isspace():
        end += 1
        if end - cut > MAX_WORD_CHARACTERS:
            return cut
    return end
