"""FSDP2 over a transformer: one unit per block, one for the rest, and the dimension in which a parameter is split."""

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
