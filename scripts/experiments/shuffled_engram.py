"""The control of an n-gram table: each token reads the rows of another token of the batch, drawn anew in every forward.

Rows are read as often as with Engram and learn from as many gradients, but say nothing about the token that reads them.
What remains of the gain is that of the layer, not of the memory.

    cd scripts/experiments
    python -m pkm_lightning fit ffn=engram ffn._target_=shuffled_engram.ShuffledEngram
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ffn import Engram, FFNContext

if TYPE_CHECKING:
    from torch import Tensor


class ShuffledEngram(Engram):
    """Engram whose reads are permuted over the tokens of a batch, in training and at evaluation."""

    uses_past = False

    def _ids(self, context: FFNContext) -> Tensor:
        ids_BTK = super()._ids(context)
        ids_TK = ids_BTK.flatten(0, 1)
        return ids_TK[torch.randperm(len(ids_TK), device=ids_TK.device)].view_as(ids_BTK)
