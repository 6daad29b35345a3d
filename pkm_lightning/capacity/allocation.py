"""Refuses sizes that this machine cannot allocate, by arithmetic: a lower bound of what training holds at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from pkm_lightning.capacity.figures import amount
from pkm_lightning.capacity.setting import device_count
from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from pkm_lightning.capacity.figures import Memory, Plan

# Token id and label.
_BATCH_BYTES = 16


def check_allocatable(plan: Plan, config: Mapping[str, Any], limit: float | None = None) -> None:
    """Refuses a run whose weights, gradients and one hidden state per token exceed the memory that there is.

    States of row optimizers are left out: the pages of rows that are never read are never touched.

    Args:
        plan: of the run.
        config: its configuration.
        limit: bytes; None: of the host for all ranks of this node on CPUs, else of the CUDA device for one rank.

    Raises:
        ConfigError: naming the largest figure.
    """
    trainer = config["trainer"]
    on_host = str(trainer["accelerator"]) == "cpu" or not torch.cuda.is_available()
    ranks = device_count(trainer["devices"], trainer["accelerator"]) if on_host else 1
    figures = _allocated(plan.memory)
    if on_host:
        figures["weights of tables in host memory"] = plan.host.table_part
    width = _BATCH_BYTES + int(config["model"]["dim"]) * plan.setting.item
    figures["one hidden state per token of a micro-batch"] = (plan.setting.tokens or 0) * width
    needed, available = sum(figures.values()) * ranks, limit or (_host_memory() if on_host else _cuda_memory())
    if needed > available:
        name, most = max(figures.items(), key=lambda item: item[1])
        raise ConfigError(
            f"this run needs at least {amount(needed)} of memory (the most for {name}, {amount(most * ranks)}"
            f"), and {'this machine' if on_host else 'the device'} has {amount(available)}; choose smaller "
            "sizes. `info` with the same keys shows what each part takes."
        )


def _allocated(memory: Memory) -> dict[str, int]:
    return {
        "dense weights": memory.dense_weights or 0,
        "dense gradients": memory.dense_gradients or 0,
        "weights of tables": memory.table_part,
        "gradients of tables": memory.table_gradients,
    }


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda_memory() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)
