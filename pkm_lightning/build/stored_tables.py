"""`table.trainable`, `table.path` and `table.tensor`: tables whose rows lie in a safetensors file of any origin.

| `table.trainable` | `table.path` | rows |
|---|---|---|
| true | null | drawn at random, learned, in the checkpoints |
| true | a file | begin as in the file, learned, in the checkpoints |
| false | null | stay as they were drawn, in the checkpoints |
| false | a file | stay in the file; checkpoints hold a digest of them |
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.safetensors import Entry
from pkm_lightning.checkpoints.weight_files import stamp, stored_entries
from pkm_lightning.data.files import expanded
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import TableSpec
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.joined_rows import JoinedRows
from pkm_lightning.memory.stored_rows import StoredRows
from pkm_lightning.memory.table_rows import copy_rows
from pkm_lightning.model import Transformer

Config = Mapping[str, Any]

#: Stands in `table.tensor` for the number of the table, where a model has several.
_NUMBER = "{}"
#: Stands there for the number of a part, where a table is stored in several.
_PART = "*"
_KEY = "table.path="
_TABLE_CLASS = "pkm_lightning.memory.ValueTable"


def with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with every `table.path` absolute, since a run may be continued from another directory."""
    extras = config.get("extra_ffns") or {}
    moved = {
        name: {**extra, "table": _with_absolute_path(extra["table"])} if extra and extra.get("table") else extra
        for name, extra in extras.items()
    }
    return {**config, "table": _with_absolute_path(config["table"]), **({"extra_ffns": moved} if extras else {})}


def _with_absolute_path(table: dict[str, Any]) -> dict[str, Any]:
    path = table.get("path")
    if not isinstance(path, str) or not path.strip():
        return table
    return {**table, "path": str(expanded(path).absolute())}


def check_table_keys(config: Config, *, training: bool) -> None:
    """Refuses combinations of the keys above that mean nothing, and to train a table that stays in a file.

    Raises:
        ConfigError: naming the key and what to set instead.
    """
    extras = (config.get("extra_ffns") or {}).values()
    for table in (config["table"], *({**config["table"], **((extra or {}).get("table") or {})} for extra in extras)):
        _check_keys(table)
        if training and table.get("device") == "mmap":
            _check_mapped_training(table)


def _check_keys(table: Config) -> None:
    path, tensor = table.get("path"), table.get("tensor")
    if path is not None and not str(path).strip():
        raise ConfigError("table.path='' names no file; give a safetensors file, or null for none.")
    if tensor is not None and path is None:
        raise ConfigError(f"table.tensor={tensor} names a tensor of table.path, which is null; set table.path=FILE.")
    if path is not None and table.get("_target_") != _TABLE_CLASS:
        raise ConfigError(
            f"table.path={path} is read by {_TABLE_CLASS} only, not by table._target_={table.get('_target_')}; leave "
            "it out."
        )


def _check_mapped_training(table: Config) -> None:
    settings = {"table.trainable=false": table.get("trainable", True), "table.path=FILE": table.get("path") is None}
    missing = [setting for setting, is_missing in settings.items() if is_missing]
    if missing:
        raise ConfigError(
            f"table.device=mmap: a table that stays in a file cannot learn; set {' and '.join(missing)} to train the "
            "rest of the model beside it, or table.device=cpu."
        )


@dataclass(frozen=True)
class RowsOnFile:
    """What `table.trainable`, `table.path` and `table.tensor` say about one table.

    Attributes:
        table: the group of the configuration.
        spec: what the plugin requests.
        number, count: of the table among those of its variant, and of these.
    """

    table: Config
    spec: TableSpec
    number: int
    count: int

    def keywords(self) -> dict[str, Any]:
        """Returns the keywords `trainable` and, of a frozen table in a file, `stored` of a `ValueTable`.

        Raises:
            ConfigError: the file does not hold such a table.
            CheckpointError: the file cannot be read.
        """
        if self.table.get("trainable", True):
            return {"trainable": self.spec.trainable}
        stored = {} if self.table.get("path") is None else {"stored": self.find()}
        return {"trainable": False, **stored}

    @property
    def first_rows(self) -> Callable[[], StoredRows] | None:
        """Finds the rows that a trained table begins with, which only a new run needs; None where they are drawn."""
        begins = self.table.get("path") is not None and self.table.get("trainable", True)
        return self.find if begins else None

    def find(self) -> StoredRows:
        """Returns the rows in the file.

        Raises:
            ConfigError, CheckpointError: as `keywords`.
        """
        return _find(self.table, self.spec, self.number, self.count)


def check_first_rows(model: Transformer) -> None:
    """Refuses files that do not hold the rows with which the trained tables of a new run begin.

    Raises:
        ConfigError, CheckpointError: as `RowsOnFile.keywords`.
    """
    for table in model.value_tables:
        if table.first_rows is not None:
            table.first_rows()


def fill_first_rows(model: Transformer) -> None:
    """Gives trained tables the rows of `table.path`, if there is one, each rank its part."""
    for table in model.value_tables:
        if table.first_rows is not None:
            copy_rows(table, table.first_rows())


def check_stored_rows(model: Transformer, checkpoint: SavedCheckpoint) -> None:
    """Refuses files with other rows than those beside which the weights of `checkpoint` were trained.

    Raises:
        CheckpointError: naming the file.
    """
    for name, table in model.named_modules():
        saved = f"state_dict.model.{name}.rows_digest"
        if not isinstance(table, ValueTable) or table.stored is None or saved not in checkpoint.shapes:
            continue
        (chunk,) = checkpoint.chunks(saved)
        if not torch.equal(chunk.values, table.stored.digest):
            raise CheckpointError(
                f"table.path={table.stored.path} holds other rows than those that {checkpoint.path} was trained with; "
                "put the right file there, or name it with table.path=FILE."
            )


def _find(table: Config, spec: TableSpec, number: int, count: int) -> StoredRows:
    rows, dim = spec.rows, spec.dim
    path, name = Path(str(table["path"])), _tensor_name(table.get("tensor"), number, count)
    files = stored_entries(path, _KEY)
    if name is not None and _PART in name:
        found = {name: _parts(path, name, files)}
    elif name is not None:
        found = {name: [files[name]]} if name in files else {}
    else:
        found = {known: [place] for known, place in files.items() if place[1].shape == (rows, dim)}
    if len(found) > 1:
        raise ConfigError(
            f"table.path={path} holds {len(found)} tensors of {rows:,} x {dim} values; choose one with "
            f"table.tensor={' or '.join(sorted(found)[:3])}."
        )
    if not any(found.values()):
        raise ConfigError(f"table.path={path} {_missing(name, rows, dim, files)}")
    ((known, places),) = found.items()
    entries = [entry for _, entry in places]
    shape, dtype = _joined_shape(entries), entries[0].dtype
    is_float = dtype.is_floating_point and dtype.itemsize > 1
    if shape != (rows, dim) or not is_float or any(entry.dtype != dtype for entry in entries):
        shown = " x ".join(f"{size:,}" for size in shape)
        kinds = " and ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}))
        raise ConfigError(
            f"table.path={path}: {known} has {shown} values of {kinds}, but the model's table has {rows:,} x {dim}, in "
            "16, 32 or 64 bits; change the sizes of ffn, or give another file."
        )
    parts = [(file, entry.start, entry.shape[0] * spec.slices, stamp(file, _KEY)) for file, entry in places]
    return _stored(path, tuple(parts), dtype, dim // spec.slices)


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


def _parts(path: Path, name: str, files: Mapping[str, tuple[Path, Entry]]) -> list[tuple[Path, Entry]]:
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


def _joined_shape(entries: Sequence[Entry]) -> tuple[int, ...]:
    """Returns the shape of tensors one below the other; that of the first one that is no continuation."""
    first = entries[0].shape
    other = next((entry.shape for entry in entries if entry.shape[1:] != first[1:] or not entry.shape), None)
    return other if other is not None else (sum(entry.shape[0] for entry in entries), *first[1:])


def _missing(name: str | None, rows: int, dim: int, files: Mapping[str, tuple[Path, Entry]]) -> str:
    largest = sorted(files.items(), key=lambda item: -item[1][1].n_bytes)[:3]
    held = ", ".join(f"{known} ({' x '.join(map(str, place[1].shape))})" for known, place in largest) or "none"
    if name is None:
        return f"holds no tensor of {rows:,} x {dim} values, as the model's table has; its largest are {held}."
    return f"holds no tensor {name} (table.tensor); its largest are {held}."


@functools.lru_cache(maxsize=64)
def _stored(
    path: Path, parts: tuple[tuple[Path, int, int, tuple[int, int, int]], ...], dtype: torch.dtype, width: int
) -> StoredRows:
    # One object per table, whose digest is computed once although a command builds its model several times.
    of_parts = [
        StoredRows(path=file, start=start, dtype=dtype, lines=lines, width=width) for file, start, lines, _ in parts
    ]
    return of_parts[0] if len(of_parts) == 1 else JoinedRows(path, of_parts)
