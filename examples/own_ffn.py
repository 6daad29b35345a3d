"""An FFN of your own with a value table: every token reads the row that its own id names.

    python examples/own_ffn.py               # a minute or two on a laptop's CPU
    python -m pkm_lightning info ffn=custom ffn._target_=own_ffn.TokenTable +ffn.rows=2048   # in this folder

Letters: B sequences, T tokens (M = B * T of them), D model dimension.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from train_from_python import train

from pkm_lightning.ffn import FFNContext, FFNOutput, TableSpec
from pkm_lightning.memory import TableReference, ValueTable


class TokenTable(nn.Module):
    """Computes `W2 (table[token id] * silu(W1 x))`.

    Args:
        dim: model dimension, from the builder.
        table: the value table that `table_spec` requests, from the builder; the model owns it.
        rows: rows of the table, at least one per token of the vocabulary.
    """

    def __init__(self, *, dim: int, table: ValueTable, rows: int) -> None:
        super().__init__()
        self.memory = TableReference(table)  # registered here until a model takes it over
        self.gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    @classmethod
    def table_spec(cls, *, dim: int, rows: int, **_: Any) -> TableSpec:
        """Returns the shape of the table; the builder asks before it constructs a layer."""
        return TableSpec(rows=rows, dim=dim)

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """Reads one row per token with weight 1; `table.learning=rows` updates the rows that were read."""
        ids_M1 = context.input_ids_BT.reshape(-1, 1)
        read_BTD = self.memory.table(ids_M1, torch.ones_like(ids_M1, dtype=x_BTD.dtype)).view_as(x_BTD)
        return FFNOutput(self.out(read_BTD * nn.functional.silu(self.gate(x_BTD))))


if __name__ == "__main__":
    overrides = ["ffn=custom", "ffn._target_=own_ffn.TokenTable", "+ffn.rows=2048", *sys.argv[1:]]
    for prompt, answer in train(overrides).items():
        print(f"{prompt} -> {answer}")
