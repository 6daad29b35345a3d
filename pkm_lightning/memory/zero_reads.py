"""Reads of value tables as if every row were zero: what a model knows without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pkm_lightning.memory.value_table import ValueTable


@contextlib.contextmanager
def zero_reads(tables: Iterable[ValueTable]) -> Iterator[None]:
    """Makes every read of `tables` return zeros within the block, whatever ends it; rows are not copied or changed.

    A read is made as always, with its exchanges between ranks, so that ranks may enter and leave at different times.
    """
    changed = [table for table in tables if not table.reads_zeros]
    for table in changed:
        table.reads_zeros = True
    try:
        # Compiled blocks would be compiled once more for the sake of a few forwards.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for table in changed:
            table.reads_zeros = False
