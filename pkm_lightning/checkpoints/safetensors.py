"""The safetensors format: 8 bytes of header length (little-endian), a JSON header, the values.

The header maps names to dtype, shape and the range of bytes after it; texts stand under `__metadata__`. What an
exported model says of itself there:

| key | text |
|---|---|
| `format` | `pt`, which other readers of such files ask for |
| `pkm_lightning_format` | version of this table |
| `pkm_lightning_version` | of the package that wrote it |
| `config` | the resolved configuration, as JSON |
| `tokens_seen` | number |
| `tokenizer` | digest; absent where the data named none |
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

import pkm_lightning
from pkm_lightning.checkpoints.mapped import MappedFile
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
#: The values start where a page does, so that a row that fills a page lies in one.
_PAGE = 4096


class Entry(NamedTuple):
    """A tensor in a file; `start` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], texts: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file with tensors of these shapes and dtypes, and where each goes, in the order of the file.

    The largest come first, so that tables start at a page and every tensor at a multiple of its item's size.

    Raises:
        CheckpointError: a dtype that the format does not know.
    """
    foreign = [f"{name} ({dtype})" for name, (_, dtype) in shapes.items() if dtype not in _NAMES]
    if foreign:
        raise CheckpointError(f"{foreign[0]} cannot be exported: safetensors knows {', '.join(_NAMES.values())} only.")
    sizes = {name: Entry(dtype, tuple(shape), 0) for name, (shape, dtype) in shapes.items()}
    order = sorted(sizes, key=lambda name: (-sizes[name].dtype.itemsize, -sizes[name].n_bytes, name))
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    at = 0
    for name in order:
        entry = sizes[name]
        sizes[name], end = entry._replace(start=at), at + entry.n_bytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _PAGE)
    first = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, {
        name: sizes[name]._replace(start=first + sizes[name].start) for name in order
    }


def looks_like_safetensors(path: Path) -> bool:
    """By the suffix or the first bytes."""
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH.size + 1)
    except OSError:
        return False
    return len(start) > _LENGTH.size and start[-1:] == b"{" and _LENGTH.unpack(start[:-1])[0] <= _LONGEST_HEADER


def read_exported(path: Path) -> dict[str, Any]:
    """An exported model with the keys of a checkpoint; its tensors are mapped and cannot be written to.

    Raises:
        CheckpointError: missing, damaged, cut short, or not exported by this package.
    """
    texts, tensors = read_tensors(path)
    if "pkm_lightning_format" not in texts:
        raise CheckpointError(
            f"ckpt={path} was not written by this package; make one with: export ckpt=CHECKPOINT file={path.name}."
        )
    if texts["pkm_lightning_format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"ckpt={path} has the format version {texts['pkm_lightning_format']}, this package "
            f"({pkm_lightning.__version__}) reads {FORMAT_VERSION}; export it again with this one."
        )
    try:
        config, tokens_seen = json.loads(texts["config"]), int(texts["tokens_seen"])
    except (KeyError, ValueError):
        raise CheckpointError(f"ckpt={path} is damaged (its metadata is unreadable); use another one.") from None
    return {
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "hyper_parameters": {"config": config},
        "tokens_seen": tokens_seen,
        "tokenizer": texts.get("tokenizer"),
    }


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The texts and the mapped tensors of any safetensors file.

    Raises:
        CheckpointError: missing, damaged or cut short.
    """
    try:
        file = MappedFile(path)
    except FileNotFoundError:
        raise CheckpointError(f"ckpt={path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"ckpt={path} cannot be read ({error}); use another one.") from None
    try:
        texts, entries = _read_header(file)
        return texts, {name: file.tensor(e.start, e.dtype, e.shape) for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "its header is unreadable"
        raise CheckpointError(f"ckpt={path} is damaged ({reason}); use another one.") from None


def _read_header(file: MappedFile) -> tuple[dict[str, str], dict[str, Entry]]:
    if len(file) < _LENGTH.size:
        raise ValueError(f"cut short: {len(file)} bytes")
    length = _LENGTH.unpack(file.read(0, _LENGTH.size))[0]
    if length > min(_LONGEST_HEADER, len(file) - _LENGTH.size):
        raise ValueError(f"a header of {length} bytes in a file of {len(file)}")
    try:
        header = json.loads(file.read(_LENGTH.size, length))
    except ValueError:
        raise ValueError("its header is no JSON") from None
    texts = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
    first, at, entries = _LENGTH.size + length, 0, {}
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = told["data_offsets"]
        entry = Entry(DTYPES[told["dtype"]], tuple(int(size) for size in told["shape"]), first + start)
        if start != at or end - start != entry.n_bytes or min(entry.shape, default=0) < 0:
            raise ValueError(f"{name} does not lie where its shape says")
        entries[name], at = entry, end
    if len(file) != first + at:
        raise ValueError(f"{len(file)} bytes instead of {first + at}")
    return texts, entries
