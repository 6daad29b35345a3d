"""Checkpoints of small models with a tokenizer beside them, and the folders that are exported from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ffn.drawn_weights import draw
from torch import Tensor
from toys import config

from pkm_lightning.build.model import build_model
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.huggingface.export import write_folder
from pkm_lightning.model import Transformer

VOCAB = 260  # that of the bytes, and two ids that no text has
SIZES = (
    *("model.n_layers=2", "model.dim=16", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=20"),
    *(f"model.vocab_size={VOCAB}", "model.memory={n_keys: 6, heads: 3, knn: 5, key_dim: 10}", "data.seq_len=32"),
)


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def save(folder: Path, *overrides: str, changes: Mapping[str, Any] | None = None) -> Transformer:
    """Writes `model.ckpt` and the tokenizer of the bytes into `folder`; returns the model in evaluation mode."""
    settings = config(*SIZES, *overrides)
    settings["ffn"] |= changes or {}
    model = build_model(settings)
    draw(model)
    with torch.no_grad():
        model.train()(ids(8))  # for running statistics other than at the start
    tokenizer = bytes_tokenizer()
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"config": settings},
        "tokens_seen": 123,
        "tokenizer": tokenizer.digest,
    }
    torch.save(content, folder / "model.ckpt")
    tokenizer.save(folder / "tokenizer.json")
    return model.eval()


def export(folder: Path, *overrides: str, changes: Mapping[str, Any] | None = None) -> tuple[Transformer, Path]:
    """Returns a model and the folder that it is exported to."""
    model = save(folder, *overrides, changes=changes)
    write_folder(open_checkpoint(folder / "model.ckpt"), folder / "hf")
    return model, folder / "hf"


def logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model.unembed(model(ids_BT).hidden_BTD)
