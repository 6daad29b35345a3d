"""Initialisation of the whole model, as one table.

| weight                      | distribution                                   |
|-----------------------------|------------------------------------------------|
| embedding, unembedding      | N(0, 1/dim)                                    |
| attention query, key, value | N(0, 1/dim)                                    |
| attention out               | N(0, 1/dim) / sqrt(2 n_layers)                 |
| RMSNorm gains               | 1                                              |
| FFN plugins, value tables   | their own `reset_parameters`                   |

Every module draws from a generator seeded by (seed, its name). The weights outside the FFN therefore do not depend on
the FFN: two variants of one seed start from the same attention and embeddings. Modules without `reset_parameters` keep
the weights of their constructor.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from pkm_lightning.model.block import named_plugins

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk

_PLUGIN = re.compile(r"blocks\.\d+\.(ffn|ffn\.base|ffn\.variant|before|after)")


class TransformerParts(Protocol):
    """The parts of a `Transformer`, which itself imports this module."""

    embedding: nn.Embedding
    norm: nn.RMSNorm
    unembedding: nn.Linear | None
    tables: nn.ModuleList
    blocks: nn.ModuleList

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter."""


def initialise(model: TransformerParts, seed: int) -> None:
    """Applies the table above to `model` in place; the global random state stays unchanged."""
    std = model.embedding.embedding_dim**-0.5
    with _unchanged_random_state(model.parameters()) as on_cpu:
        for name, module in _named_parts(model):
            seed_torch(f"{seed}/{name}", on_cpu=on_cpu)
            if name.endswith("attention.out"):
                nn.init.normal_(module.weight, std=std * (2 * len(model.blocks)) ** -0.5)  # type: ignore[arg-type]
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif name.startswith("tables.") or _PLUGIN.fullmatch(name):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
            else:
                nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]


def initialise_plugins(model: Trunk, seed: int) -> None:
    """Draws the tables and plugins of a trunk whose other weights come from files, each from (seed, its name)."""
    parts = [(f"tables.{number}", table) for number, table in enumerate(model.tables)]
    parts += [(f"blocks.{layer}.{name}", plugin) for layer, name, plugin in model.plugins()]
    with _unchanged_random_state(model.parameters()) as on_cpu:
        for name, module in parts:
            if hasattr(module, "reset_parameters"):
                seed_torch(f"{seed}/{name}", on_cpu=on_cpu)
                module.reset_parameters()  # type: ignore[operator]


@contextlib.contextmanager
def _unchanged_random_state(parameters: Iterator[nn.Parameter]) -> Iterator[bool]:
    """Restores the global random state after the block, which gets whether all parameters are on the CPU or on meta."""
    devices = {parameter.device for parameter in parameters}
    # `fork_rng` saves only the CPU's generator and those of the devices it is given.
    with torch.random.fork_rng(devices=sorted(device.index for device in devices if device.type == "cuda")):
        yield all(device.type in ("cpu", "meta") for device in devices)


def seed_torch(stream: str, *, on_cpu: bool) -> int:
    """Seeds torch's generator of the CPU, and those of all other devices unless all draws are on the CPU.

    Returns the seed, a number of 32 bits that depends on `stream` alone.

    Where no other device is initialised, `torch.manual_seed` formats the Python stack for each kind of device, to be
    shown if its later seeding fails: 0.3 to 1 ms per call.
    """
    # CRC-32 because `hash` of a string differs between processes, and ranks must draw the same weights.
    seed = zlib.crc32(stream.encode())
    if on_cpu:
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    return seed


def _named_parts(model: TransformerParts) -> Iterator[tuple[str, nn.Module]]:
    yield "embedding", model.embedding
    yield "norm", model.norm
    if model.unembedding is not None:
        yield "unembedding", model.unembedding
    for i, table in enumerate(model.tables):
        yield f"tables.{i}", table
    for i, block in enumerate(model.blocks):
        for part in ("before_norm", "attention_norm", "ffn_norm", "after_norm"):
            if getattr(block, part) is not None:
                yield f"blocks.{i}.{part}", getattr(block, part)
        for part in ("query", "key", "value", "out"):
            yield f"blocks.{i}.attention.{part}", getattr(block.attention, part)
        for name, plugin in named_plugins(block):  # type: ignore[arg-type]
            yield f"blocks.{i}.{name}", plugin
