"""Sequences of a text file, in the tokens of a model, whose reads are a background.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from pkm_lightning.data.base import TextCodec
from pkm_lightning.data.readers.text import TextReader
from pkm_lightning.errors import DataError

#: Sequences per forward: the background counts them one by one.
_PER_BATCH = 8
_ENDINGS = (".txt", ".txt.gz", ".txt.zst", ".md")


def text_reader(path: str, key: str) -> TextReader:
    """Returns a reader of a text file, a folder of .txt files, or a glob.

    Raises:
        DataError: there is no such file, or no text in it.
    """
    reader = TextReader(path, endings=_ENDINGS, document_separator=1, key=key)
    if next(reader.pieces(), None) is None:
        raise DataError(f"{key}={path} holds no text; give a file with some.")
    return reader


def text_sequences(reader: TextReader, tokenizer: TextCodec, seq_len: int, most: int) -> list[list[int]]:
    """Returns the first `most` sequences of `seq_len` tokens of documents that end with the end token.

    A last, shorter sequence is left out, unless it is the only one.

    Raises:
        DataError: a file cannot be read.
    """
    ids = _ids(reader, tokenizer)
    sequences: list[list[int]] = []
    while len(sequences) < most and (sequence := list(itertools.islice(ids, seq_len))):
        if len(sequence) == seq_len or not sequences:
            sequences.append(sequence)
    return sequences


def _ids(reader: TextReader, tokenizer: TextCodec) -> Iterator[int]:
    for piece in reader.pieces():
        for segment in piece.segments:
            yield from tokenizer.encode(segment.text)
        if piece.ends:
            yield tokenizer.eos_id


def share_of_rank(sequences: list[list[int]], rank: int, world: int) -> list[Tensor]:
    """Returns this rank's sequences as batches (B, T) of ids, as many on every rank; what is left over is not used."""
    own = sequences[: len(sequences) // world * world][rank::world]
    return [torch.tensor(own[start : start + _PER_BATCH]) for start in range(0, len(own), _PER_BATCH)]
