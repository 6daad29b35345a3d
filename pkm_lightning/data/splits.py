"""What a prepared data source has: sequences for training, validation and test, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pkm_lightning.data.batch import SequenceSource
from pkm_lightning.data.order import Order
from pkm_lightning.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Splits:
    """The sequences of a prepared data source.

    Attributes:
        tokenizer: the meaning of the ids.
        train: training sequences, and `order` the epochs over them.
        validation: validation sequences, and `validation_keys` all of their keys in a fixed order.
        test: test sequences, and `test_keys` all of their keys; None where there are none of their own.
    """

    tokenizer: Tokenizer
    train: SequenceSource
    order: Order
    validation: SequenceSource
    validation_keys: Sequence[Any]
    test: SequenceSource | None = None
    test_keys: Sequence[Any] = ()
