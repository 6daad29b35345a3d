"""A training step of a whole model in a plain loop: dense, a mixture in every layer, a memory in one or three layers.

Needs torch only, so that it can be timed where Lightning is not installed. The mixture has about as many parameters as
the model with memories, and one expert per token.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from benchmarks.blocks import LR, Block, memory_on, mixture
from benchmarks.case import Case, Way
from benchmarks.inputs import table, value_table
from benchmarks.steps import MAX_NORM
from pkm_lightning.ffn.dense import Dense
from pkm_lightning.memory import TableOptimizer, clip_tables
from pkm_lightning.model.transformer import Transformer


class Model(NamedTuple):
    """Sizes of a model.

    Args:
        block: its FFNs and memories.
        sequences: sequences per step.
        vocab_size: tokens of the vocabulary.
        layers: number of layers; memories replace FFNs in the middle, or in the middle of each third.
        heads: attention heads.
        experts: experts per layer of the mixture.
    """

    block: Block
    sequences: int
    vocab_size: int
    layers: int
    heads: int
    experts: int

    def __str__(self) -> str:
        return f"{self.block} layers={self.layers} N={self.block.n_keys**2}"


class ModelStep:
    """Training step of a model on fixed tokens, as a callable."""

    def __init__(self, model: Transformer, optimizer: Optimizer, ids_BT: Tensor) -> None:
        self.model, self.optimizer, self.ids_BT = model, optimizer, ids_BT
        self.dense_parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss = torch.empty(())

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        output = self.model(self.ids_BT)
        logits_MW = self.model.unembed(output.hidden_BTD[:, :-1]).flatten(0, 1).float()
        self.loss = functional.cross_entropy(logits_MW, self.ids_BT[:, 1:].flatten())
        torch.stack([self.loss, *output.aux_losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(self.dense_parameters, MAX_NORM)
        if self.model.value_tables:
            clip_tables(self.model.value_tables, [], MAX_NORM)
        self.optimizer.step()

    def error(self) -> float:
        """Returns 0 if the loss of a step is finite: tests check what models compute."""
        self()
        return 0.0 if self.loss.isfinite() else float("inf")


def model_case(sizes: Model, device: torch.device, dtype: torch.dtype) -> Case:
    """Builds the case: all ways train on the same tokens."""
    block = sizes.block
    ids_BT = torch.randint(sizes.vocab_size, (sizes.sequences, block.tokens // sizes.sequences), device=device)

    def step(memories: int, experts: int) -> ModelStep:
        with torch.device(device):
            return ModelStep(*_model(sizes, memories, experts, device, dtype), ids_BT)

    moe = f"MoE, 1 of {sizes.experts} experts"
    counts = {"dense": (0, 0), moe: (0, sizes.experts), "Memory+, 1 layer": (1, 0), "Memory+, 3 layers": (3, 0)}
    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[Way(name, functools.partial(step, *numbers)) for name, numbers in counts.items()],
        error=lambda step: step.error(),
        tolerance=0.0,
        baselines=["dense", moe],
        tokens=block.tokens,
        memory=False,
    )


def _model(
    sizes: Model, memories: int, experts: int, device: torch.device, dtype: torch.dtype
) -> tuple[Transformer, Optimizer]:
    block = sizes.block
    # In the middle of equal parts of the model.
    layers = {(2 * number + 1) * sizes.layers // (2 * memories) for number in range(memories)}
    tables = [value_table(table(block.n_keys**2, block.dim, dtype, device), "rows")] if memories else []

    def ffn(layer: int) -> nn.Module:
        if layer in layers:
            return memory_on(block, tables[0])
        if experts:
            return mixture(block, sizes.layers, experts, top_k=1)
        return Dense(dim=block.dim, n_layers=sizes.layers, hidden_dim=block.hidden)

    model = Transformer(
        vocab_size=sizes.vocab_size,
        dim=block.dim,
        n_heads=sizes.heads,
        n_kv_heads=sizes.heads,
        ffns=[ffn(layer) for layer in range(sizes.layers)],
        tables=tables,
    ).to(device, dtype)
    # A table that learns by rows requires no gradient.
    dense = AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
    if not tables:
        return model, dense
    return model, TableOptimizer(dense, {"table": tables[0]}, rows="lazy_adam", lr=LR)
