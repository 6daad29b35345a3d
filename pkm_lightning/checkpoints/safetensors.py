"""The safetensors format: 8 bytes with the length of the header (little-endian), a JSON header, the values.

The header maps names to dtype, shape and the range of bytes after it. Under `__metadata__` stand texts by name, in an
exported model these:

| name | text |
|---|---|
| `format` | `pt`, which other readers of the format require |
| `pkm_lightning_format` | version of this table |
| `pkm_lightning_version` | of the package that wrote the file |
| `config` | the resolved configuration, as JSON; where tables are quantised, `table.bits` is their width |
| `tokens_seen` | number |
| `tokenizer` | digest; absent where the data module has none |
| `data` | fingerprint of the training data; likewise |
| `pkm_lightning_crc32` | sums of the header, with zeros in the place of these digits, and of each tensor, by position |
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile
from pkm_lightning.checkpoints.sums import ALL, Share, crc32
from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import open_regular

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
_SUMS = re.compile(rb'"pkm_lightning_crc32":"([0-9a-f ]*)"')
#: Torch's own limit.
_MOST_DIMENSIONS = 64


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
        The header, with zeros for the sums that `with_sums` writes, and the place of each tensor in the file's order.

    Raises:
        CheckpointError: a dtype that the format lacks.
    """
    foreign = [f"{name} ({dtype})" for name, (_, dtype) in shapes.items() if dtype not in _NAMES]
    if foreign:
        raise CheckpointError(f"{foreign[0]} cannot be exported: safetensors has only {', '.join(_NAMES.values())}.")
    entries = {name: Entry(dtype, tuple(shape), 0) for name, (shape, dtype) in shapes.items()}
    # The widest and largest first: tables start at a page, and every tensor at a multiple of its item's size.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, -entries[name].n_bytes, name))
    sums = " ".join(["00000000"] * (1 + len(order)))
    header: dict[str, Any] = {"__metadata__": {**texts, "pkm_lightning_crc32": sums}}
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


def with_sums(header: bytes, sums: Sequence[int]) -> bytes:
    """Returns the header with its own sum and those of the tensors, `sums`, in the place of the zeros."""
    zeros = _SUMS.search(header)
    assert zeros is not None
    digits = b" ".join(b"%08x" % value for value in (zlib.crc32(header), *sums))
    assert len(digits) == len(zeros[1])
    return header[: zeros.start(1)] + digits + header[zeros.end(1) :]


def check_tensors(file: MappedFile, skipped: Collection[str] = (), share: Share = ALL) -> bool:
    """Compares the header and the tensors, except those `skipped`, to their sums; returns whether there are any.

    Raises:
        DamagedFileError: something differs; names the tensor.
    """
    length = _LENGTH.unpack(file.read(0, _LENGTH.size))[0]
    header = file.read(0, _LENGTH.size + length)
    match = _SUMS.search(header)
    if match is None:
        return False
    zeros = header[: match.start(1)] + re.sub(rb"[0-9a-f]", b"0", match[1]) + header[match.end(1) :]
    own, *sums = (int(digits, 16) for digits in match[1].split())
    entries = _read_header(file, unknown_dtypes=False)[1]
    if own != zlib.crc32(zeros) or len(sums) != len(entries):
        raise DamagedFileError("its header has changed since it was written")
    for (name, entry), value in share.of(list(zip(entries.items(), sums, strict=True))):
        if name not in skipped and crc32(file, entry.start, entry.n_bytes) != value:
            raise DamagedFileError(f"{name} has changed since it was written")
    return True


def looks_like_safetensors(path: Path) -> bool:
    """Returns whether the suffix or the first bytes of a file are those of the format."""
    if path.suffix == ".safetensors":
        return True
    try:
        with open_regular(path, "rb") as file:
            start = file.read(_LENGTH.size + 1)
    except OSError:
        return False
    return len(start) > _LENGTH.size and start[-1:] == b"{" and _LENGTH.unpack(start[:-1])[0] <= _LONGEST_HEADER


def map_tensors(file: MappedFile) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns the texts and the mapped tensors of a safetensors file.

    Raises:
        DamagedFileError: the header is unreadable, a dtype is unknown to torch, or the file is cut short.
    """
    try:
        texts, entries = _read_header(file, unknown_dtypes=False)
        return texts, {name: file.tensor(e.start, e.dtype, e.shape) for name, e in entries.items()}
    except DamagedFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError("its header is unreadable") from None


def read_entries(path: Path) -> dict[str, Entry]:
    """Returns the place of each tensor in any safetensors file, of which only the header is read.

    Raises:
        OSError, ValueError: it cannot be opened, is empty, or is damaged.
    """
    file = MappedFile(path)
    try:
        return _read_header(file, unknown_dtypes=True)[1]
    except DamagedFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError("its header is unreadable") from None


def _read_header(file: MappedFile, *, unknown_dtypes: bool) -> tuple[dict[str, str], dict[str, Entry]]:
    """Returns texts and places; with `unknown_dtypes`, a tensor of a kind that torch lacks or packs counts as bytes.

    The other tensors of a foreign file can then be read.
    """
    if len(file) <= _LENGTH.size:
        raise DamagedFileError(f"cut short: {len(file)} bytes")
    length = _LENGTH.unpack(file.read(0, _LENGTH.size))[0]
    if length > min(_LONGEST_HEADER, len(file) - _LENGTH.size):
        # Every header of the format begins so.
        if file.read(_LENGTH.size, 1) != b"{":
            raise DamagedFileError("it has another format")
        raise DamagedFileError(f"a header of {length} bytes in a file of {len(file)}")
    try:
        header = json.loads(file.read(_LENGTH.size, length), object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DamagedFileError("its header is no JSON") from None
    texts = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
    first, expected, entries = _LENGTH.size + length, 0, {}
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = _integers(fields["data_offsets"])
        shape, kind = _shape(fields["shape"]), fields["dtype"]
        if unknown_dtypes and kind not in DTYPES:
            entry = Entry(torch.uint8, (end - start,), first + start)
        else:
            entry = Entry(DTYPES[kind], shape, first + start)
        # Without gaps and overlaps, as other readers of the format require.
        if start != expected or end - start != entry.n_bytes:
            raise DamagedFileError(f"{name} does not lie where its shape requires")
        entries[name], expected = entry, end
    if len(file) != first + expected:
        raise DamagedFileError(f"{len(file)} bytes instead of {first + expected}")
    return texts, entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object; readers of the format differ about a name twice."""
    if len(dict(pairs)) != len(pairs):
        raise DamagedFileError("its header has a name twice")
    return dict(pairs)


def _integers(values: Any) -> tuple[int, ...]:
    """Returns a shape or offsets, which JSON may hold as anything.

    Raises:
        ValueError: they are not a short list of whole numbers.
    """
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        raise ValueError
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError
    return tuple(values)


def _shape(values: Any) -> tuple[int, ...]:
    """Returns a shape.

    Raises:
        ValueError: no tensor can have it.
    """
    shape = _integers(values)
    if math.prod(size for size in shape if size) >= 2**63:
        raise ValueError
    return shape
