"""Jobs of a group of ranks that write checkpoint folders, each rank its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pkm_lightning.checkpoints.sharded import save
from pkm_lightning.checkpoints.tree import flatten


def checkpoint() -> dict[str, Any]:
    """Of this package by its keys, with weights of odd sizes, layouts and dtypes; the same for every call."""
    draw = torch.Generator().manual_seed(3)
    state = {
        "model.tables.0.weight": torch.randn(37, 11, generator=draw),
        "model.norm.weight": torch.randn(5, generator=draw).bfloat16(),
        "model.experts": torch.randn(3, 4, 5, generator=draw).double(),
        "model.transposed": torch.randn(4, 7, generator=draw).T,
        "model.count": torch.tensor(3),
        "model.none": torch.zeros(0, 2),
        "model.flags": torch.tensor([True, False, True]),
        "heldout": torch.zeros(2),
    }
    config = {"model": {"dim": 5}, "ffn": {}, "data": {"rate": 0.1}, "trainer": {"devices": None}}
    return {
        "state_dict": state,
        "tokens_seen": 123,
        "tokenizer": "digest",
        "hyper_parameters": {"config": config},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(37, 11)}}, "param_groups": []}],
    }


def save_folders(folder: Path) -> None:
    """`folder`/0.ckpt with everything split by rows, `folder`/1.ckpt by columns, where there are any; unevenly."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for axis in (0, 1):
        content = checkpoint()
        for name, value in content["state_dict"].items():
            placement = Shard(axis) if value.ndim > axis else Replicate()
            content["state_dict"][name] = distribute_tensor(value.contiguous(), mesh, [placement])
        save(*flatten(content), folder / f"{axis}.ckpt")
