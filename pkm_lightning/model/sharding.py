"""FSDP2 over a transformer: its units, and the dimension in which each parameter is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pkm_lightning.model.transformer import Transformer


def split_dim(shape: Sequence[int], ranks: int) -> int:
    """Returns the dimension in which FSDP2 shards: the first that `ranks` divides, else 0, which FSDP2 pads."""
    # Dimension 0 of sub-keys, (heads, 2, keys, half), is small: padded to the ranks, most of the traffic is padding.
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def shard_dense(model: Transformer, mesh: DeviceMesh, tables: Iterable[nn.Parameter]) -> None:
    """Applies FSDP2 over the data-parallel ranks, with one unit per block and one for the rest, except for `tables`."""

    def place(parameter: nn.Parameter) -> Shard | None:
        dim = split_dim(parameter.shape, mesh.size())
        return None if dim == 0 else Shard(dim)

    # Value tables are sharded by their own mesh and exchange rows, never whole parameters.
    ignored = set(tables)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, ignored_params=ignored, shard_placement_fn=place)
