"""Ranks that torchrun or SLURM started: rank 0 decides what is run and from which checkpoint, and the others are told.

Left to themselves they would read the run directory while rank 0 still changes it. The process group is joined for that
before Lightning would; it finds the group and keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from torch.distributed import default_pg_timeout

from pkm_lightning.errors import ConfigError, Interrupted, RankLostError
from pkm_lightning.supervision import RANK_LOST


@dataclass(frozen=True)
class Decision:
    """What all ranks run."""

    config: dict[str, Any]
    checkpoint: Path | None


class Outside:
    """The connected ranks.

    Args:
        environment: what started them.
        device: on which messages travel.
    """

    def __init__(self, environment: ClusterEnvironment, device: torch.device) -> None:
        self.rank, self.world_size = environment.global_rank(), environment.world_size()
        self._device = device

    def tell(self, decision: Decision | None) -> None:
        """Sends the decision of rank 0 to the others; None means that it refuses to run."""
        self._broadcast(decision)

    def hear(self) -> Decision:
        """The decision of rank 0.

        Raises:
            Interrupted: it refused, and has said why.
        """
        decision = self._broadcast(None)
        if decision is None:
            raise Interrupted("", 2)
        return decision

    @contextlib.contextmanager
    def refusals_told(self) -> Iterator[None]:
        """The other ranks hear of it if rank 0 leaves this block with an error."""
        try:
            yield
        except Exception:
            self.tell(None)
            raise

    def _broadcast(self, decision: Decision | None) -> Decision | None:
        box = [decision]
        dist.broadcast_object_list(box, src=0, device=self._device)
        # Rank 0 may end right after it: not before all have heard.
        dist.barrier(device_ids=None if self._device.type == "cpu" else [self._device.index])
        return box[0]


def check_world(trainer: L.Trainer, started: int) -> None:
    """Refuses a Trainer that is made for another number of ranks than were started.

    Raises:
        ConfigError: naming both numbers.
    """
    # Not trainer.world_size, which is what the environment says.
    configured = trainer.num_devices * trainer.num_nodes
    if configured != started:
        raise ConfigError(
            f"trainer.devices times trainer.num_nodes makes {configured} rank(s), but {started} were started "
            "from outside; set strategy=ddp, trainer.devices= (ranks a node) and trainer.num_nodes= as they were "
            "started."
        )


def join(trainer: L.Trainer) -> Outside | None:
    """Joins the process group of ranks that were started from outside; None where rank 0 starts them or is alone.

    Raises:
        ConfigError: several nodes, but nothing that starts ranks on them, or another number of ranks than configured.
        Interrupted: the same, in a rank that leaves it to rank 0 to say so.
        RankLostError: the ranks could not be connected.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, LightningEnvironment):
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} needs ranks that are started from outside, on every node: use "
                "torchrun or srun (docs/many-nodes.md)."
            )
        return None
    if not environment.creates_processes_externally or environment.world_size() == 1:
        return None
    try:
        if trainer.num_devices * trainer.num_nodes > 1:
            check_world(trainer, environment.world_size())
    except ConfigError:
        # All ranks see the same, and must not wait for each other to say it.
        if environment.global_rank() == 0:
            raise
        raise Interrupted("", 2) from None
    return _connect(trainer, environment)


def _connect(trainer: L.Trainer, environment: ClusterEnvironment) -> Outside:
    strategy = trainer.strategy
    device = strategy.root_device
    if device.type == "cuda":
        device = torch.device("cuda", min(environment.local_rank(), torch.cuda.device_count() - 1))
    # A run that is continued without its overrides has no strategy yet: then what fits the device.
    choose = getattr(strategy, "_get_process_group_backend", None)
    backend = choose() if choose else _get_default_process_group_backend_for_device(device)
    timeout = getattr(strategy, "_timeout", None) or default_pg_timeout
    try:
        _init_dist_connection(environment, backend, device_id=None if device.type == "cpu" else device, timeout=timeout)
    except RuntimeError as error:
        where = f"{environment.main_address}:{environment.main_port}"
        raise RankLostError(
            f"rank {environment.global_rank()} of {environment.world_size()} could not join the others at {where} "
            f"({' '.join(str(error).split())[:200]})",
            RANK_LOST,
        ) from error
    return Outside(environment, device)
