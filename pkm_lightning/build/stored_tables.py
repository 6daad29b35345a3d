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
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.safetensors import Entry, read_entries
from pkm_lightning.data.files import expanded
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import TableSpec
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.stored_rows import StoredRows
from pkm_lightning.memory.table_rows import copy_rows
from pkm_lightning.model import Transformer

Config = Mapping[str, Any]

#: Stands in `table.tensor` for the number of the table, where a model has several.
_NUMBER = "{}"
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
    rows, dim, slices = spec.rows, spec.dim, spec.slices
    path, tensor = Path(str(table["path"])), table.get("tensor")
    if count > 1 and (tensor is None or _NUMBER not in tensor):
        shown = "null" if tensor is None else tensor
        raise ConfigError(
            f"table.tensor={shown} names one tensor, but this model has {count} tables; write {_NUMBER} for their "
            f"numbers, as in 'table.tensor=\"tables.{_NUMBER}.weight\"', or share one with table.shared=true."
        )
    name = None if tensor is None else str(tensor).replace(_NUMBER, str(number))
    files = _entries(path, _stamp(path))
    found = {
        known: place
        for known, place in files.items()
        if (place[1].shape == (rows, dim) if name is None else known == name)
    }
    if len(found) > 1:
        raise ConfigError(
            f"table.path={path} holds {len(found)} tensors of {rows:,} x {dim} values; choose one with "
            f"table.tensor={' or '.join(sorted(found)[:3])}."
        )
    if not found:
        raise ConfigError(f"table.path={path} {_missing(name, rows, dim, files)}")
    ((known, (file, entry)),) = found.items()
    if entry.shape != (rows, dim) or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
        shape, kind = " x ".join(f"{size:,}" for size in entry.shape), str(entry.dtype).removeprefix("torch.")
        raise ConfigError(
            f"table.path={path}: {known} has {shape} values of {kind}, but the model's table has {rows:,} x {dim}, in "
            "16, 32 or 64 bits; change the sizes of ffn, or give another file."
        )
    return _stored(file, entry.start, entry.dtype, rows * slices, dim // slices, _stamp(file))


def _missing(name: str | None, rows: int, dim: int, files: Mapping[str, tuple[Path, Entry]]) -> str:
    largest = sorted(files.items(), key=lambda item: -item[1][1].n_bytes)[:3]
    held = ", ".join(f"{known} ({' x '.join(map(str, place[1].shape))})" for known, place in largest) or "none"
    if name is None:
        return f"holds no tensor of {rows:,} x {dim} values, as the model's table has; its largest are {held}."
    return f"holds no tensor {name} (table.tensor); its largest are {held}."


def _stamp(path: Path) -> tuple[int, int, int]:
    """Returns what changes with a file, so that its header and digest are read once."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"table.path={path} cannot be read ({error.strerror}); it holds the rows of a table: put it back, or name "
            "the file with table.path=FILE."
        ) from None
    return state.st_ino, state.st_size, state.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _entries(path: Path, stamp: tuple[int, int, int]) -> dict[str, tuple[Path, Entry]]:
    """Returns file and place of each tensor of a file, or of all files of a folder.

    Raises:
        CheckpointError: there is no such file, or one is damaged.
    """
    found = {}
    for file in _files(path):
        try:
            found.update({name: (file, entry) for name, entry in read_entries(file).items()})
        except OSError as error:
            raise CheckpointError(f"table.path={path}: {file.name} cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise CheckpointError(f"table.path={path}: {file.name} is no whole safetensors file ({error}).") from None
    return found


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if index is not None:
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"table.path={path}: {index.name} is unreadable; restore it.") from None
    if not names:
        raise CheckpointError(f"table.path={path} holds no .safetensors file; give the file or folder with the rows.")
    yield from (path / name for name in names)


@functools.lru_cache(maxsize=64)
def _stored(
    file: Path, start: int, dtype: torch.dtype, lines: int, width: int, stamp: tuple[int, int, int]
) -> StoredRows:
    # One object per file, whose digest is computed once although a command builds its model several times.
    return StoredRows(path=file, start=start, dtype=dtype, lines=lines, width=width)
