"""gathered_rows by ATen's embedding.

Letters: L reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.row_gradients.eager import table_gradient

__all__ = ["gather", "table_gradient"]


def gather(table_NV: Tensor, ids_L: Tensor) -> Tensor:
    """Returns the rows `ids`, (L, V)."""
    return torch.nn.functional.embedding(ids_L, table_NV)
