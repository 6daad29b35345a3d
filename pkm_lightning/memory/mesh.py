"""The ranks as a (replicas, members) mesh: each replica of a table is sharded over the members of a group.

| `shard` | each member holds | members per group |
|---|---|---|
| `dim` | its columns of every row | P |
| `row` | all columns of its rows | P |
| `none` | the whole table | 1 |

Rank r is member r % P of replica r // P. The members of a group are therefore neighbouring ranks, which lie on one node
if P is its number of devices.

Letters: P members of a group, R replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from pkm_lightning.errors import ConfigError, check_choice
from pkm_lightning.ops.ranks import gather_into

SHARDS = ("dim", "row", "none")


class TableMesh:
    """The ranks of the default process group, arranged for tables.

    Args:
        shard: `dim`, `row` or `none`.
        members: ranks that hold one copy of a table together, P; a divisor of the number of ranks, 1 for `none`.
        device_type: type of the device of the tensors that are exchanged, as in `torch.device`.

    Attributes:
        member: index of this rank among the members of its group.
        replicas: copies of a table, R.

    Raises:
        ConfigError: an unknown `shard`, or members that do not divide the ranks.
    """

    def __init__(self, *, shard: str, members: int, device_type: str) -> None:
        check_choice("table.shard", shard, SHARDS)
        world = dist.get_world_size()
        check_members(shard, members, world)
        self.shard = shard if members > 1 else "none"
        self.members, self.replicas, self.world = members, world // members, world
        self.device_mesh: DeviceMesh = init_device_mesh(
            device_type, (self.replicas, members), mesh_dim_names=("replicas", "members")
        )
        self.member = self.device_mesh.get_local_rank("members")
        self._groups = {device_type: tuple(self.device_mesh.get_group(name) for name in ("replicas", "members"))}
        # Hosts exchange lengths, and tables in host memory exchange rows, through gloo.
        if device_type != "cpu":
            self._groups["cpu"] = self._host_groups()

    def __deepcopy__(self, memo: object) -> TableMesh:
        """Returns the same object: process groups belong to the process, not to a model."""
        return self

    def _host_groups(self) -> tuple[dist.ProcessGroup, ...]:
        ranks = torch.arange(self.world).view(self.replicas, self.members)
        return tuple(dist.new_subgroups_by_enumeration(part.tolist(), backend="gloo")[0] for part in (ranks.T, ranks))

    def replica_group(self, device: torch.device) -> dist.ProcessGroup:
        """Returns the group of the ranks that hold the same part of a table, for tensors on `device`."""
        return self._groups[device.type][0]

    def member_group(self, device: torch.device) -> dist.ProcessGroup:
        """Returns the group of the ranks that hold one copy of a table together, for tensors on `device`."""
        return self._groups[device.type][1]

    def local_shape(self, rows: int, dim: int) -> tuple[int, int]:
        """Returns the shape of this member's part of a (rows, dim) table.

        Raises:
            ConfigError: `dim` is not divisible by the members of a `dim` mesh, or a member of a `row` mesh has no row.
        """
        check_dim(self.shard, dim, self.members)
        check_rows(self.shard, rows, self.members)
        if self.shard == "dim":
            return rows, dim // self.members
        low, high = self.row_range(rows)
        return high - low, dim

    def row_range(self, rows: int) -> tuple[int, int]:
        """Returns the first row of this member and the row after its last one; the last member may have fewer rows."""
        if self.shard != "row":
            return 0, rows
        # As torch.chunk and DTensor's Shard(0) divide rows, so that checkpoints can be resharded.
        share = -(-rows // self.members)
        return min(rows, self.member * share), min(rows, (self.member + 1) * share)

    def columns(self, dim: int) -> slice:
        """Returns the columns of this member."""
        if self.shard != "dim":
            return slice(0, dim)
        share = dim // self.members
        return slice(self.member * share, (self.member + 1) * share)

    def as_dtensor(self, part: Tensor, rows: int | None, dim: int | None) -> Tensor:
        """Returns `part`, this member's part of a table, as a DTensor of the whole table, for checkpoints.

        Without `dim`, `part` holds one value per row, without `rows` one per column, such as states of a row optimizer.
        """
        sizes = {"row": rows, "dim": dim}
        shape = torch.Size(size for size in (rows, dim) if size is not None)
        placement: Replicate | Shard = Replicate()
        if sizes.get(self.shard) is not None:
            placement = Shard(0 if self.shard == "row" or rows is None else 1)
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        placements = [Replicate(), placement]
        # Without run_check: it would broadcast every part to compare the replicas.
        return DTensor.from_local(part, self.device_mesh, placements, run_check=False, shape=shape, stride=stride)

    def lengths(self, reads: int) -> tuple[int, ...]:
        """Returns the number of reads of each member in the current call. Collective: call on all members.

        Args:
            reads: the number of reads of this rank. Ranks may hold batches of different sizes, and a plugin may read
                for some of its tokens only.
        """
        # Between the hosts, so that no device has to be synchronised.
        numbers = torch.empty(self.members, dtype=torch.int64, device="cpu")
        gather_into(numbers, torch.tensor([reads], dtype=torch.int64, device="cpu"), self._groups["cpu"][1])
        return tuple(numbers.tolist())


def table_members(table: Mapping[str, Any], world: int, node: int) -> int:
    """Returns the number of ranks that hold one copy of a table together.

    Args:
        table: the group `table` of a configuration.
        world: ranks of the run.
        node: ranks per node.

    Raises:
        ConfigError: a group that does not divide the ranks, or an unknown `table.shard`.
    """
    shard = str(table.get("shard", "none"))
    check_choice("table.shard", shard, SHARDS)
    members = 1 if shard == "none" else group_size(table.get("group", "world"), world, node)
    # A saved configuration may name groups of a larger run; one process holds whole tables.
    if world == 1:
        return 1
    check_members(shard, members, world)
    return members


def group_size(group: str | int, world: int, node: int) -> int:
    """Returns the ranks per group that `table.group` asks for: `world`, `node` (those of one node) or a number.

    Raises:
        ConfigError: any other value.
    """
    if group == "world":
        return world
    if group == "node":
        return node
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ConfigError(f"table.group={group!r} is not known; allowed: world, node, or a number of ranks.")
    return group


def check_members(shard: str, members: int, world: int) -> None:
    """Refuses a group whose size does not divide the number of ranks.

    Raises:
        ConfigError: with the divisors.
    """
    if shard == "none":
        return
    if members > world or world % members:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(f"table.group={members} does not divide the {world} ranks; allowed: {divisors}.")


def check_dim(shard: str, dim: int, members: int) -> None:
    """Refuses columns that cannot be shared equally.

    Raises:
        ConfigError: with settings that can.
    """
    if shard == "dim" and dim % members:
        divisors: Sequence[int] = [n for n in range(1, members) if members % n == 0 and dim % n == 0]
        raise ConfigError(
            f"table.shard=dim cannot divide the {dim} values of a row over {members} ranks; set table.shard=row, or "
            f"table.group={divisors[-1]}."
        )


def check_rows(shard: str, rows: int, members: int) -> None:
    """Refuses rows that would leave the last member without any.

    Raises:
        ConfigError: with settings that would not.
    """
    if shard == "row" and (members - 1) * -(-rows // members) >= rows:
        fitting = next(n for n in range(members - 1, 0, -1) if members % n == 0 and (n - 1) * -(-rows // n) < rows)
        raise ConfigError(
            f"table.shard=row in equal shares leaves some of {members} ranks without any of {rows} rows; set "
            f"table.shard=dim, or table.group={fitting}."
        )
