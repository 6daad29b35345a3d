"""Small safetensors files of whole tensors and texts, with sums: what belongs to a model and is no weight."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile
from pkm_lightning.checkpoints.safetensors import check_tensors, lay_out, map_tensors, with_sums
from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import written_beside


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Writes `tensors` and `texts` by name; an earlier file is replaced when all is on disk.

    Raises:
        CheckpointError: a full disk, or a folder that is missing or cannot be written.
    """
    header, entries = lay_out({name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}, texts)
    try:
        with written_beside(path) as file:
            file.write(header)
            sums = []
            for name in entries:
                values = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(values)
                sums.append(zlib.crc32(values))
            file.seek(0)
            file.write(with_sums(header, sums))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); choose another place.") from error


def read_tensor_file(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors, in memory, and the texts of a file, after a comparison with its sums.

    Args:
        path: of the file.
        key: what the path is called in messages, such as `finetune.background=`.

    Raises:
        CheckpointError: there is no such file, it is of another format, or it is damaged.
    """
    try:
        file = MappedFile(path)
        texts, tensors = map_tensors(file)
        check_tensors(file)
        return {name: value.clone() for name, value in tensors.items()}, texts
    except OSError as error:
        raise CheckpointError(f"{key}{path} cannot be read ({error.strerror}).") from None
    except (DamagedFileError, ValueError) as error:
        raise CheckpointError(f"{key}{path} is damaged or no file of this kind ({error}).") from None
