"""Revivals in one process or on every rank of a group."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
import usage_jobs as jobs

from pkm_lightning.callbacks import SlotRevival
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import TableMesh, ValueTable
from pkm_lightning.memory.revival import copy_rows
from pkm_lightning.ops.ranks import full_tensor


def revival(**changes: Any) -> SlotRevival:
    defaults: dict[str, Any] = {"every_n_steps": 3, "dead_after": 2, "max_share": 0.1, "source": "busy", "noise": 0.1}
    return SlotRevival(**{**defaults, **changes})


def revived_table(shard: str) -> list[list[float]]:
    """Returns the whole table after copies of two rows, which lie on different ranks where rows are sharded."""
    mesh = None
    if dist.is_initialized():
        mesh = TableMesh(shard=shard, members=1 if shard == "none" else dist.get_world_size(), device_type="cpu")
    torch.manual_seed(3)
    table = ValueTable(rows=6, dim=8, slices=2, mesh=mesh)
    copy_rows(table, torch.tensor([0, 5]), torch.tensor([4, 1]), noise=0.5, seed=9)
    weight = table.weight.detach()
    return (weight if mesh is None else full_tensor(mesh.as_dtensor(weight, 12, 4))).tolist()


def train(overrides: list[str], steps: int, **changes: Any) -> tuple[list[dict[str, float]], dict[str, int], list[Any]]:
    """Trains with counts per head; returns the logs, the numbers of revivals, and the sub-keys at the end."""
    with tempfile.TemporaryDirectory() as folder:
        reviving = revival(**changes)
        module, _, seen = jobs.fit(overrides, steps, [jobs.usage(folder, per_head="halves"), reviving])
    keys = [full_tensor(p.detach()).tolist() for name, p in module.named_parameters() if name.endswith("keys.keys")]
    return seen, reviving.revived, keys


def refused(overrides: list[str], **changes: Any) -> str:
    """Returns the message with which `train` is refused."""
    try:
        train(overrides, 1, **changes)
    except ConfigError as error:
        return str(error)
    return ""
