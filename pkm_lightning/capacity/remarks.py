"""What can be run but hardly be meant: a batch that does not suit the size of the model or the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pkm_lightning.data.order import micro_batch_size
from pkm_lightning.errors import PkmError

if TYPE_CHECKING:
    from pkm_lightning.capacity.setting import Setting
    from pkm_lightning.model import ModelCost

#: Tokens per parameter at which compute is spent best (Hoffmann et al. 2022, arXiv 2203.15556).
_TOKENS_PER_PARAMETER = 20
#: More optimizer steps than known pretraining runs take.
_MANY_STEPS = 1_000_000


def batch_remarks(cost: ModelCost, setting: Setting, data: Mapping[str, Any]) -> list[str]:
    """Returns sentences on `data.global_batch_size` and `data.seq_len`; none where they are unknown."""
    rows, length = data.get("global_batch_size"), setting.length
    if not isinstance(rows, int) or length is None:
        return []
    remarks = []
    try:
        micro_batch_size(rows, setting.world, setting.accumulate)
    except PkmError as error:
        remarks.append(f"fit would refuse this batch: {error}")
    steps = _TOKENS_PER_PARAMETER * cost.params_active // (rows * length)
    if steps > _MANY_STEPS:
        remarks.append(
            f"{rows * length:,} tokens per step (data.global_batch_size={rows} x data.seq_len={length}) are few for "
            f"this model: {_TOKENS_PER_PARAMETER} tokens per active parameter would take {steps:,} steps"
        )
    return remarks
