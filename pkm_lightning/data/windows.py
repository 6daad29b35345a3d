"""Running text as sequences: windows of T + 1 tokens side by side over one long array of documents.

Every document ends with the end token, from which a window derives its documents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.data.batch import filler, to_batch, token_dtype
from pkm_lightning.data.heartbeat import Heartbeat
from pkm_lightning.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Windows:
    """Source of sequences over a token file; a key is the number of a window.

    Args:
        path: the file, as `write_tokens` leaves it.
        tokenizer: decides the type of the file and the end and pad ids.
        seq_len: T.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, seq_len: int) -> None:
        self._args = (path, tokenizer, seq_len)
        dtype = token_dtype(tokenizer.vocab_size)
        # An empty file cannot be mapped.
        self._tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
        self._seq_len = seq_len
        self._eos_id = tokenizer.eos_id
        self._pad_id = tokenizer.pad_id

    def __reduce__(self) -> tuple[type[Windows], tuple[Path, Tokenizer, int]]:
        # A worker started by spawn opens the file instead of receiving a copy of its content.
        return Windows, self._args

    @property
    def n_tokens(self) -> int:
        """Tokens in the file."""
        return len(self._tokens)

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._seq_len

    def __getitems__(self, keys: list[int]) -> Batch:
        """Returns whole windows; the end token has no target, since the next document does not follow from it."""
        if not keys:
            return filler(self._seq_len, self._pad_id)
        columns = np.arange(self._seq_len + 1)
        tokens = self._tokens[np.asarray(keys)[:, None] * self._seq_len + columns].astype(np.int64)
        # Copies, since both are views of `tokens`: a NO_TARGET among the labels would change the inputs.
        input_BT, labels_BT = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        is_end_BT = input_BT == self._eos_id
        labels_BT[is_end_BT] = NO_TARGET
        # An end token still belongs to the document that it ends.
        docs_BT = np.cumsum(is_end_BT, axis=1) - is_end_BT
        return to_batch(input_BT, labels_BT, docs_BT)


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Writes the tokens of each document and an end token to `path`, holding a few chunks in memory at a time."""
    dtype = token_dtype(tokenizer.vocab_size)
    heartbeat = Heartbeat()
    written = 0
    with path.open("wb") as file:
        for document in documents:
            for ids in tokenizer.encode_pieces(tokenizer.pieces(document)):
                written += file.write(np.asarray(ids, dtype=dtype).tobytes())
                if heartbeat.is_due():
                    tokens = written / np.dtype(dtype).itemsize
                    log.info("%s: %.1f million tokens in %.0f s.", path.stem, tokens / 1e6, heartbeat.seconds)
            written += file.write(np.asarray([tokenizer.eos_id], dtype=dtype).tobytes())
