"""How a model is spread over ranks: the mesh of its tables, and FSDP2 of everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from pkm_lightning.memory import TableMesh
from pkm_lightning.memory.mesh import group_size

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh

    from pkm_lightning.model import Transformer


def table_mesh(table: Mapping[str, Any], trainer: L.Trainer) -> TableMesh:
    """The mesh that `table.shard` and `table.group` ask for; every rank must ask.

    Raises:
        ConfigError: an unknown word, or a group that does not divide the ranks.
    """
    shard = str(table.get("shard", "none"))
    members = 1 if shard == "none" else group_size(table.get("group", "world"), trainer.world_size, trainer.num_devices)
    return TableMesh(shard=shard, members=members, device_type=trainer.strategy.root_device.type)


def shard_dense(model: Transformer, mesh: DeviceMesh, tables: Iterable[nn.Parameter]) -> None:
    """FSDP2 over the data-parallel ranks: a unit a block, and one for the rest; `tables` are left as they are."""
    ignored = set(tables)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
