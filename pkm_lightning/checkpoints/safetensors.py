"""The safetensors format: 8 bytes with the length of the header (little-endian), a JSON header, the values.

The header maps names to dtype, shape and the range of bytes after it. Under `__metadata__` stand texts by name, in an
exported model these:

| name | text |
|---|---|
| `format` | `pt`, which other readers of the format require |
| `pkm_lightning_format` | version of this table |
| `pkm_lightning_version` | of the package that wrote the file |
| `config` | the resolved configuration, as JSON |
| `tokens_seen` | number |
| `tokenizer` | digest; absent where the data module has none |
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile
from pkm_lightning.errors import CheckpointError

FORMAT_VERSION = "1"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
#: Other readers refuse longer headers.
_LONGEST_HEADER = 100_000_000
#: The values start at a page boundary, so that a row as long as a page lies in one page.
_PAGE = 4096


class Entry(NamedTuple):
    """A tensor in a file; `start` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def lay_out(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], texts: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Lays out a file with tensors of these shapes and dtypes.

    Returns:
        The header, and the place of each tensor in the order of the file.

    Raises:
        CheckpointError: a dtype that the format lacks.
    """
    foreign = [f"{name} ({dtype})" for name, (_, dtype) in shapes.items() if dtype not in _NAMES]
    if foreign:
        raise CheckpointError(f"{foreign[0]} cannot be exported: safetensors has only {', '.join(_NAMES.values())}.")
    entries = {name: Entry(dtype, tuple(shape), 0) for name, (shape, dtype) in shapes.items()}
    # The widest and largest first: tables start at a page, and every tensor at a multiple of its item's size.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, -entries[name].n_bytes, name))
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    start = 0
    for name in order:
        entry = entries[name]
        entries[name], end = entry._replace(start=start), start + entry.n_bytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces after the JSON text are part of the format.
    text += b" " * (-(_LENGTH.size + len(text)) % _PAGE)
    first = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, {
        name: entries[name]._replace(start=first + entries[name].start) for name in order
    }


def looks_like_safetensors(path: Path) -> bool:
    """Returns whether the suffix or the first bytes of a file are those of the format."""
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH.size + 1)
    except OSError:
        return False
    return len(start) > _LENGTH.size and start[-1:] == b"{" and _LENGTH.unpack(start[:-1])[0] <= _LONGEST_HEADER


def map_tensors(file: MappedFile) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns the texts and the mapped tensors of any safetensors file.

    Raises:
        DamagedFileError: the header is unreadable, or the file is cut short.
    """
    try:
        texts, entries = _read_header(file)
        return texts, {name: file.tensor(e.start, e.dtype, e.shape) for name, e in entries.items()}
    except DamagedFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError("its header is unreadable") from None


def _read_header(file: MappedFile) -> tuple[dict[str, str], dict[str, Entry]]:
    if len(file) < _LENGTH.size:
        raise DamagedFileError(f"cut short: {len(file)} bytes")
    length = _LENGTH.unpack(file.read(0, _LENGTH.size))[0]
    if length > min(_LONGEST_HEADER, len(file) - _LENGTH.size):
        raise DamagedFileError(f"a header of {length} bytes in a file of {len(file)}")
    try:
        header = json.loads(file.read(_LENGTH.size, length))
    except ValueError:
        raise DamagedFileError("its header is no JSON") from None
    texts = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
    first, expected, entries = _LENGTH.size + length, 0, {}
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = fields["data_offsets"]
        entry = Entry(DTYPES[fields["dtype"]], tuple(int(size) for size in fields["shape"]), first + start)
        # Without gaps and overlaps, as other readers of the format require.
        if start != expected or end - start != entry.n_bytes or min(entry.shape, default=0) < 0:
            raise DamagedFileError(f"{name} does not lie where its shape requires")
        entries[name], expected = entry, end
    if len(file) != first + expected:
        raise DamagedFileError(f"{len(file)} bytes instead of {first + expected}")
    return texts, entries
