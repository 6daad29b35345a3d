"""`table.trainable`, `table.path` and `table.tensor`: tables whose rows lie in a safetensors file of any origin.

| `table.trainable` | `table.path` | rows |
|---|---|---|
| true | null | drawn at random, learned, in the checkpoints |
| true | a file | begin as in the file, learned, in the checkpoints |
| false | null | stay as they were drawn, in the checkpoints |
| false | a file | stay in the file; checkpoints hold a digest of them |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkm_lightning.build.row_files import find_rows, map_rows
from pkm_lightning.build.variants import EXTRAS, MAIN, naming, table_of
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.data.files import expanded
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import TableSpec
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.stored_rows import StoredRows
from pkm_lightning.memory.table_rows import copy_rows
from pkm_lightning.model import Transformer

Config = Mapping[str, Any]

_TABLE_CLASS = "pkm_lightning.memory.ValueTable"
#: Ends the names of buffers that stand in a checkpoint for rows.
_DIGEST = "rows_digest"
_NO_FILE = {"path": None, "tensor": None}


def with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with every `table.path` absolute, since a run may be continued from another directory."""
    return _with_tables(config, _with_absolute_path)


def _with_tables(config: Config, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Returns `config` with the settings that each variant has of its tables changed."""
    extras = {
        name: {**extra, "table": changed(extra["table"])} if extra and extra.get("table") else extra
        for name, extra in (config.get(EXTRAS) or {}).items()
    }
    return {**config, "table": changed(config["table"]), **({EXTRAS: extras} if extras else {})}


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
    for name, table in _tables(config).items():
        with naming(name):
            _check_keys(table)
            if training and table.get("device") == "mmap":
                _check_mapped_training(table)


def _tables(config: Config) -> dict[str, Config]:
    """Returns the settings of the tables of each variant by its name."""
    extras = {name: table_of(config, extra) for name, extra in (config.get(EXTRAS) or {}).items()}
    return {MAIN: config["table"], **extras}


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
        return find_rows(self.table, self.spec, self.number, self.count)


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
        saved = f"state_dict.model.{name}.{_DIGEST}"
        if not isinstance(table, ValueTable) or table.stored is None or saved not in checkpoint.shapes:
            continue
        (chunk,) = checkpoint.chunks(saved)
        if not torch.equal(chunk.values, table.stored.digest):
            raise _other_rows(str(table.stored.path), checkpoint.path)


def _other_rows(path: str, checkpoint: Path) -> CheckpointError:
    return CheckpointError(
        f"table.path={path} holds other rows than those that {checkpoint} was trained with; put the right file there, "
        "or name it with table.path=FILE."
    )


def has_digests(checkpoint: SavedCheckpoint) -> bool:
    """Returns whether rows of the model lie in a file of their own."""
    return any(name.endswith(_DIGEST) for name in checkpoint.shapes)


def include_stored_rows(checkpoint: SavedCheckpoint, path: str | Mapping[str, str] | None) -> None:
    """Adds the rows of frozen tables, which lie in files of their own, to a checkpoint that is exported.

    They are found by their digests, so that no model need be built from a configuration that nobody may trust.

    Args:
        checkpoint: of any kind; one that holds all of its rows stays as it is.
        path: where the files lie now, as of `with_table_path`; None for `table.path` of the training.

    Raises:
        ConfigError: as `with_table_path`.
        CheckpointError: a file is missing or damaged, or holds other rows than in training.
    """
    names = [name for name in checkpoint.shapes if name.endswith(_DIGEST)]
    if not names:
        return
    config = with_table_path(checkpoint.config, path)
    tables = [table for table in _tables(config).values() if table.get("path") is not None]
    rows = {}
    for name in names:
        (chunk,) = checkpoint.chunks(name)
        parts = next(filter(None, (map_rows(table, chunk.values.tolist()) for table in tables)), None)
        if parts is None:
            raise _other_rows(", ".join({str(table["path"]): None for table in tables}), checkpoint.path)
        rows[f"{name.removesuffix(_DIGEST)}weight"] = parts
    complete = _with_tables(config, lambda table: {**table, **_NO_FILE})
    checkpoint.include(rows, complete, digests=names)


def with_table_path(config: dict[str, Any], path: str | Path | Mapping[str, str | Path] | None) -> dict[str, Any]:
    """Returns a saved configuration whose `table.path` is where the file lies now; None leaves it.

    Args:
        config: the saved configuration.
        path: the place by the name of the variant, `ffn` or that of an entry of `extra_ffns`. One place alone is that
            of the variant whose rows lie in a file; where several do, it is that of `ffn`.

    Raises:
        ConfigError: a place of a variant that has no file, or one place alone for several other variants.
    """
    if path is None:
        return config
    names = [name for name, table in _tables(config).items() if table.get("path") is not None]
    if isinstance(path, Mapping):
        path = {name: place for name, place in path.items() if place is not None}
        for name, place in path.items():
            if name not in names:
                raise ConfigError(f"{_path_key(name)}={place}: {_without_file(config, name)}; leave it out.")
    else:
        if len(names) > 1 and MAIN not in names:
            keys = ", ".join(map(_path_key, names))
            raise ConfigError(f"table.path={path} is one file, but several variants have one each; set {keys}.")
        path = {names[0] if len(names) == 1 else MAIN: path}
    for name, place in path.items():
        if name == MAIN:
            config = {**config, "table": {**config["table"], "path": str(place)}}
        else:
            extra = config[EXTRAS][name]
            moved = {**extra, "table": {**extra["table"], "path": str(place)}}
            config = {**config, EXTRAS: {**config[EXTRAS], name: moved}}
    return with_absolute_paths(config)


def _path_key(name: str) -> str:
    return "table.path" if name == MAIN else f"{EXTRAS}.{name}.table.path"


def _without_file(config: Config, name: str) -> str:
    """Returns why a variant has no file that could have moved."""
    tables = _tables(config)
    if name not in tables:
        return f"the model has no variant {name}, only {', '.join(tables)}"
    return f"the rows of {name} lie in the checkpoint and not in a file of their own"
