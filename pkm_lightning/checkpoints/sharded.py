"""Checkpoints as folders that every rank writes a part of, and that any number of ranks reads.

| in the folder | content |
|---|---|
| `skeleton.pt` | the checkpoint as Lightning composes it, each tensor replaced by its name |
| `.metadata`, `*.distcp` | the tensors by those names, as `torch.distributed.checkpoint` writes them |

A name is the path to the tensor: `state_dict.model.norm.weight`, `optimizer_states.0.state.3.exp_avg`. Optimizer
states are numbered as the single-process optimizer numbers them, whoever has written them. A folder appears under its
name when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import flush

_SKELETON = "skeleton.pt"
_MARK = "__tensor__"


def flatten(checkpoint: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """`checkpoint` with tensors replaced by their names, and the tensors by name."""
    if isinstance(checkpoint, Tensor):
        return {_MARK: path}, {path: checkpoint}
    if isinstance(checkpoint, Mapping):
        items = [(key, flatten(value, f"{path}.{key}" if path else str(key))) for key, value in checkpoint.items()]
        skeleton: Any = {key: part for key, (part, _) in items}
    elif isinstance(checkpoint, list | tuple):
        items = [(i, flatten(value, f"{path}.{i}")) for i, value in enumerate(checkpoint)]
        skeleton = type(checkpoint)([part for _, (part, _) in items])
    else:
        return checkpoint, {}
    return skeleton, {name: tensor for _, (_, found) in items for name, tensor in found.items()}


def restore(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(skeleton, Mapping):
        if skeleton.keys() == {_MARK}:
            return tensors[skeleton[_MARK]]
        return {key: restore(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        return type(skeleton)([restore(value, tensors) for value in skeleton])
    return skeleton


def save(skeleton: Any, tensors: dict[str, Tensor], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a folder; every rank must call it, with its own tensors or parts of them.

    Args:
        skeleton: rank 0's is written.
        tensors: DTensors, of which each rank writes its part, and plain ones, which one of their holders writes; on
            the meta device what another rank holds.
        path: of the folder, the same on every rank.
        group: of all ranks, for what they tell each other; None: the default one.

    Raises:
        CheckpointError: the disk is full or the place cannot be written, on every rank; an earlier folder is whole.
    """
    beside, first = path.with_name(path.name + ".tmp"), _rank() == 0
    try:
        if first:
            _prepare(beside)
        if _distributed():
            dist.barrier(group=group)
        dcp.save({n: t for n, t in tensors.items() if not t.is_meta}, checkpoint_id=beside, process_group=group)
        reason = _finish(skeleton, beside, path) if first else None
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        reason = _reason(error)
    reasons = _all_of(reason, group)
    if any(reasons):
        if first:
            shutil.rmtree(beside, ignore_errors=True)
        told = next(text for text in reasons if text)
        raise CheckpointError(
            f"{path} cannot be written ({told}); free the disk or move run_dir: the previous checkpoint is whole."
        )


def _prepare(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)
    with contextlib.suppress(OSError):  # whoever writes into it will say why
        beside.mkdir(parents=True, exist_ok=True)


def _finish(skeleton: Any, beside: Path, path: Path) -> str | None:
    try:
        with (beside / _SKELETON).open("wb") as file:
            torch.save(skeleton, file)
            file.flush()
        for entry in (*beside.iterdir(), beside):
            flush(entry)
        replace(beside, path)
        flush(path.parent)
    except Exception as error:  # the other ranks wait to hear of it
        return _reason(error)
    return None


def replace(beside: Path, path: Path) -> None:
    """Puts what is at `beside` in the place of `path`, a file or a folder.

    Where that takes two renames, a kill between them leaves the old one whole under `NAME.old`.
    """
    if not path.exists() or not (path.is_dir() or beside.is_dir()):
        os.replace(beside, path)
        return
    aside = path.with_name(path.name + ".old")
    _remove(aside)
    os.replace(path, aside)
    os.replace(beside, path)
    _remove(aside)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The first cause that names itself: `torch.distributed.checkpoint` reports the failures of all ranks in one."""
    if isinstance(error, dcp.CheckpointException):
        failures = [failure[0] for failure in error.failures.values()]
        error = next((f for f in failures if isinstance(f, OSError)), failures[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "cut short: is the disk full?"


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which training cannot change; of DTensors this rank's parts."""
    return {
        name: tensor.detach().to("cpu", copy=True) if not tensor.is_meta else tensor for name, tensor in tensors.items()
    }


class SavedTensors:
    """The tensors of a checkpoint, a folder or a single file, to be read in parts.

    Attributes:
        skeleton: the checkpoint with names in place of tensors.

    Raises:
        CheckpointError: missing, damaged, or written by something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._metadata: Metadata | None = None
        self._tensors: dict[str, Tensor] = {}
        if not self.path.exists():
            raise CheckpointError(f"ckpt={path} does not exist.")
        try:
            if self.path.is_dir():
                self.skeleton: Any = torch.load(self.path / _SKELETON, weights_only=True)
                self._metadata = dcp.FileSystemReader(self.path).read_metadata()
                _check_sizes(self.path, self._metadata)
            else:
                self.skeleton, self._tensors = flatten(
                    torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
                )
        except Exception:  # torch raises half a dozen kinds for a file that it cannot read
            raise CheckpointError(f"ckpt={path} is damaged or no checkpoint; use another one.") from None

    @property
    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor by name."""
        if self._metadata is None:
            return {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}
        stored = self._metadata.state_dict_metadata.items()
        return {n: (m.size, m.properties.dtype) for n, m in stored if isinstance(m, TensorStorageMetadata)}

    def optimizer(self, number: int) -> dict[str, Any]:
        """The skeleton of an optimizer's state dict."""
        states: dict[str, Any] = self.skeleton["optimizer_states"][number]
        return states

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fills `targets` in place, of a DTensor this rank's part; a folder needs the call on every rank.

        Raises:
            CheckpointError: the checkpoint's shapes are others, or it cannot be read.
        """
        shapes = self.shapes
        for name, target in targets.items():
            if shapes[name][0] != target.shape:
                raise CheckpointError(
                    f"ckpt={self.path}: {name} has the shape {tuple(shapes[name][0])}, here it is "
                    f"{tuple(target.shape)}: it was written with another configuration."
                )
        if self._metadata is None:
            for name, target in targets.items():
                _copy_part(self._tensors[name], target)
            return
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as one process wants it
                dcp.load(targets, checkpoint_id=self.path, no_dist=not _distributed())
        except Exception as error:
            raise CheckpointError(f"ckpt={self.path} cannot be read ({_reason(error)}); use another one.") from error

    def read_rest(self, apart: Sequence[str]) -> dict[str, Any]:
        """Everything but the top-level keys `apart`, as every rank holds it."""
        skeleton = {key: value for key, value in self.skeleton.items() if key not in apart}
        names = {name for name in self.shapes if name.split(".")[0] not in apart}
        tensors = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in self.shapes.items() if n in names}
        self.read_into(tensors)
        return dict(restore(skeleton, tensors))

    def read_whole(self) -> dict[str, Any]:
        """The checkpoint as one process holds it; a single file's tensors stay on disk until they are used."""
        return dict(restore(self.skeleton, self._tensors)) if self._metadata is None else self.read_rest(())


@torch.no_grad()
def _copy_part(whole: Tensor, target: Tensor) -> None:
    if isinstance(target, DTensor):
        # Every rank has the file: nobody need send a part.
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def _check_sizes(path: Path, metadata: Metadata) -> None:
    """Refuse a folder of which a file is missing or cut short, before any rank reads."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        if (path / name).stat().st_size < end:
            raise ValueError(f"{name} is cut short.")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _all_of(reason: str | None, group: dist.ProcessGroup | None) -> list[str | None]:
    if not _distributed():
        return [reason]
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason, group=group)
    return reasons
