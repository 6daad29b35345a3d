"""Settings and micro-batches of a small model whose rows follow from tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training import fits

N, V = 300, 8


def settings(path: Path | None = None, **table: Any) -> dict[str, Any]:
    made = fits.settings("ffn=dense", "placement=before", lr=0.05)
    made["ffn"] = {"_target_": "stored_files.TokenRows", "rows": N, "row_dim": V}
    made["table"].update(table)
    if path is not None:
        made["table"].update(trainable=False, path=str(path))
    return made


def batches() -> list[fits.Batch]:
    torch.manual_seed(3)
    return [fits.rows(2) for _ in range(6)]
