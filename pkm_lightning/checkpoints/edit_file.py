"""The file of an edit: deltas of a few lines of value tables, what they are for, and the weights that they fit.

A safetensors file that any reader of the format opens. `TABLE` is the name of a table's weight in the model's state:

| tensor | content |
|---|---|
| `TABLE.lines` | (U,) int64, ascending, each once: a line is a row, or a slice of a row where rows are sliced |
| `TABLE.deltas` | (U, V), float32 (float64 for a table in float64) |

| text | content |
|---|---|
| `pkm_lightning_edit` | version of this table |
| `created`, `note` | ISO 8601 in UTC; what it is for |
| `weights` | digest of the weights that it was made for, without edits |
| `facts`, `settings`, `figures` | JSON: facts as `adaptation/facts_file.py` reads them, how and how well written |
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkm_lightning.checkpoints.export import weight_blocks, weight_shapes
from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile
from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.checkpoints.safetensors import check_tensors, lay_out, map_tensors, with_sums
from pkm_lightning.errors import CheckpointError, RunDirectoryError
from pkm_lightning.storage import written_beside

EDIT_VERSION = "1"
SUFFIX = ".safetensors"
_LINES, _DELTAS = ".lines", ".deltas"


@dataclass(frozen=True)
class LineDeltas:
    """Deltas of lines of one table.

    Attributes:
        lines_U: numbers of the lines, ascending, each once.
        values_UV: their deltas.
    """

    lines_U: Tensor
    values_UV: Tensor


@dataclass(frozen=True)
class Edit:
    """A change of a few lines of a model's tables.

    Attributes:
        name: of the edit, by which it is listed, applied and removed.
        weights: digest of the weights that it fits; see `weights_digest`.
        tables: the deltas by the name of the table's weight in the model's state.
        facts: the facts that it writes, as lines of a facts file.
        created: ISO 8601 in UTC.
        note: what it is for, in words.
        settings, figures: how and how well it was made.

    Example: `docs/editing.md`, "From a program".
    """

    name: str
    weights: str
    tables: Mapping[str, LineDeltas]
    facts: tuple[Mapping[str, Any], ...] = ()
    created: str = ""
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_lines(self) -> int:
        """Lines that it changes, over all tables."""
        return sum(len(deltas.lines_U) for deltas in self.tables.values())

    def save(self, path: str | Path) -> None:
        """Writes the edit to a file, which appears when all of it is on disk.

        Raises:
            RunDirectoryError: the disk is full, or the folder is missing or cannot be written.
        """
        tensors = {}
        for table, deltas in self.tables.items():
            tensors[table + _LINES] = deltas.lines_U.cpu().contiguous()
            tensors[table + _DELTAS] = deltas.values_UV.detach().cpu().contiguous()
        texts = {
            "pkm_lightning_edit": EDIT_VERSION,
            **{name: getattr(self, name) for name in ("created", "note", "weights")},
            **{name: _json(getattr(self, name)) for name in ("facts", "settings", "figures")},
        }
        header, entries = lay_out({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, texts)
        values = [tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in entries]
        try:
            with written_beside(Path(path)) as file:
                file.write(with_sums(header, [zlib.crc32(content) for content in values]))
                for content in values:
                    file.write(content)
        except OSError as error:
            raise RunDirectoryError(
                f"{path} cannot be written ({error.strerror}); free the disk, or choose another place."
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Returns the edit in a file, whose name is that of the file.

        Raises:
            CheckpointError: it is missing, damaged, no edit, or of another version of the format.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is no file of an edit; `edit list` shows those of a run.")
        try:
            file = MappedFile(path)
            texts, tensors = map_tensors(file)
            if "pkm_lightning_edit" not in texts:
                raise CheckpointError(f"{path} is no edit: it has no deltas of rows; `edit list` shows those of a run.")
            if texts["pkm_lightning_edit"] != EDIT_VERSION:
                raise CheckpointError(
                    f"{path} has the format version {texts['pkm_lightning_edit']} of edits, this package reads "
                    f"{EDIT_VERSION}; write the facts again."
                )
            check_tensors(file)
            return _restored(path.name.removesuffix(SUFFIX), texts, tensors)
        except (DamagedFileError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); restore it, or write the facts again.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda other: dict(other))


def _restored(name: str, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Edit:
    facts, settings, figures = (json.loads(texts[name]) for name in ("facts", "settings", "figures"))
    if not isinstance(facts, list) or not all(isinstance(fact, dict) for fact in facts):
        raise DamagedFileError("its facts are no list of objects")
    if not isinstance(settings, dict) or not isinstance(figures, dict):
        raise DamagedFileError("its settings or figures are no objects")
    tables = {}
    for tensor in sorted(tensors):
        if tensor.endswith(_LINES):
            table = tensor.removesuffix(_LINES)
            # Copied: a mapped tensor would end with its file.
            tables[table] = LineDeltas(tensors[tensor].clone(), tensors[table + _DELTAS].clone())
            _check_deltas(table, tables[table])
    if len(tensors) != 2 * len(tables):
        raise DamagedFileError("it has tensors other than lines and deltas")
    return Edit(
        name=name,
        weights=texts["weights"],
        tables=tables,
        facts=tuple(facts),
        created=texts["created"],
        note=texts["note"],
        settings=settings,
        figures=figures,
    )


def _check_deltas(table: str, deltas: LineDeltas) -> None:
    lines_U, values_UV = deltas.lines_U, deltas.values_UV
    if lines_U.dtype != torch.int64 or lines_U.ndim != 1 or (len(lines_U) and int(lines_U[0]) < 0):
        raise DamagedFileError(f"{table}: lines are no row numbers")
    if not bool((lines_U[1:] > lines_U[:-1]).all()):
        raise DamagedFileError(f"{table}: lines are not ascending")
    if values_UV.dtype not in (torch.float32, torch.float64) or values_UV.ndim != 2 or len(values_UV) != len(lines_U):
        raise DamagedFileError(f"{table}: deltas do not fit the lines")
    if not bool(values_UV.isfinite().all()):
        raise DamagedFileError(f"{table}: a delta is no finite number")


def weights_digest(checkpoint: SavedCheckpoint) -> str:
    """Returns a SHA-256 over name, dtype, shape and CRC-32 of every weight and buffer of the model, in hex digits.

    It is the same for a checkpoint of one file, of several ranks, and an exported file of the same weights. Reads all
    of them: 0.15 s of CPU per GB beside the disk.

    Raises:
        CheckpointError: a file is damaged.
    """
    sums = {}
    for name, (shape, dtype) in weight_shapes(checkpoint).items():
        crc = 0
        for block in weight_blocks(checkpoint, name):
            if block.numel():
                crc = zlib.crc32(_bytes(block), crc)
            checkpoint.forget()
        sums[name] = (shape, dtype, crc)
    return _digest(sums)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Returns the digest of weights in memory; `state` is the `state_dict` of a model."""
    sums = {}
    for name, value in state.items():
        values = value.detach().cpu().contiguous()
        sums[name] = (tuple(value.shape), value.dtype, zlib.crc32(_bytes(values)) if values.numel() else 0)
    return _digest(sums)


def _bytes(values: Tensor) -> memoryview:
    # As bytes, since NumPy has no bfloat16.
    return values.detach().reshape(-1).view(torch.uint8).numpy().data


def _digest(sums: Mapping[str, tuple[tuple[int, ...], torch.dtype, int]]) -> str:
    made = hashlib.sha256()
    for name, (shape, dtype, crc) in sorted(sums.items()):
        made.update(f"{name} {dtype} {list(shape)} {crc:08x} {math.prod(shape)}\n".encode())
    return made.hexdigest()
