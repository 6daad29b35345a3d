"""Writes facts into a model: deltas of a few rows of its value tables are learned, and nothing else moves.

    minimise  -ln p(answer | prompt) per answer token  +  c * KL(before || now) per token of other text

over the prompts of all facts. c rises while the divergence on further text, which the penalty never sees, is above its
bound, and falls while it is below. The learning ends when each prompt is answered right by a margin within the bound,
or at its limit of steps or seconds; the best deltas are scaled down to the bound if need be.

Letters: U lines with a delta, V values per line.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkm_lightning.adaptation.fact_sequences import (
    FactSequence,
    answer_nll,
    batches,
    fact_sequences,
    margins,
    padded,
)
from pkm_lightning.adaptation.facts_file import Fact, check_lengths
from pkm_lightning.adaptation.other_text import OtherText
from pkm_lightning.adaptation.row_choice import ReadFrequencies, SlotReads, choose_slots, lines_of
from pkm_lightning.data.base import NO_TARGET, Batch, TextCodec
from pkm_lightning.errors import ConfigError, check_flag, check_integer, check_range
from pkm_lightning.memory import QuantizedTable, ValueTable
from pkm_lightning.memory.delta_reads import deltas_added
from pkm_lightning.memory.row_deltas import RowDeltas

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk
