"""Finds the rows of a table in safetensors files: by the name of a tensor, its shape, or the digest of its values."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.checkpoints.safetensors import Entry
from pkm_lightning.checkpoints.weight_files import stamp, stored_entries
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import TableSpec
from pkm_lightning.memory.joined_rows import JoinedRows
from pkm_lightning.memory.stored_rows import SharedFile, StoredRows

Config = Mapping[str, Any]
#: The place of one part of a table: a file, and where in it.
Place = tuple[Path, Entry]

#: Stands in `table.tensor` for the number of the table, where a model has several.
_NUMBER = "{}"
#: Stands there for the number of a part, where a table is stored in several.
_PART = "*"
_KEY = "table.path="


def find_rows(table: Config, spec: TableSpec, number: int, count: int) -> StoredRows:
    """Returns the rows in the file that `table.path` and `table.tensor` name.

    Args:
        table: the group of the configuration.
        spec: what the plugin requests.
        number, count: of the table among those of its variant, and of these.

    Raises:
        ConfigError: the file does not hold such a table.
        CheckpointError: the file cannot be read.
    """
    rows, dim = spec.rows, spec.dim
    path, name = Path(str(table["path"])), _tensor_name(table.get("tensor"), number, count)
    files = stored_entries(path, _KEY)
    if name is not None and _PART in name:
        candidates = {name: _parts(path, name, files)}
    elif name is not None:
        candidates = {name: [files[name]]} if name in files else {}
    else:
        candidates = {known: [place] for known, place in files.items() if place[1].shape == (rows, dim)}
    if len(candidates) > 1:
        raise ConfigError(
            f"table.path={path} holds {len(candidates)} tensors of {rows:,} x {dim} values; choose one with "
            f"table.tensor={' or '.join(sorted(candidates)[:3])}."
        )
    if not any(candidates.values()):
        raise ConfigError(f"table.path={path} {_missing(name, rows, dim, files)}")
    ((known, places),) = candidates.items()
    entries = [entry for _, entry in places]
    shape, dtype = _joined_shape(entries), entries[0].dtype
    is_float = dtype.is_floating_point and dtype.itemsize > 1
    if shape != (rows, dim) or not is_float or any(entry.dtype != dtype for entry in entries):
        shown = " x ".join(f"{size:,}" for size in shape)
        kinds = " and ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}))
        raise ConfigError(
            f"table.path={path}: {known} has {shown} values of {kinds}, but the model's table has {rows:,} x {dim} "
            "floating-point values of 16, 32 or 64 bits; change the sizes of ffn, or give another file."
        )
    return _stored(path, places, dim // spec.slices)


def map_rows(table: Config, digest: Sequence[int]) -> list[tuple[MappedFile, Tensor]]:
    """Returns the mapped parts of the table with this digest, each with its file; none if `table.path` has none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    lines, width = digest[:2]
    path, tensor = Path(str(table["path"])), table.get("tensor") or []
    files = stored_entries(path, _KEY)
    names = [tensor] if isinstance(tensor, str) else tensor
    in_parts = (places for name in names if _PART in name for places in _numbered(path, name, files))
    for places in (*([place] for place in files.values()), *in_parts):
        sizes = [entry.shape[0] * entry.shape[1] if len(entry.shape) == 2 else 0 for _, entry in places]
        if sum(sizes) == lines * width and _stored(path, places, width).digest.tolist() == list(digest):
            mapped = [(MappedFile(file), entry) for file, entry in places]
            return [(file, file.tensor(entry.start, entry.dtype, entry.shape)) for file, entry in mapped]
    return []


def _tensor_name(tensor: str | Sequence[str] | None, number: int, count: int) -> str | None:
    """Returns the name of the tensor of table `number` of `count`; None for the one of its shape.

    Raises:
        ConfigError: the names are too few.
    """
    if tensor is not None and not isinstance(tensor, str):
        if len(tensor) != count:
            raise ConfigError(
                f"table.tensor={list(tensor)} names {len(tensor)} tensors, and this model has {count} tables; name one "
                "per table."
            )
        return str(tensor[number])
    if count > 1 and (tensor is None or _NUMBER not in tensor):
        shown = "null" if tensor is None else tensor
        raise ConfigError(
            f"table.tensor={shown} names one tensor, but this model has {count} tables; write {_NUMBER} for their "
            f"numbers, as in 'table.tensor=\"tables.{_NUMBER}.weight\"', list a name per table, or share one with "
            "table.shared=true."
        )
    return None if tensor is None else tensor.replace(_NUMBER, str(number))


def _parts(path: Path, name: str, files: Mapping[str, Place]) -> list[Place]:
    """Returns the parts of a table in the order of the numbers for which the star in `name` stands; none if none are.

    Raises:
        CheckpointError: a number is missing.
    """
    pattern = re.compile(re.escape(name).replace(re.escape(_PART), r"(\d+)", 1))
    numbered = {int(match[1]): place for known, place in files.items() if (match := pattern.fullmatch(known))}
    missing = next((part for part in range(len(numbered)) if part not in numbered), None)
    if missing is not None:
        raise CheckpointError(
            f"table.path={path} lacks {name.replace(_PART, str(missing), 1)}, a part of a table of "
            f"{max(numbered) + 1} parts or more; fetch its files again."
        )
    return [numbered[part] for part in range(len(numbered))]


def _numbered(path: Path, name: str, files: Mapping[str, Place]) -> Iterator[list[Place]]:
    """Yields the parts of each table that `name` stands for; otherwise as `_parts`."""
    for number in itertools.count() if _NUMBER in name else (0,):
        places = _parts(path, name.replace(_NUMBER, str(number)), files)
        if not places:
            return
        yield places


def _joined_shape(entries: Sequence[Entry]) -> tuple[int, ...]:
    """Returns the shape of tensors one below the other; that of the first one that is no continuation."""
    first = entries[0].shape
    other = next((entry.shape for entry in entries if entry.shape[1:] != first[1:] or not entry.shape), None)
    return other if other is not None else (sum(entry.shape[0] for entry in entries), *first[1:])


def _missing(name: str | None, rows: int, dim: int, files: Mapping[str, Place]) -> str:
    largest = sorted(files.items(), key=lambda item: -item[1][1].n_bytes)[:3]
    held = ", ".join(f"{known} ({' x '.join(map(str, place[1].shape))})" for known, place in largest) or "none"
    if name is None:
        return (
            f"holds no tensor of {rows:,} x {dim} values, as the model's table has, whose size follows from ffn (such "
            f"as ffn.rows, rounded up, or ffn.n_keys); its largest are {held}."
        )
    return f"holds no tensor {name} (table.tensor); its largest are {held}."


def _stored(path: Path, places: Sequence[Place], width: int) -> StoredRows:
    """Returns tensors one below the other as lines of `width` values."""
    parts = tuple((file, entry.start, entry.n_bytes, stamp(file, _KEY)) for file, entry in places)
    return _joined(path, parts, places[0][1].dtype, width)


@functools.lru_cache(maxsize=64)
def _joined(
    path: Path, parts: tuple[tuple[Path, int, int, tuple[int, int, int]], ...], dtype: torch.dtype, width: int
) -> StoredRows:
    # One object per table, whose digest is computed once although a command builds its model several times.
    # A table may have more parts than a process may have open files.
    opened = {file: SharedFile(file) for file, *_ in parts}
    stored = [
        StoredRows(
            path=file,
            start=start,
            dtype=dtype,
            lines=n_bytes // dtype.itemsize // width,
            width=width,
            file=opened[file],
        )
        for file, start, n_bytes, _ in parts
    ]
    return stored[0] if len(stored) == 1 else JoinedRows(path, stored)
