"""How tables are spread over the ranks of a run: their mesh, and tables that a strategy cannot spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import TableMesh
from pkm_lightning.memory.mesh import table_members

if TYPE_CHECKING:
    import lightning as L

    from pkm_lightning.model import Transformer


def table_mesh(table: Mapping[str, Any], trainer: L.Trainer) -> TableMesh:
    """Builds the mesh that `table.shard` and `table.group` describe. Collective: call on all ranks.

    Raises:
        ConfigError: an unknown choice, or a group that does not divide the ranks.
    """
    members = table_members(table, trainer.world_size, trainer.num_devices)
    return TableMesh(
        shard=str(table.get("shard", "none")), members=members, device_type=trainer.strategy.root_device.type
    )


def check_own_tables(model: Transformer, *, engine: bool) -> None:
    """Refuses tables that a plugin has made itself where the strategy would shard them as dense parameters.

    Args:
        model: the tables that it owns (`model.tables`) are safe.
        engine: the strategy's engine clips all its parameters by one norm, tables included.

    Raises:
        ConfigError: with what to do instead.
    """
    of_model = {id(table) for table in model.tables}
    of_plugins = [table for table in model.value_tables if id(table) not in of_model]
    if any(table.stage is not None or (engine and table.learns) for table in of_plugins):
        raise ConfigError(
            "a plugin has made a ValueTable itself, which this strategy would treat as a dense "
            "parameter; let the builder pass it (the keyword `table` and the class method table_spec), or set "
            "strategy=ddp."
        )
