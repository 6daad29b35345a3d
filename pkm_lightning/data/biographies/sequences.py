"""Biographies as token sequences, written when they are read: each exposure has sentences and wordings in a new order.

A sequence is one biography: the end token, from which the name is predicted, the name, and per attribute a phrase and
the value. All have one length, so that a batch holds no padding and attention needs no mask.

Letters: N people, K attributes, V words per value; P biographies in a batch, L tokens of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.data.batch import filler, to_batch
from pkm_lightning.data.biographies.people import NAME_WORDS
from pkm_lightning.data.biographies.wording import WORDINGS, first_ids
from pkm_lightning.data.order import epoch_generator
from pkm_lightning.data.permutation import mixed_bits

#: Of the Weyl sequence in SplitMix64: odd, so that its multiples modulo 2**64 differ.
_STEP = 0x9E3779B97F4A7C15


class ExposureOrder:
    """People in random order, all of them before anyone again; a section is one exposure of each.

    The key of person i in section e is e * people + i.

    Args:
        people: N.
        exposures: sections that count as one reading of the data; there is no last one.
        seed: together with the section it decides the order.
    """

    def __init__(self, people: int, exposures: int, seed: int) -> None:
        self.sections = exposures
        self._people, self._seed = people, seed

    def size(self, section: int) -> int:
        """Returns the number of people."""
        return self._people

    def keys(self, section: int) -> list[int]:
        """Returns the keys of this section in training order."""
        order: np.ndarray = epoch_generator(self._seed, section).permutation(self._people)
        keys: list[int] = (order + section * self._people).tolist()
        return keys


class BiographySequences:
    """Source of biographies; a key decides the person, the sentences and their wordings.

    Args:
        folder: with names.npy (N, 3) and values.npy (N, K, V), numbers of words.
        words: in the vocabulary of names and values.
        end_id: the token before and after a biography.
        seed: together with the key it decides the order of the sentences and their wordings.
        loss: `all` tokens, `facts` (names, values and the end token), or `measured` (names and values alone).
    """

    def __init__(self, folder: Path, *, words: int, end_id: int, seed: int, loss: str) -> None:
        self._args = {"folder": folder, "words": words, "end_id": end_id, "seed": seed, "loss": loss}
        self._names: np.ndarray = np.load(folder / "names.npy")
        self._values: np.ndarray = np.load(folder / "values.npy")
        self._first_word, self._first_phrase = first_ids(words)
        self._end_id, self._loss = end_id, loss
        self._offset = np.uint64((seed + 1) * _STEP % 2**64)

    def __getstate__(self) -> dict[str, object]:
        # A worker started by spawn opens the files instead of receiving a copy of their content.
        return self._args

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __getitems__(self, keys: list[int]) -> Batch:
        """Returns a biography per key; those with a loss on all tokens, which training reads, need no document ids."""
        _, n_attributes, value_words = self._values.shape
        if not keys:
            return filler(sequence_length(n_attributes, value_words), self._end_id)
        tokens_PL = self.tokens(np.asarray(keys))
        input_PT, labels_PT = tokens_PL[:, :-1].copy(), tokens_PL[:, 1:].copy()
        if self._loss != "all":
            labels_PT[:, NAME_WORDS : labels_PT.shape[1] - 1 : 1 + value_words] = NO_TARGET
        if self._loss != "measured":
            return {"input_ids": torch.from_numpy(input_PT), "labels": torch.from_numpy(labels_PT)}
        labels_PT[:, -1] = NO_TARGET
        return to_batch(input_PT, labels_PT, np.zeros_like(input_PT))

    def tokens(self, keys_P: np.ndarray) -> np.ndarray:
        """Returns the tokens of biographies, both end tokens included, (P, L) int64."""
        n_people, n_attributes, value_words = self._values.shape
        person_P, n = keys_P % n_people, len(keys_P)
        order_PK, wording_PK = self._drawn(keys_P, n_attributes)
        sentences_PKS = np.empty((n, n_attributes, 1 + value_words), dtype=np.int64)
        sentences_PKS[:, :, 0] = self._first_phrase + WORDINGS * order_PK + wording_PK
        sentences_PKS[:, :, 1:] = self._first_word + self._values[person_P[:, None], order_PK]
        end_P1 = np.full((n, 1), self._end_id)
        parts = (end_P1, self._first_word + self._names[person_P], sentences_PKS.reshape(n, -1), end_P1)
        return np.concatenate(parts, axis=1, dtype=np.int64)

    def _drawn(self, keys_P: np.ndarray, n_attributes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the attributes and the wording of each sentence, both (P, K)."""
        # Two random numbers per sentence, a function of the key alone: it does not matter which rank writes it.
        place_PJ = keys_P[:, None] * (2 * n_attributes) + np.arange(2 * n_attributes)
        bits_PJ = mixed_bits(mixed_bits(place_PJ.astype(np.uint64)) + self._offset)
        order_PK = np.argsort(bits_PJ[:, :n_attributes], axis=1)
        return order_PK, (bits_PJ[:, n_attributes:] % np.uint64(WORDINGS)).astype(np.int64)


def sequence_length(attributes: int, value_words: int) -> int:
    """Returns the input tokens of a biography: the end token, the name, and a phrase and a value per attribute."""
    return 1 + NAME_WORDS + attributes * (1 + value_words)
