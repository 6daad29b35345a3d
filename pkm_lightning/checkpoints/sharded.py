"""Writes a checkpoint as a folder, each rank its part. `pkm_lightning.checkpoints.folder` reads it on any world size.

| in the folder | content |
|---|---|
| `skeleton.pt` | the checkpoint as Lightning composes it, each tensor replaced by its name |
| `.metadata`, `*.distcp` | the tensors by those names, as `torch.distributed.checkpoint` writes them, and a sum |

Names are those of `pkm_lightning.checkpoints.tree`. Optimizer states are numbered as the optimizer of a single process
numbers them, for every strategy and number of ranks. A folder appears under its name when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from pkm_lightning.checkpoints.folder import SKELETON, failure_reason, write_error
from pkm_lightning.checkpoints.metadata import NAME as METADATA
from pkm_lightning.checkpoints.sums import seal
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.storage import flush, remove_leftover, replace


def save(skeleton: Any, tensors: dict[str, Tensor], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a folder. Collective: call on all ranks, each with its own tensors or parts of them.

    Args:
        skeleton: rank 0's is written.
        tensors: DTensors, of which each rank writes its part, and plain tensors, which one of the ranks that hold them
            writes; a tensor on the meta device is held by another rank.
        path: of the folder, the same on every rank.
        group: all ranks, for the messages between them; None for the default group.

    Raises:
        CheckpointWriteError: on every rank: a full disk, or a folder that cannot be written; an earlier one is whole.
    """
    beside, first = path.with_name(path.name + ".tmp"), not is_distributed() or dist.get_rank() == 0
    try:
        if first:
            _prepare(beside)
        if is_distributed():
            dist.barrier(group=group)
        dcp.save({n: t for n, t in tensors.items() if not t.is_meta}, checkpoint_id=beside, process_group=group)
        reason = _finish(skeleton, beside, path) if first else None
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        reason = failure_reason(error)
    # Rank 0 may fail after the others are through: all ranks must raise, or none.
    reasons = gathered(reason, group)
    if any(reasons):
        if first:
            shutil.rmtree(beside, ignore_errors=True)
        raise write_error(path, next(filter(None, reasons)))


def _prepare(beside: Path) -> None:
    remove_leftover(beside)
    # An error here would leave the other ranks at the barrier; writing into the folder raises it on all ranks.
    with contextlib.suppress(OSError):
        beside.mkdir(parents=True, exist_ok=True)


def _finish(skeleton: Any, beside: Path, path: Path) -> str | None:
    """Completes the folder and gives it its name; returns the reason of a failure, which the other ranks wait for."""
    try:
        with (beside / SKELETON).open("wb") as file:
            torch.save(skeleton, file)
        seal(beside / METADATA)
        for entry in (*beside.iterdir(), beside):
            flush(entry)
        replace(beside, path)
        flush(path.parent)
    except Exception as error:
        return failure_reason(error)
    return None


def gathered(reason: str | None, group: dist.ProcessGroup | None = None) -> list[str | None]:
    """Returns the `reason` of each rank. Collective: call on all ranks."""
    if not is_distributed():
        return [reason]
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason, group=group)
    return reasons


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to host memory, where training cannot change them; of DTensors this rank's parts."""
    return {
        name: tensor.detach().to("cpu", copy=True) if not tensor.is_meta else tensor for name, tensor in tensors.items()
    }
