"""Old data among the training sequences of new ones, against forgetting: a mixture of two sources.

A block is as short as the share allows, 20 sequences for 5%, so that old ones are spread evenly; see `data/mixture.py`.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Protocol

from pkm_lightning.data.mixture import BLOCK, MixedOrder, MixedSequences
from pkm_lightning.data.order import Order
from pkm_lightning.data.splits import Splits
from pkm_lightning.errors import ConfigError, DataError, PkmError


class OldData(Protocol):
    """The source of what is replayed, such as a `TokenDataModule`."""

    @property
    def fingerprint(self) -> str:
        """The hash of the data."""

    def opened(self) -> Splits:
        """Returns the sequences; builds what is missing."""

    def prepared_sources(self) -> list[dict[str, Any]]:
        """Returns the names and licences of what the data were made from."""


class Replay:
    """A share of the training sequences that comes from old data.

    Args:
        data: the old data, of which the training sequences are replayed, in epochs of their own.
        share: of all training sequences, 0.001 to 0.999; rounded to a fraction with a denominator of 1,000 at most.
        key: what names the old data in messages.

    Attributes:
        places: new and old sequences per block.
        new_order: the order of the new data alone, after `mixed_into`.

    Raises:
        ConfigError: a share of less than one sequence in 1,000.
    """

    new_order: Order

    def __init__(self, data: OldData, share: float, key: str) -> None:
        fraction = Fraction(share).limit_denominator(BLOCK)
        old, block = fraction.numerator, fraction.denominator
        if not 0 < old < block:
            raise ConfigError(f"finetune.replay_share={share} must be 0.001 to 0.999; for none, set it to 0.")
        self.data, self.share, self.key, self.places = data, float(fraction), key, [block - old, old]

    def mixed_into(self, splits: Splits, seed: int) -> Splits:
        """Returns the sequences of new data with old ones among those of training; `seed` arranges them.

        Raises:
            PkmError: the old data cannot be read, or are tokens of another tokenizer.
        """
        try:
            old = self.data.opened()
        except PkmError as error:
            raise type(error)(f"{self.key}: {error}") from None
        if old.tokenizer.digest != splits.tokenizer.digest:
            raise DataError(
                f"{self.key} was tokenised by another tokenizer than the new data, so that its ids mean other words; "
                "prepare it again with the data.tokenizer of this run."
            )
        self.new_order = splits.order
        return dataclasses.replace(
            splits,
            train=MixedSequences([splits.train, old.train], splits.tokenizer.pad_id),
            order=MixedOrder([splits.order, old.order], self.places, seed),
        )

    def content(self) -> list[str]:
        """Returns a line about what is replayed."""
        return [f"{self.key}: {100 * self.share:.3g}% of the training sequences"]
