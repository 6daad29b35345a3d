"""Ranks that torchrun or SLURM started: rank 0 chooses the configuration and the checkpoint and sends them to all.

On their own the other ranks would read the run directory while rank 0 still changes it. For that message the process
group is initialised before Lightning would; Lightning finds the group and keeps it.
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
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from torch.distributed import default_pg_timeout

from pkm_lightning.errors import ConfigError, Interrupted, RankLostError
from pkm_lightning.supervision.launcher import RANK_LOST
from pkm_lightning.supervision.meeting_point import check_meeting_point

_EXTERNAL = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


@dataclass(frozen=True)
class Decision:
    """The configuration that all ranks run, and the checkpoint that they start from."""

    config: dict[str, Any]
    checkpoint: Path | None


class ExternalRanks:
    """The connected ranks of a run that an external launcher started.

    Args:
        environment: of the launcher.
        device: on which messages are sent.
    """

    def __init__(self, environment: ClusterEnvironment, device: torch.device) -> None:
        self.rank, self.world_size = environment.global_rank(), environment.world_size()
        self._device = device

    def send(self, decision: Decision | None) -> None:
        """Sends the decision of rank 0 to the other ranks; None means that it refuses to run. Call on rank 0."""
        self._broadcast(decision)

    def receive(self) -> Decision:
        """Returns the decision of rank 0. Call on the other ranks.

        Raises:
            Interrupted: rank 0 refused to run; it reports the reason.
        """
        decision = self._broadcast(None)
        if decision is None:
            raise Interrupted("", 2)
        return decision

    @contextlib.contextmanager
    def refuse_on_error(self) -> Iterator[None]:
        """Sends a refusal to the other ranks if rank 0 leaves the block with an error."""
        try:
            yield
        except Exception:
            self.send(None)
            raise

    def _broadcast(self, decision: Decision | None) -> Decision | None:
        message = [decision]
        dist.broadcast_object_list(message, src=0, device=self._device)
        # Rank 0 may end right after a refusal: it waits here until all ranks have received it.
        dist.barrier(device_ids=None if self._device.type == "cpu" else [self._device.index])
        return message[0]


def started_externally() -> bool:
    """Returns whether a launcher outside this package (torchrun, SLURM, LSF, MPI) has started this process.

    Call it before a Trainer is made; the kinds are those among which Lightning chooses.
    """
    return any(kind.detect() for kind in _EXTERNAL)


def check_world(trainer: L.Trainer, started: int) -> None:
    """Refuses a Trainer that is configured for another number of ranks than were started.

    Raises:
        ConfigError: naming both numbers.
    """
    # Not trainer.world_size, which comes from the launcher's environment.
    configured = trainer.num_devices * trainer.num_nodes
    if configured != started:
        raise ConfigError(
            f"trainer.devices times trainer.num_nodes makes {configured} rank(s), but {started} were started "
            "externally; set strategy=ddp, trainer.devices= (ranks per node) and trainer.num_nodes= as they were "
            "started."
        )


def join(trainer: L.Trainer) -> ExternalRanks | None:
    """Initialises the process group of ranks that were started externally; returns None where there are none.

    Raises:
        ConfigError: several nodes without a launcher that starts ranks on them, or another number of ranks than
            configured, or an address or port that cannot be used.
        Interrupted: the same, in a rank other than 0, which leaves the report to rank 0.
        RankLostError: the ranks could not be connected.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, LightningEnvironment):
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} needs an external launcher that starts ranks on every node: "
                "use torchrun or srun (docs/many-nodes.md)."
            )
        return None
    if not environment.creates_processes_externally or environment.world_size() == 1:
        return None
    try:
        if trainer.num_devices * trainer.num_nodes > 1:
            check_world(trainer, environment.world_size())
    except ConfigError:
        # All ranks raise this error by themselves, before they are connected: rank 0 reports it.
        if environment.global_rank() == 0:
            raise
        raise Interrupted("", 2) from None
    return _connect(trainer, environment)


def _connect(trainer: L.Trainer, environment: ClusterEnvironment) -> ExternalRanks:
    strategy = trainer.strategy
    device = strategy.root_device
    if device.type == "cuda":
        device = torch.device("cuda", min(environment.local_rank(), torch.cuda.device_count() - 1))
    # A run that is continued without its overrides has no distributed strategy yet: the device decides.
    choose = getattr(strategy, "_get_process_group_backend", None)
    backend = choose() if choose else _get_default_process_group_backend_for_device(device)
    timeout = getattr(strategy, "_timeout", None) or default_pg_timeout
    if environment.global_rank() == 0:
        check_meeting_point(environment)
    try:
        _init_dist_connection(environment, backend, device_id=None if device.type == "cpu" else device, timeout=timeout)
    except RuntimeError as error:
        address = f"{environment.main_address}:{environment.main_port}"
        raise RankLostError(
            f"rank {environment.global_rank()} of {environment.world_size()} could not connect to the others at "
            f"{address} ({' '.join(str(error).split())[:200]})",
            RANK_LOST,
        ) from error
    return ExternalRanks(environment, device)
