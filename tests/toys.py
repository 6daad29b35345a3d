"""Toy plugins and tiny models that several tests build on; importable by `_target_`, as a user's own file is."""

from __future__ import annotations

import copy
import functools
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import Tensor, nn

from pkm_lightning.ffn import Dense, FFNContext, FFNOutput, MemoryPlus
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer

VOCAB = 50  # 49 letters of `Letters` and the end of text
DIM = 16


class Constant(nn.Module):
    """A plugin that adds `value` to every hidden state, without arguments from the builder and optional members."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(self.value.expand_as(x_BTD))


class Reporter(nn.Module):
    """A linear plugin that reports an auxiliary loss, statistics of the step and what it read."""

    def __init__(self, *, dim: int, aux_weight: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.aux_weight = aux_weight
        self.forwards = 0
        self.steps: list[dict[str, float]] = []
        self.means: list[float] = []

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        self.forwards += 1
        y_BTD = self.dropout(self.linear(x_BTD))
        mean = y_BTD.detach().mean()
        self.means.append(float(mean) if not mean.is_meta else 0.0)
        return FFNOutput(
            y_BTD,
            aux_losses={"toy": self.aux_weight * y_BTD.square().mean()},
            trace={"tokens": context.input_ids_BT} if context.observe else {},
            step_stats={"tokens": torch.tensor(context.input_ids_BT.numel()), "ids": context.input_ids_BT.sum()},
            metrics={"toy_mean": mean},
        )

    def after_step(self, stats: dict[str, Tensor]) -> None:
        self.steps.append({name: value.item() for name, value in stats.items()})


class Letters:
    """A tokenizer of single characters; id 0 ends a text."""

    eos_id = 0
    alphabet = " abcdefghijklmnopqrstuvwxyz0123456789.,?!-'ABCDEF"

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) + 1 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i - 1] for i in ids if i)


def dense(n_layers: int = 1, hidden_dim: int = 20) -> Dense:
    return Dense(dim=DIM, n_layers=n_layers, hidden_dim=hidden_dim)


def memory_plus(table: ValueTable, **changes: Any) -> MemoryPlus:
    """Builds a small Memory+ layer for a table of 49 rows."""
    sizes = {"dim": DIM, "n_keys": 7, "heads": 2, "knn": 3, "key_dim": 6, "value_dim": table.weight.shape[1]}
    return MemoryPlus(table=table, qk_norm=True, **{**sizes, **changes})


def memory_ffns() -> tuple[list[nn.Module], list[ValueTable]]:
    """Returns a dense layer and two Memory+ layers, and the table that these share."""
    table = ValueTable(rows=49, dim=10)
    return [dense(3), memory_plus(table), memory_plus(table)], [table]


def transformer(ffns: Sequence[nn.Module], tables: Iterable[ValueTable] = (), **changes: Any) -> Transformer:
    """Builds a transformer around `ffns` with grouped-query attention, initialised from seed 0."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": DIM,
        "n_heads": 4,
        "n_kv_heads": 2,
        "rope_theta": 100.0,
        "norm_eps": 1e-5,
        "tied": False,
        "document_mask": True,
        "reset_positions": True,
        "activation_checkpointing": False,
    }
    model = Transformer(ffns=ffns, tables=tables, **{**settings, **changes})
    model.init_weights(0)
    return model


def token_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def config(*overrides: str) -> dict[str, Any]:
    """Composes the package's configuration into plain values, with three layers and a fixed vocabulary size."""
    named = {override.split("=")[0] for override in overrides}
    fixed = [] if "model.vocab_size" in named else ["model.vocab_size=50"]
    if not named & {"model", "model.n_layers"}:
        fixed.append("model.n_layers=3")
    return copy.deepcopy(_composed((*fixed, *overrides)))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_module("pkm_lightning.configs", version_base=None):
        composed = compose("config", overrides=list(overrides))
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return resolved  # type: ignore[return-value]


class InterruptOnce(L.Callback):
    """A callback that sends SIGINT in the 7th step, if a file named `interrupt` lies in the working directory."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        flag = Path("interrupt")
        if trainer.global_step == 7 and flag.exists():
            flag.unlink()
            os.kill(os.getpid(), signal.SIGINT)
