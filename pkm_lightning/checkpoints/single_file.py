"""The tensors of a checkpoint in one file, mapped read-only: one of `torch.save`, or an exported model."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import pkm_lightning
from pkm_lightning.checkpoints.companions import MODEL_TYPE, advice_for_folder, model_type_of
from pkm_lightning.checkpoints.folder import Chunk
from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile, map_archive
from pkm_lightning.checkpoints.safetensors import FORMAT_VERSION, check_tensors, map_tensors
from pkm_lightning.checkpoints.sums import Share, check_archive, check_skeleton
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError

_log = logging.getLogger(__name__)


class MappedContent:
    """The tensors of one file, mapped read-only."""

    def __init__(
        self,
        file: MappedFile,
        skeleton: Any,
        tensors: Mapping[str, Tensor],
        check_sums: Callable[[Collection[str], Share], None],
    ) -> None:
        self._file, self.skeleton, self._tensors, self.check_sums = file, skeleton, tensors, check_sums
        self.shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def read_into(self, targets: dict[str, Tensor]) -> None:
        for name, target in targets.items():
            fill(target, self._tensors[name])

    def mapped(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}

    def chunks(self, name: str) -> list[Chunk]:
        return [Chunk((0,) * self._tensors[name].ndim, self._tensors[name])]

    def forget(self) -> None:
        self._file.forget()


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copies `whole` into `target`, of a DTensor this rank's part."""
    if isinstance(target, DTensor):
        # Every rank has the values, so none need send a part: src_data_rank=None.
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def read_archive(path: Path) -> MappedContent:
    file = MappedFile(path)
    if zipfile.is_zipfile(path):  # else it is no checkpoint, which torch will say
        check_skeleton(file)
    skeleton, tensors, records = map_archive(file)

    def check_sums(without: Collection[str], share: Share) -> None:
        # A record may hold several tensors, such as tied weights; an empty name stands for one that is not read.
        names = {first: "" for name, first in records.items() if name in without}
        names |= {first: name for name, first in records.items() if name not in without}
        check_archive(file, 0, len(file), names, share)

    return MappedContent(file, skeleton, tensors, check_sums)


def _instead_of(path: Path) -> str:
    """Returns what to do with safetensors of another package."""
    folder = path.absolute().parent
    if model_type_of(folder) == MODEL_TYPE:
        return "transformers saved it, and reads it: AutoModelForCausalLM.from_pretrained(FOLDER)"
    return advice_for_folder(folder) or f"make one with: export ckpt=CHECKPOINT file={path.name}"


def read_exported(path: Path) -> MappedContent:
    """Returns an exported model with the keys of a checkpoint."""
    file = MappedFile(path)
    texts, tensors = map_tensors(file)
    if "pkm_lightning_format" not in texts:
        raise CheckpointError(f"{path} was not written by this package; {_instead_of(path)}.")
    if texts["pkm_lightning_format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format version {texts['pkm_lightning_format']}, this package "
            f"({pkm_lightning.__version__}) reads {FORMAT_VERSION}; export it again with this one."
        )
    try:
        config, tokens_seen = json.loads(texts["config"]), int(texts["tokens_seen"])
    except (KeyError, ValueError):
        raise DamagedFileError("its metadata is unreadable") from None
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "hyper_parameters": {"config": config},
        "tokens_seen": tokens_seen,
        "tokenizer": texts.get("tokenizer"),
        "data": texts.get("data"),
    }
    skeleton, named = flatten(content)

    def check_sums(without: Collection[str], share: Share) -> None:
        skipped = {name.removeprefix("state_dict.model.") for name in without}
        if not check_tensors(file, skipped, share):
            _log.info("%s holds no checksums, by which damage would be noticed; export it again to add them", path)

    return MappedContent(file, skeleton, named, check_sums)
