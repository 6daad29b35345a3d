"""How a model is spread over ranks: the mesh of its tables, and FSDP2 of everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import TableMesh
from pkm_lightning.memory.mesh import SHARDS, check_members, group_size

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh

    from pkm_lightning.model import Transformer


def table_mesh(table: Mapping[str, Any], trainer: L.Trainer) -> TableMesh:
    """The mesh that `table.shard` and `table.group` ask for; every rank must ask.

    Raises:
        ConfigError: an unknown word, or a group that does not divide the ranks.
    """
    members = table_members(table, trainer.world_size, trainer.num_devices)
    return TableMesh(
        shard=str(table.get("shard", "none")), members=members, device_type=trainer.strategy.root_device.type
    )


def table_members(table: Mapping[str, Any], world: int, node: int) -> int:
    """Ranks that share one copy of a table.

    Raises:
        ConfigError: a group that does not divide the ranks, or an unknown word.
    """
    shard = str(table.get("shard", "none"))
    if shard not in SHARDS:
        raise ConfigError(f"table.shard={shard!r} is not known; allowed: {', '.join(SHARDS)}.")
    members = 1 if shard == "none" else group_size(table.get("group", "world"), world, node)
    # A run of one process has no groups, whatever is configured for several.
    if world == 1:
        return 1
    check_members(shard, members, world)
    return members


def check_own_tables(model: Transformer, *, engine: bool) -> None:
    """Refuse tables that a plugin has made for itself, where the strategy would split what rows are updated in.

    Args:
        model: its own tables are safe.
        engine: the strategy's engine clips all its parameters by one norm, tables as well.

    Raises:
        ConfigError: with what to do instead.
    """
    of_model = {id(table) for table in model.tables}
    own = [table for table in model.value_tables if id(table) not in of_model]
    if any(table.stage is not None or (engine and table.weight.requires_grad) for table in own):
        raise ConfigError(
            "a plugin has made a ValueTable for itself, which this strategy would take as a dense "
            "parameter; let the plugin ask for a table (the keyword `table` and the class method table_spec), or say "
            "strategy=ddp."
        )


def split_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension that FSDP2 splits: the first that the ranks divide, else the first, which it pads.

    Of sub-keys (heads, 2, keys, half) the padding would be most of what is sent.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def shard_dense(model: Transformer, mesh: DeviceMesh, tables: Iterable[nn.Parameter]) -> None:
    """FSDP2 over the data-parallel ranks: a unit a block, and one for the rest; `tables` are left as they are."""

    def place(parameter: nn.Parameter) -> Shard | None:
        dim = split_dim(parameter.shape, mesh.size())
        return None if dim == 0 else Shard(dim)

    ignored = set(tables)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, ignored_params=ignored, shard_placement_fn=place)
